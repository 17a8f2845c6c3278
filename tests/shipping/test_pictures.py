"""Pictures of new documents: as the run's own images, from paths, bytes and base64."""

import base64
import copy
import dataclasses
import json
import pathlib

import numpy as np
import pytest

from configs import vixml
from tests.shipping.conftest import ROWS
from xmc_jax.config import PredictConfig, RunConfig
from xmc_jax.data.synthetic import product_set
from xmc_jax.shipping import artifact, documents, exporting, predict_files
from xmc_jax.shipping.predictor import Predictor, Query
from xmc_jax.shipping.query_encoder import QueryEncoder
from xmc_jax.training import build

pytestmark = pytest.mark.slow
SETTINGS = product_set.SyntheticConfig(documents=60, test_documents=20, labels=40, pixels=32)


@pytest.fixture(scope="module")
def products(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("raw") / "Products"
    product_set.generate(SETTINGS, folder)
    return folder


@pytest.fixture(scope="module")
def run(fields, products, tmp_path_factory):
    """A run with pictures, and its state."""
    fields = copy.deepcopy(fields)
    images = vixml.get_config("mm").to_dict()["data"]["images"] | {"per_item": 2}
    folder = str(tmp_path_factory.mktemp("data"))
    own = {"dataset": "Products", "raw_dir": str(products), "data_dir": folder, "images": images}
    fields["data"] |= own
    fields["prime"] |= {"enabled": False}
    fields["optimizer"]["weight_decay"] = ((".*", 0.01),)
    fields["train"] |= {"batch_size": 48}
    run = build.run(RunConfig.from_dict(fields))
    return run, run.initial_state()


@pytest.fixture(scope="module")
def predictor(run, tmp_path_factory) -> Predictor:
    run, state = run
    return Predictor.open(str(exporting.whole(run, 0, state, tmp_path_factory.mktemp("run"))))


@pytest.fixture(scope="module")
def items(run) -> list[Query]:
    """The test documents with their pictures, as files."""
    shop = product_set.Shop(SETTINGS)
    return [
        Query(item.title, [shop.picture("test", i, k) for k in range(item.images)])
        for i, item in enumerate(shop.items("test"))
    ]


def test_ranks_as_the_run_evaluates(run, predictor, items):
    run, state = run
    config = dataclasses.replace(run.config.eval, k=10, ks=(1,))
    evaluation = run.evaluate(state, config)
    assert 0 < sum(bool(item.images) for item in items) < len(items)
    for kind in evaluation.ids:
        scores, rows, _ = predictor.rank(items, 10, kind, ROWS)
        np.testing.assert_allclose(scores, evaluation.scores[kind], atol=1e-5)
        assert (rows == evaluation.ids[kind]).mean() > 0.99
    texts = predictor.rank([item.text for item in items], 10, "plain", ROWS)
    assert (texts[0] != evaluation.scores["plain"]).any()


def test_records_bring_pictures_in_every_form(predictor, items, tmp_path):
    (tmp_path / "pictures").mkdir()
    forms = {"path": [], "base64": [], "object": []}
    for i, item in enumerate(items):
        paths = [f"pictures/{i}-{k}.png" for k in range(len(item.images))]
        for path, content in zip(paths, item.images):
            (tmp_path / path).write_bytes(content)
        texts = [base64.b64encode(content).decode() for content in item.images]
        cells = (
            paths,
            [f"data:image/png;base64,{x}" for x in texts],
            [{"bytes": x} for x in texts],
        )
        for form, cell in zip(forms.values(), cells):
            form.append({"text": item.text, "images": cell})
    for name, rows in forms.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    lines = "".join(f'"{row["text"]}",{"|".join(row["images"])}\n' for row in forms["path"])
    (tmp_path / "csv.csv").write_text(f"text,images\n{lines}")
    import pyarrow
    import pyarrow.parquet

    for name, cells in (
        ("bytes", [list(item.images) for item in items]),
        ("struct", [[{"bytes": x, "path": None} for x in item.images] for item in items]),
    ):
        table = pyarrow.table({"text": [item.text for item in items], "images": cells})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    scores, rows, _ = predictor.rank(items, 5, "auto", ROWS)
    ids = predictor.artifact.labels.ids
    for source in sorted(tmp_path.glob("*.*")):
        target = tmp_path / "out" / f"{source.stem}.jsonl"
        predict(predictor, source, target)
        for line, score, found in zip(target.read_text().splitlines(), scores, rows):
            labels = json.loads(line)["labels"]
            assert [one["id"] for one in labels] == [ids[row] for row in found]
            assert [np.float32(one["score"]) for one in labels] == score.tolist()


def predict(predictor, source, target, **changes) -> predict_files.Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_files, "QueryEncoder", lambda _: predictor._encoder)
        config = dataclasses.replace(PredictConfig(k=5, batch_size=7), **changes)
        return predict_files.predict(predictor.artifact, config, str(source), str(target))


