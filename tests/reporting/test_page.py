"""The page of a run: its numbers are those of the files, and nothing in it reaches outside."""

import json
import pathlib
import re
import sys

import numpy as np
import pytest

from xmc_jax.reporting import charts, page
from xmc_jax.retrieval import evaluate, saved_predictions
from xmc_jax.retrieval.evaluate import COLUMNS

STYLE = pathlib.Path(page.__file__).with_name("style.css")


@pytest.fixture(scope="module")
def written(left, data, parsed):
    """The text of the page, and the page read again."""
    text = page.write(left.folder, data).read_text()
    return text, parsed(text)


def test_numbers_are_those_of_the_files(left, written):
    text, read = written
    found = json.loads((left.folder / "metrics.json").read_text())
    names = {"zero-shot": "zero-shot", "plain": "trained", "augmented": "trained + augmented"}
    expected = [["percent", *COLUMNS]] + [
        [names[row], *(f"{100 * found[row][column]:.2f}" for column in COLUMNS)] for row in found
    ]
    assert read.table("percent") == expected
    cuts = (1, 3, 5, 10, 100)
    for row, name in names.items():
        (whole,) = (rows for rows in read.tables if rows[0] == [name, *(f"@{k}" for k in cuts)])
        assert len(whole) == 1 + len(found[row]) / len(cuts)
        for metric, *cells in whole[1:]:
            assert cells == [f"{100 * found[row][f'{metric}@{k}']:.2f}" for k in cuts]
    # P@5 by frequency adds up to P@5, but for two decimals of each part.
    heads, *rows = read.table("training documents")
    for column, row in enumerate(found, 1):
        assert heads[column].startswith("Contribution to P@5")
        parts = [float(cells[column].removesuffix(charts.PERCENT)) for cells in rows]
        assert sum(parts) == pytest.approx(100 * found[row]["P@5"], abs=0.006 * len(parts))
    training = read.table("epoch")
    assert training[0][:3] == ["epoch", "step", "loss"] and training[-1][:3] == ["4", "12", "0.6"]
    assert "1.7 min in all" in text and "Nothing has been evaluated" not in text


def test_nothing_comes_from_or_goes_to_anywhere(written):
    text, read = written
    allowed = {
        *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav"),
        *("section", "figure", "figcaption", "article", "details", "summary", "h1", "h2", "h3"),
        *("h4", "p", "div", "span", "a", "b", "strong", "small", "em", "code", "bdi", "img"),
        *("table", "caption", "thead", "tbody", "tr", "th", "td"),
        *("svg", "g", "text", "line", "polyline", "polygon", "circle", "path", "rect"),
    }
    ids = {attributes["id"] for _, attributes, _ in read.elements if "id" in attributes}
    for tag, attributes, _ in read.elements:
        assert tag in allowed, tag
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("xlink:href", "srcset", "action")
            if name == "src":
                assert value.startswith("data:image/jpeg;base64,")
            elif name == "href":
                assert value.startswith("#") and value[1:] in ids
            elif name == "style":
                assert re.fullmatch(r"width:[\d.]+%", value)
    ((_, style),) = read.named("style")
    assert style == STYLE.read_text()
    assert "url(" not in style and "@import" not in style and "//" not in style
    (policy,) = (a for a, _ in read.named("meta") if "http-equiv" in a)
    assert policy["content"].startswith("default-src 'none'")
    assert len(text.encode()) < 3 << 20


def test_hostile_texts_are_shown_as_they_are(left, written, data):
    _, read = written
    facts = json.loads((left.folder / "run.json").read_text())["hardware"].values()
    shown = [text for _, text in read.named("bdi") if text not in facts]
    texts = data.texts("test") + data.texts("label")
    unshown = re.compile("[\x00-\x1f\x7f-\x9f]")
    known = {unshown.sub("\N{REPLACEMENT CHARACTER}", text) for text in texts}
    long = {text for text in shown if text.endswith("…")}
    assert long and all(len(text) <= 160 for text in long)
    assert set(shown) - long <= known
    for attack in ("<script>alert(1)</script>", "'><svg/onload=alert(1)>", "javascript:alert(1)"):
        assert attack in shown
    assert read.named("h1") == [({}, "Hostile")]
    assert "tiny<script>" in [text for _, text in read.named("b")]


def test_no_number_is_missing_its_value(written):
    """What is not there is a dash in tables, and not drawn."""
    _, read = written
    places = [
        value
        for tag, attributes, _ in read.elements
        for name, value in attributes.items()
        if name not in ("content", "class", "aria-label") or tag == "svg"
    ]
    cells = [cell for rows in read.tables for row in rows for cell in row]
    for said in (*places, *cells, *(text for _, text in read.named("title"))):
        assert not re.search(r"(?<![\w\"-])(nan|inf|infinity|none)(?![\w\"])", said, re.I), said[
            :300
        ]
    assert "–" in cells  # labels without predictions or positives


