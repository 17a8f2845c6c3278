"""benchmarks.serve asks as it says, and counts what goes wrong."""

import asyncio
import os

from benchmarks import serve


def test_clients_ask_again_until_they_end(served):
    texts = list(served.predictor.artifact.documents.texts)[:12]
    requests = [serve._request(text) for text in texts]
    before = served.service.metrics.text()
    answers = asyncio.run(serve.load(served.port, requests, 3, 0.5))
    after = served.service.metrics.text()
    assert len(answers) > 3 and all(right for _, _, right in answers)
    assert all(0 < seconds < 60 for _, seconds, _ in answers)

    def count(metrics: bytes) -> float:
        name = b'xmc_requests_total{route="/v1/predict",status="200"} '
        lines = [line for line in metrics.splitlines() if line.startswith(name)]
        return float(lines[0].rpartition(b" ")[2]) if lines else 0.0

    assert count(after) - count(before) == len(answers)
    counted = serve._counted(served.port, os.getpid())
    assert counted["queries"] >= counted["batches"] > 0 and counted["cpu"] > 0


def test_wrong_answers_are_errors(served):
    requests = [serve._request("word"), serve._request("")]  # the second is refused
    answers = asyncio.run(serve.load(served.port, requests, 2, 0.2))
    assert {right for _, _, right in answers} == {True, False}