def test_what_cannot_be_read_is_told(predictor, items, tmp_path):
    picture = next(item.images[0] for item in items if item.images)
    (tmp_path / "whole.png").write_bytes(picture)
    (tmp_path / "cut.png").write_bytes(picture[: len(picture) // 2])
    (tmp_path / "none.png").write_bytes(b"")
    cells = {
        "whole.png": None,
        "cut.png": "picture 0: image: expected a whole image, found",
        "none.png": "column images: expected a picture, found an empty file: ",
        "absent.png": "column images: expected a picture, found no such file or directory: ",
        ".": "column images: expected a file, found something else: |column images: .* directory",
        "https://example.org/a.png": "column images: expected a path or a picture, found the URL "
        "https://example.org/a.png; fetch it first: python -m xmc_jax.images.fetch",
        "data:image/png;base64,@@": "column images: expected base64, found '@@'",
        "a\0b": "column images: not a path: ",
        "s3://x/y.png": "column images: expected a path, or a URL of http or https, found ",
    }
    source = tmp_path / "in.jsonl"
    rows = [{"id": i, "text": "lamp", "images": cell} for i, cell in enumerate(cells)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"in.jsonl:2: picture 0: .*; --predict.on_error=skip"):
        predict(predictor, source, tmp_path / "stopped.jsonl", batch_size=2)
    report = predict(predictor, source, tmp_path / "out.jsonl", on_error="skip")
    assert report.progress.errors == len(cells) - 1
    for line, problem in zip((tmp_path / "out.jsonl").read_text().splitlines(), cells.values()):
        found = json.loads(line)
        if problem is None:
            assert len(found["labels"]) == 5
        else:
            assert any(
                found["error"].startswith(one.partition(".*")[0]) for one in problem.split("|")
            )
            assert len(found["error"]) < 400


def test_texts_alone_need_no_encoder_of_pictures(predictor, items):
    """Which may be another, or not there: that is said when there is a picture."""
    there = predictor.artifact
    picture = next(item.images[0] for item in items if item.images)
    for changes, message in (
        ({"encoder": "nobody/siglip", "revision": None}, "pictures need the image encoder nobody"),
        ({"digest": "0" * 64}, "expected the image encoder of training"),
    ):
        images = dataclasses.replace(there.model.images, **changes)
        other = dataclasses.replace(there, model=dataclasses.replace(there.model, images=images))
        one = Predictor(other, QueryEncoder(other))
        assert len(one.predict(["a lamp"], k=3)[0]) == 3
        with pytest.raises(ValueError, match=message) as caught:
            one.predict([Query("a lamp", [picture])], k=3)
        assert "\n" not in str(caught.value)


def test_a_model_of_texts_leaves_pictures_out(exported, tmp_path, caplog):
    opened = artifact.open(exported.folder, verify=False)
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "x", "images": ["https://example.org/a.png"]}\n')
    (document,) = documents.DocumentFile(str(source), opened.model).documents()
    assert document.problem is None and not document.query.images