def test_who_cannot_see_it_is_told(written):
    _, read = written
    plots = [a for a, _ in read.named("svg") if a.get("aria-hidden") != "true"]
    assert len(plots) >= 15
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in plots)
    assert all("alt" in a for a, _ in read.named("img"))
    assert all(rows[0] and any(row[0] for row in rows) for rows in read.tables)
    ids = [a["id"] for _, a, _ in read.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    sections = [a["id"] for a, _ in read.named("section")]
    assert sections == [
        *("training", "frequency", "scores", "changes", "examples", "time", "config")
    ]


def test_marks_are_within_their_plots(written):
    _, read = written
    sizes = [a["viewbox"].split() for a, _ in read.named("svg")]
    tallest = max(float(size[3]) for size in sizes)
    for tag in ("circle", "text", "line", "rect"):
        for a, _ in read.named(tag):
            for name, most in (
                ("cx", 340),
                ("x", 340),
                ("x1", 340),
                ("cy", tallest),
                ("y", tallest),
            ):
                assert 0 <= float(a.get(name, 0)) <= most, (tag, a)


def luminance(colour: str) -> float:
    """Of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def test_colours_can_be_read_in_light_and_dark():
    """Text and the names of series: 4.5 to 1, as WCAG asks of text."""
    schemes = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.S)
    assert len(schemes) == 3  # light, dark, and paper
    for scheme in schemes:
        found = dict(re.findall(r"--(\w+): (#[0-9a-f]+);", scheme))
        found = {
            k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in found.items()
        }
        paper = luminance(found["paper"])
        for name in ("ink", "muted", "zero", "trained", "augmented", "baseline", "right", "wrong"):
            dark, light = sorted((paper, luminance(found[name])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, found[name])


def test_the_page_is_the_same_from_memory_and_from_files(finished, data):
    read = page.write(finished.folder, data).read_bytes()
    given = page.write(finished.folder, data, evaluation=finished.evaluation).read_bytes()
    assert read == given


def test_of_many_documents_some_are_looked_at(finished, data, parsed, monkeypatch):
    monkeypatch.setattr(evaluate, "_LOOKED_AT", 20)
    evaluate.write_predictions(
        finished.zero_shot, saved_predictions.path(finished.folder, 0), evaluate.sample(50)
    )
    text = page.write(finished.folder, data).read_text()
    assert text.count("From 20 of the 50 test documents, evenly spread") == 4
    (rows, _) = (rows for rows in parsed(text).tables if rows[0][0].startswith("right ones among"))
    assert sum(int(row[1]) for row in rows[1:]) == 20
    assert page.write(finished.folder, data, evaluation=finished.evaluation).read_text() == text


def test_a_run_under_way_has_its_curves(finished, data, parsed):
    (finished.folder / "metrics.json").unlink()
    (finished.folder / "run.json").unlink()
    (finished.folder / "predictions" / "12.npz").unlink()
    read = parsed(page.write(finished.folder, data).read_text())
    assert [a["id"] for a, _ in read.named("section")] == ["training", "time", "config"]
    expected = finished.evaluation.metrics["augmented"]["P@1"]
    assert read.table("percent")[-1][:2] == ["trained + augmented", f"{100 * expected:.2f}"]
    lines = (finished.folder / "metrics.jsonl").read_text().splitlines()
    (finished.folder / "metrics.jsonl").write_text("\n".join(lines[1:4]) + "\n" + lines[4][:9])
    assert "Nothing has been evaluated yet." in page.write(finished.folder, data).read_text()
    (finished.folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected the records of a run"):
        page.write(finished.folder, data)


def test_metrics_of_an_earlier_end_are_not_taken_for_those_of_now(finished, data, parsed):
    """A run that goes on has metrics.json and predictions of before."""
    path = finished.folder / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps({"step": 15, "eval/P@1": 0.25}) + "\n")
    read = parsed(page.write(finished.folder, data).read_text())
    assert [row[:2] for row in read.table("percent")[1:]][1] == ["trained", "25.00"]
    assert "frequency" not in [a.get("id") for a, _ in read.named("section")]


def test_unknown_losses_metrics_rows_and_phases_have_their_own_names(finished, data, parsed):
    for name, change in (
        ("config.json", lambda content: content["loss"].update(kind="new_loss")),
        ("metrics.json", lambda content: content["plain"].update({"F1@2": 0.5, "MRR": 0.25})),
        ("metrics.json", lambda content: content.update(stacked={"P@1": 0.125, "MRR": 0.5})),
        ("run.json", lambda content: content["seconds"].update(defragmenting=9.0)),
    ):
        path = finished.folder / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    path = finished.folder / "metrics.jsonl"
    values = {"train/new_term": 2.0, "train/learning_rate": 0.5, "eval_stacked/P@1": 0.125}
    path.write_text(path.read_text() + json.dumps({"step": 12, **values}) + "\n")
    text = page.write(finished.folder, data).read_text()
    read = parsed(text)
    assert "negatives that violate the loss new_loss" in text
    titles = [title for _, title in read.named("h3")]
    assert {"new term", "learning rate"} <= set(titles)
    assert {"new term", "learning rate"} <= set(read.table("epoch")[0])
    assert read.table("percent")[-1][:2] == ["stacked", "12.50"]
    (trained,) = (rows for rows in read.tables if rows[0][:3] == ["trained", "@1", "@2"])
    assert trained[0][-1] == "value" and ["F1", "–", "50.00"] in [row[:3] for row in trained]
    assert ["MRR", "0.25"] in [[row[0], row[-1]] for row in trained]
    assert "defragmenting" in [row[0] for rows in read.tables for row in rows]


def test_what_differs_from_the_recipe_is_said(finished, data, parsed):
    config = json.loads((finished.folder / "config.json").read_text())
    recipe = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    del recipe["provenance"]
    recipe["train"]["batch_size"] = 256
    recipe["eval"]["ks"] = (1, 3, 5, 10, 100)  # a tuple there, a list in JSON
    read = parsed(page.write(finished.folder, data, recipe=recipe).read_text())
    assert read.table("field") == [
        ["field", "recipe", "this run"],
        ["train.batch_size", "256", "30"],
    ]
    same = {k: v for k, v in config.items() if k != "provenance"}
    assert "No field differs" in page.write(finished.folder, data, recipe=same).read_text()


def test_a_baseline_stands_beside(finished, data, parsed):
    config = json.loads((finished.folder / "config.json").read_text())
    config["baseline"] = {"name": "text"}
    (finished.folder / "config.json").write_text(json.dumps(config))
    folder = finished.folder / "baseline"
    folder.mkdir()
    (folder / "metrics.json").write_text((finished.folder / "metrics.json").read_text())
    read = parsed(page.write(finished.folder, data).read_text())
    names = ["text: trained", "text: trained + augmented", "zero-shot", "trained"]
    assert [row[0] for row in read.table("percent")[1:5]] == names


def test_predictions_are_read_in_blocks(finished, monkeypatch):
    path = saved_predictions.path(finished.folder, 12)
    documents = np.array([0, 3, 4, 21, 49])
    monkeypatch.setattr(saved_predictions, "_BLOCK_BYTES", 4 * 30 * 7)  # seven documents
    found = saved_predictions.read(path, documents, 50)
    with np.load(path, allow_pickle=False) as whole:
        for row in ("plain", "augmented"):
            np.testing.assert_array_equal(found[row].ids, whole[f"{row}_ids"][documents])
            np.testing.assert_array_equal(found[row].scores, whole[f"{row}_scores"][documents])


def test_of_a_file_of_some_documents_these_are_found(finished, tmp_path):
    path, held = tmp_path / "0.npz", np.array([1, 4, 9, 30])
    evaluate.write_predictions(finished.zero_shot, path, held)
    found = saved_predictions.read(path, np.array([4, 30]), 50, scores=False)["plain"]
    np.testing.assert_array_equal(found.ids, finished.zero_shot.ids["plain"][[4, 30]])
    assert found.scores is None
    for asked in ([4, 31], [0, 4], [30, 49]):
        with pytest.raises(ValueError, match="it holds 4 documents, and not all 2 asked for"):
            saved_predictions.read(path, np.array(asked), 50)


@pytest.mark.parametrize("damage", ["cut", "pickle", "other data"])
def test_damaged_predictions_are_answered_in_one_line(finished, damage):
    path = saved_predictions.path(finished.folder, 12)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "pickle":
        objects = np.array([[object()]], object)
        with path.open("wb") as file:
            np.savez(file, plain_ids=objects, plain_scores=objects)
    with pytest.raises(ValueError, match=r"12\.npz: expected the predictions") as raised:
        saved_predictions.read(path, np.arange(5), 51 if damage == "other data" else 50)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "options", "ticks"),
    [
        ([0, 3], {}, ["0", "1", "2", "3"]),
        ([0.31, 0.77], {"percent": True}, ["30 %", "40 %", "50 %", "60 %", "70 %", "80 %"]),
        ([0.2, 0.4], {"percent": True, "zero": True}, ["0 %", "10 %", "20 %", "30 %", "40 %"]),
        ([2.0, 2.0], {}, ["2.00", "2.05", "2.10", "2.15", "2.20"]),
        ([-1.5, 1.5], {}, ["−2", "−1", "0", "1", "2"]),
        ([0, 1200, float("nan")], {}, ["0", "500", "1,000", "1,500"]),
        ([0, 2], {"whole": True}, ["0", "1", "2"]),
        ([], {}, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_axes_have_round_ticks_around_all_values(values, options, ticks):
    found = charts.axis(values, **options)
    assert [text.replace(charts.PERCENT, " %") for _, text in found.ticks] == ticks
    finite = [value for value in values if value == value]
    assert not finite or found.low <= min(finite) <= max(finite) <= found.high


def test_names_are_moved_apart():
    moved = charts.apart([10.0, 12.0, 40.0, 100.0], 0, 100, gap=13)
    assert moved == [10.0, 23.0, 40.0, 100.0]
    assert charts.apart([98.0, 99.0], 0, 100, gap=13) == [87.0, 100.0]


def test_no_drawing_library_is_needed(finished, data, monkeypatch):
    for name in ("PIL", "pyarrow", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    text = page.write(finished.folder, data, pictures=finished.folder).read_text()
    assert "pip install" in text and "<img" not in text
