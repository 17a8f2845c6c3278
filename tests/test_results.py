"""benchmarks/results: every file says what was measured, with what, where and when."""

import datetime
import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_says_where_it_is_from(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (FOLDER.parent / f"{content['benchmark']}.py").exists()
    assert isinstance(content["settings"], dict)
    assert content["results"]
    assert content["processor"] and content["cores"] >= 1 and content["python"]
    assert all(content["versions"].values())
    datetime.date.fromisoformat(content["date"])
    assert len(content["commit"]) == 40
    known = {"processor", "cores", "python", "versions", "date", "commit", "device", "model"}
    assert set(content) <= known | {"benchmark", "settings", "results"}
