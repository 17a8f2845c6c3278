"""Requests in one batch: each gets its own answer, fails alone, and is bounded."""

import asyncio
import threading
import time
import types

import numpy as np
import pytest

from xmc_jax.config import ServeConfig
from xmc_jax.shipping.predictor import Query
from xmc_jax.shipping.serve import batching
from xmc_jax.shipping.serve.batching import Batcher, Full
from xmc_jax.shipping.serve.model import AUGMENTED, NEIGHBOURS, PLAIN

CONFIG = ServeConfig(max_batch=4, max_queries=4, queue=8, max_k=3)


class Predictor:
    """Embeds a text as its number; what is found follows from it. `BAD` is refused.

    Attributes:
        batches: the texts of each.
        gate: it ranks only while this is set.
        entered: set while it ranks.
    """

    def __init__(self, add: int = 0):
        self.batches: list[list[str]] = []
        self.gate, self.entered, self._add = threading.Event(), threading.Event(), add
        self.gate.set()

    def embed_measured(self, queries, rows):
        self.entered.set()
        assert self.gate.wait(30)
        texts = [query.text for query in queries]
        if "BAD" in texts:
            raise ValueError(f"item {texts.index('BAD')}: bad")
        if "BROKEN" in texts:
            raise RuntimeError("broken")
        self.batches.append(texts)
        vectors = np.array([[float(text)] for text in texts], np.float32)
        return vectors, vectors[:, 0] > 99

    def rank_embedded(self, embedded, queries, k, kind, rows):
        assert [float(query.text) for query in queries] == embedded[:, 0].tolist()
        base = embedded + self._add + (1000 if kind == AUGMENTED else 0)
        return -base - np.arange(k, dtype=np.float32), (base + np.arange(k)).astype(np.int32)

    def neighbours_embedded(self, embedded, k, rows):
        base = embedded + 2000
        return -base - np.arange(k, dtype=np.float32), (base + np.arange(k)).astype(np.int32)


def model_of(predictor: Predictor) -> types.SimpleNamespace:
    return types.SimpleNamespace(predictor=predictor)


def queries(*texts) -> list[Query]:
    return [Query(str(text)) for text in texts]


async def held_back(batcher, predictor, *asked) -> list[asyncio.Task]:
    """Tasks of requests that wait together, behind one that is being ranked: the first."""
    predictor.gate.clear()
    predictor.entered.clear()
    tasks = [asyncio.ensure_future(batcher.answer(queries(0), PLAIN))]
    await asyncio.to_thread(predictor.entered.wait, 30)
    tasks += [asyncio.ensure_future(batcher.answer(q, kind)) for q, kind in asked]
    await asyncio.sleep(0)  # each comes as far as it gets
    return tasks


def run(scenario, config=CONFIG):
    """Runs `scenario(batcher, predictor)` in a loop of its own."""

    async def main():
        predictor, observed = Predictor(), []
        batcher = Batcher(model_of(predictor), config, lambda n, seconds: observed.append(n))
        try:
            return await asyncio.wait_for(scenario(batcher, predictor), 60), predictor, observed
        finally:
            predictor.gate.set()
            await batcher.close()

    return asyncio.run(main())


def test_each_request_gets_its_own_answer():
    async def scenario(batcher, predictor):
        tasks = await held_back(
            batcher,
            predictor,
            (queries(7), PLAIN),
            (queries(3, 9), AUGMENTED),
            (queries(5), NEIGHBOURS),
        )
        predictor.gate.set()
        return await asyncio.gather(*tasks)

    found, predictor, observed = run(scenario)
    assert predictor.batches == [["0"], ["7", "3", "9", "5"]]
    assert observed == [1, 4]
    assert [answer.rows.tolist() for answer in found] == [
        [[0, 1, 2]],
        [[7, 8, 9]],
        [[1003, 1004, 1005], [1009, 1010, 1011]],
        [[2005, 2006, 2007]],
    ]
    for answer in found:
        np.testing.assert_array_equal(answer.scores, -answer.rows.astype(np.float32))


def test_a_request_is_never_torn_and_a_batch_has_its_limit():
    async def scenario(batcher, predictor):
        tasks = await held_back(
            batcher, predictor, *((queries(*range(n)), PLAIN) for n in (3, 2, 2, 1))
        )
        predictor.gate.set()
        await asyncio.gather(*tasks)

    _, predictor, _ = run(scenario)
    assert [len(batch) for batch in predictor.batches] == [1, 3, 4, 1]


def test_a_request_fails_alone():
    async def scenario(batcher, predictor):
        tasks = await held_back(
            batcher, predictor, (queries(1), PLAIN), (queries("BAD"), PLAIN), (queries(2), PLAIN)
        )
        predictor.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    (_, first, bad, second), predictor, _ = run(scenario)
    assert isinstance(bad, ValueError) and str(bad) == "item 0: bad"
    assert (first.rows[0, 0], second.rows[0, 0]) == (1, 2)
    assert predictor.batches[1:] == [["1"], ["2"]]


