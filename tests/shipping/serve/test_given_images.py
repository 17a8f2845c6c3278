"""Pictures in queries and in answers."""

import base64
import io
import json
import urllib.parse

import jax.monitoring
import numpy as np
import pytest

pytest.importorskip("skimage", reason='needs the extra "vision"')
import PIL.Image

from xmc_jax.images import decoding
from xmc_jax.shipping.predictor import Query

pytestmark = pytest.mark.slow


def file(kind="PNG", size=(32, 24), colour=(200, 30, 60)) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def asked(*pictures, text="toy"):
    return {"queries": [{"text": text, "images": list(pictures)}], "k": 5}


def test_pictures_rank_as_the_predictor_does(products):
    red, blue = file(), file("JPEG", (60, 80), (20, 40, 220))
    status, answer = products.post("/v1/predict", asked(encoded(red), encoded(blue)))
    assert status == 200
    query = Query("toy", [red, blue])
    expected = products.predictor.predict([query], 5)[0]
    found = answer["results"][0]["labels"]
    assert [(x["id"], x["score"]) for x in found] == [(x.id, x.score) for x in expected]
    _, without = products.post("/v1/predict", asked())
    assert without["results"] != answer["results"]
    _, named = products.post(
        "/v1/predict",
        asked(f"data:image/png;base64,{encoded(red)}", f"data:image/jpeg;base64,{encoded(blue)}"),
    )
    assert named == answer
    wrapped = [base64.encodebytes(picture).decode() for picture in (red, blue)]
    assert "\n" in wrapped[0].strip()
    assert products.post("/v1/predict", asked(*wrapped))[1] == answer
    _, alone = products.post("/v1/predict", {"queries": [{"images": [encoded(red)]}], "k": 5})
    assert alone["results"][0]["labels"]


def test_nothing_is_compiled_after_warming_up(products):
    compiled = []

    def note(event, seconds, **about):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for count in range(3):
            for text in ("", "toy", "a red wooden toy car in a box " * 3):
                if text or count:
                    body = asked(*[encoded(file())] * count, text=text)
                    assert products.post("/v1/predict", body)[0] == 200
                    assert products.post("/v1/neighbours", body)[0] == 200
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == []


@pytest.mark.parametrize(
    "picture, said",
    [
        ("http://127.0.0.1/x.png", "expected an image file in base64 or as a data: URL, got 'http"),
        ("/etc/passwd", "expected base64"),
        ("YWJj", "image: expected one of JPEG, PNG, WEBP, GIF, BMP, TIFF, found 3 bytes"),
        ("", "image: expected one of"),
        (encoded(file()[:60]), "image: expected a whole image"),
        (encoded(file(size=(70_000, 1))), "image: expected 1 to"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_pictures_are_refused_in_one_line(products, picture, said):
    status, answer = products.post("/v1/predict", asked(encoded(file()), picture))
    assert status == 422
    assert answer["error"].startswith(f"queries[0].images[1]: {said}"), answer
    assert "\n" not in answer["error"]


def test_too_many_and_too_large(products):
    status, answer = products.post("/v1/predict", asked(*[encoded(file())] * 3))
    assert status == 422 and answer["error"] == "queries[0].images: expected at most 2, got 3"
    wide = file(size=(5000, 4000))  # 20 million pixels
    assert 1.4 * len(wide) < products.service.config.max_body
    status, answer = products.post("/v1/neighbours", asked(encoded(wide)))
    assert status == 422 and "pixels" in answer["error"]


def test_pictures_of_labels_and_documents(products):
    """Answers name them by a path, where they are small WebP files of what the item shows."""
    artifact = products.predictor.artifact
    _, answer = products.post("/v1/predict", asked(text="puzzle") | {"k": 10})
    ranked = answer["results"][0]["labels"]
    have = {name: name in artifact.thumbnails["labels"] for name in artifact.labels.ids}
    assert 0 < sum(have.values()) < len(have)
    for label in ranked:
        assert (label["image"] is not None) == have[label["id"]]
    shown = next(label for label in ranked if label["image"])
    assert shown["image"] == f"v1/labels/{urllib.parse.quote(shown['id'], safe='')}/image"
    status, headers, data = products.ask("GET", f"/{shown['image']}")
    assert (status, headers["content-type"]) == (200, "image/webp")
    picture = PIL.Image.open(io.BytesIO(data))
    assert picture.format == "WEBP" and max(picture.size) <= 96
    tag = headers["etag"]
    assert products.ask("GET", f"/{shown['image']}", if_none_match=tag)[0] == 304
    status, _, body = products.ask("GET", f"/v1/labels/{shown['id']}")
    assert json.loads(body)["image"] == shown["image"]
    bare = next(name for name, there in have.items() if not there)
    assert products.ask("GET", f"/v1/labels/{bare}/image")[0] == 404
    _, answer = products.post("/v1/neighbours", asked(text="puzzle"))
    near = [x for x in answer["results"][0]["documents"] if x["image"]]
    assert products.ask("GET", f"/{near[0]['image']}")[1]["content-type"] == "image/webp"


def test_a_thumbnail_is_the_picture_made_small():
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (6, 8, 3), np.uint8).repeat(50, 0).repeat(50, 1)
    whole = PIL.Image.fromarray(blocks)
    small = PIL.Image.open(io.BytesIO(decoding.thumbnail(whole, 96)))
    assert small.size == (96, 72)
    # The middle of each block is of its colour; at its edges blocks mix.
    middles = np.asarray(small.convert("RGB"), int)[6::12, 6::12]
    assert np.abs(middles - blocks[25::50, 25::50]).mean() < 12
    assert PIL.Image.open(io.BytesIO(decoding.thumbnail(whole.resize((20, 10)), 96))).size == (
        20,
        10,
    )
