"""benchmarks/loss_blocks.py, on little."""

import pytest

from benchmarks import loss_blocks


@pytest.mark.slow
def test_blocks_take_less_memory_and_more_products(tmp_path):
    output = tmp_path / "results.json"
    small = ("--batches=128", "--only_memory=64", "--blocks=8", "--width=8", "--steps=1")
    rows = loss_blocks.main([*small, f"--output={output}"])["results"]
    assert output.exists()
    assert [(row["kind"][:6], row["batch"], row["blocks"]) for row in rows] == [
        (kind, batch, blocks)
        for kind in ("margin", "decoup")
        for batch, blocks in ((128, 1), (128, 8), (64, 1), (64, 1))
    ]
    whole, blocks, *_ = rows
    assert (whole["products"], blocks["products"]) == (6, 9)
    assert 0 < blocks["memory"] < whole["memory"]
    assert whole["time"] == 1 and len(whole["seconds"]) == 1 and blocks["time"] > 0
