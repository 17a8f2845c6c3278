"""What a request says of its own length is a number or refused, whatever server is in front."""

import asyncio

import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')

import valid_inputs


@pytest.mark.parametrize(
    "length, status",
    [(b"-1", 400), (b"", 400), ("²".encode(), 400), (b"9" * 5000, 413)],
)
def test_lengths(length, status):
    asked = valid_inputs.Asked()
    found, answer = asyncio.run(asked.post(b"{}", (b"content-length", length)))
    assert found == status and answer.count(b"\n") == 0