def test_what_breaks_is_answered_and_the_thread_goes_on():
    async def scenario(batcher, predictor):
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.answer(queries("BROKEN"), PLAIN)
        return await batcher.answer(queries(4), PLAIN)

    found, _, _ = run(scenario)
    assert found.rows[0, 0] == 4


def test_a_full_queue_refuses_and_takes_again():
    async def scenario(batcher, predictor):
        tasks = await held_back(batcher, predictor, *[(queries(1, 2, 3, 4), PLAIN)] * 2)
        assert batcher.waiting == 8
        with pytest.raises(Full):
            await batcher.answer(queries(5), PLAIN)
        predictor.gate.set()
        await asyncio.gather(*tasks)
        assert batcher.waiting == 0
        return await batcher.answer(queries(5), PLAIN)

    found, _, _ = run(scenario)
    assert found.rows[0, 0] == 5


def test_who_has_gone_is_not_ranked():
    async def scenario(batcher, predictor):
        tasks = await held_back(batcher, predictor, (queries(1), PLAIN), (queries(2), PLAIN))
        tasks[1].cancel()
        await asyncio.sleep(0)
        predictor.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    (_, gone, found), predictor, _ = run(scenario)
    assert isinstance(gone, asyncio.CancelledError)
    assert found.rows[0, 0] == 2 and predictor.batches == [["0"], ["2"]]


def test_how_long_the_thread_is_at_it(monkeypatch):
    """Since a batch was begun, or a query waits for a thread that is no more; else 0."""

    async def scenario(batcher, predictor):
        assert batcher.stalled() == 0
        tasks = await held_back(batcher, predictor, (queries(1), PLAIN))
        first = batcher.stalled()
        assert 0 < first < batcher.stalled() < 30
        assert batcher.position().startswith("wait (") and "embed_measured (" in batcher.position()
        assert not await batcher.close(0.01)
        predictor.gate.set()
        await asyncio.gather(*tasks)
        assert await batcher.close() and batcher.position() == ""

    run(scenario)


def test_closing_answers_what_waits():
    async def scenario(batcher, predictor):
        tasks = await held_back(batcher, predictor, *((queries(n), PLAIN) for n in range(7)))
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await batcher.answer(queries(9), PLAIN)
        predictor.gate.set()
        await closing
        return await asyncio.gather(*tasks)

    found, _, _ = run(scenario)
    assert [answer.rows[0, 0] for answer in found[1:]] == list(range(7))


def test_another_model_from_the_next_batch_on():
    async def scenario(batcher, predictor):
        other = model_of(Predictor(add=100))
        tasks = await held_back(batcher, predictor, (queries(1), PLAIN))
        batcher.replace(other)
        predictor.gate.set()
        first, second = await asyncio.gather(*tasks)
        assert (first.model.predictor, second.model) == (predictor, other)
        return second

    found, _, _ = run(scenario)
    assert found.rows[0, 0] == 101


def test_a_batch_waits_for_those_who_have_just_been_answered(monkeypatch):
    """While one was ranked another came; who got the answer asks again, and is waited for."""
    monkeypatch.setattr(batching, "_WAITED", 1e6)

    async def scenario(batcher, predictor):
        first, second = await held_back(batcher, predictor, (queries(1), PLAIN))
        predictor.gate.set()
        await first
        await asyncio.gather(second, batcher.answer(queries(2), PLAIN))

    config = ServeConfig(max_batch=4, max_queries=4, queue=8, max_k=3, max_wait_ms=1000)
    _, predictor, _ = run(scenario, config)
    assert predictor.batches == [["0"], ["1", "2"]]


def test_a_lone_request_does_not_wait(monkeypatch):
    monkeypatch.setattr(batching, "_WAITED", 1e6)

    async def scenario(batcher, predictor):
        started = time.monotonic()
        for _ in range(5):
            await batcher.answer(queries(1, 2), PLAIN)
        return time.monotonic() - started

    config = ServeConfig(max_batch=4, max_queries=4, queue=8, max_k=3, max_wait_ms=1000)
    seconds, _, _ = run(scenario, config)
    assert seconds < 1  # each would have waited for a second


def test_warming_up_says_how_far_it_is(monkeypatch, caplog):
    """At most every few seconds, so that a log is not filled; then how long it took."""

    class Compiles:
        def warm_up(self, k, rows, exclude, neighbours, progress):
            for done in range(4):
                progress(done, 3)

    caplog.set_level("INFO")
    batching.warm_up(Compiles(), CONFIG)
    assert [x.getMessage() for x in caplog.records] == ["warmed up: 3 programs in 0 s"]
    monkeypatch.setattr(batching, "_EVERY", 0)
    batching.warm_up(Compiles(), CONFIG)
    lines = [record.getMessage() for record in caplog.records[1:]]
    assert lines[:-1] == [f"warming up: {done} of 3 programs" for done in range(3)]
