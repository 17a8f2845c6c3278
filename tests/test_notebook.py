"""The notebook runs from top to bottom, with the small recipe."""

import json
import os
import pathlib

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


@pytest.mark.scale
def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("XMC_JAX_CONFIG", "configs/vixml.py:tiny")
    monkeypatch.setenv("XMC_JAX_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("XLA_FLAGS")  # one device: eight on few cores train slowly
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()  # raises at the first error of a cell
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    printed = ["".join(o.get("text", "") for o in cell.outputs) for cell in cells]
    of_training = next(text for text in printed if "trained + augmented" in text)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"{100 * found['augmented']['P@1']:.2f}" in of_training
    assert any("1 label added" in text for text in printed)
    assert (tmp_path / "run" / "report.html").is_file()
    ranked = (tmp_path / "run" / "ranked.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["labels"]) for line in ranked] == [3, 3, 3]
    assert os.path.isdir(tmp_path / "run" / "export")


def test_is_committed_without_what_it_printed():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
