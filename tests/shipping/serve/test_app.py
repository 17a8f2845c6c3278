"""The API of a served model: its answers, and what it says to everything else."""

import asyncio
import contextlib
import dataclasses
import gzip
import json
import re
import select
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax.monitoring
import numpy as np
import processes
import pytest

from xmc_jax.config import ServeConfig
from xmc_jax.shipping.predictor import Query
from xmc_jax.shipping.serve import bodies, guard, server, start
from xmc_jax.shipping.serve.batching import Batcher, Full


@pytest.fixture(scope="module")
def titles(served):
    return list(served.predictor.artifact.documents.texts)[:40]


def listed(answer, what="labels"):
    return [[(x["id"], x["text"], x["score"]) for x in r[what]] for r in answer["results"]]


# Answers


@pytest.mark.parametrize("ranking", ["auto", "plain", "augmented"])
@pytest.mark.parametrize("count", [1, 3])
def test_predictions_are_the_predictor_s(served, titles, ranking, count):
    """To the bit: JSON holds the shortest decimals of the same numbers."""
    asked = [{"text": text} for text in titles[:count]]
    status, answer = served.post("/v1/predict", {"queries": asked, "k": 7, "ranking": ranking})
    assert status == 200
    rows = served.service.config.rows
    scores, found, _ = served.predictor.rank(titles[:count], 10, ranking, rows)
    labels = served.predictor.artifact.labels
    expected = [
        [(labels.ids[row], labels.texts[row], score) for row, score in zip(*pair)]
        for pair in zip(found[:, :7].tolist(), scores[:, :7].tolist())
    ]
    assert listed(answer) == expected
    assert answer["ranking"] == ("augmented" if ranking == "auto" else ranking)
    if count == 1:  # the sizes of its blocks begin with one, too
        best = served.predictor.predict(titles[:1], 7, ranking)
        assert listed(answer) == [list(map(tuple, best[0]))]


def test_a_text_that_was_cut_is_marked(served, titles):
    asked = [{"text": titles[0]}, {"text": "word " * 30}]
    for path in ("predict", "neighbours"):
        _, answer = served.post(f"/v1/{path}", {"queries": asked})
        assert [result.get("cut") for result in answer["results"]] == [None, True]


def test_only_and_exclude(served, titles):
    labels = list(served.predictor.artifact.labels.ids)
    asked = [
        {"text": titles[0], "only": labels[5:12], "exclude": labels[6:8]},
        {"text": titles[0], "only": []},
        {"text": titles[0]},
    ]
    _, answer = served.post("/v1/predict", {"queries": asked, "k": 10})
    some, none, free = listed(answer)
    assert {name for name, _, _ in some} == set(labels[5:12]) - set(labels[6:8])
    assert none == [] and len(free) == 10
    query = Query(titles[0], only=labels[5:12], exclude=labels[6:8])
    expected = served.predictor.predict([query], 10)[0]
    assert [name for name, _, _ in some] == [best.id for best in expected]
    np.testing.assert_allclose(
        [score for _, _, score in some], [best.score for best in expected], atol=1e-6
    )


@pytest.mark.parametrize(
    "written", ["topic1|topic2", "['topic1', 'topic2']", [{"id": "topic1"}, " topic2"]]
)
def test_ids_are_written_as_in_files_of_documents(served, written):
    asked = [TEXT | {"only": written}, TEXT | {"only": ["topic1", "topic2"]}]
    _, answer = served.post("/v1/predict", {"queries": asked})
    first, second = listed(answer)
    assert first == second and len(first) == 2


def test_neighbours_are_the_predictor_s(served, titles):
    status, answer = served.post("/v1/neighbours", {"queries": [{"text": titles[3]}], "k": 4})
    assert status == 200
    expected = served.predictor.neighbours(titles[3:4], 10)[0][:4]
    assert listed(answer, "documents") == [list(map(tuple, expected))]
    nearest = answer["results"][0]["documents"][0]
    assert nearest["text"] == titles[3]  # itself
    documents = served.predictor.artifact.documents
    row = list(documents.ids).index(nearest["id"])
    first, end = documents.positives.indptr[row : row + 2]
    names = served.predictor.artifact.labels.ids
    expected = [names[i] for i in documents.positives.indices[first:end]]
    assert [label["id"] for label in nearest["labels"]] == expected


def test_concurrent_answers_are_those_of_one_after_the_other(served, titles):
    """Scores to rounding, which follows from the shape of a batch; so do places, but for ties."""
    asked = [{"queries": [{"text": text}], "k": 10} for text in titles]
    alone = [served.post("/v1/predict", body) for body in asked]
    before = served.service.metrics.text()
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda body: served.post("/v1/predict", body), asked))
    assert _batches(served.service.metrics.text()) - _batches(before) < len(asked)
    for (_, first), (status, second) in zip(alone, together):
        assert status == 200
        scores = [[score for _, _, score in listed(answer)[0]] for answer in (first, second)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)
        kept = np.array(scores[0]) > scores[0][-1] + 2e-5  # not tied with what was left out
        names = [
            {name for (name, _, _), k in zip(listed(answer)[0], kept) if k}
            for answer in (first, second)
        ]
        assert names[0] == names[1]


def _batches(metrics: bytes) -> float:
    lines = metrics.decode().splitlines()
    return next(float(x.split()[1]) for x in lines if x.startswith("xmc_batch_queries_count"))


def test_nothing_is_compiled_after_warming_up(served, titles):
    compiled = []

    def note(event, seconds, **about):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    generator = np.random.default_rng(0)
    labels = list(served.predictor.artifact.labels.ids)
    try:
        jax.jit(lambda x: x + 1.5)(np.zeros(3))
        assert compiled  # it would be seen
        compiled.clear()
        for number in range(30):
            asked = []
            for _ in range(generator.integers(1, 5)):
                words = " ".join(generator.choice(titles, 2)).split()
                asked.append({"text": " ".join(words[: generator.integers(1, len(words))])})
                if generator.random() < 0.3 and number % 3:
                    names = generator.choice(labels, generator.integers(0, 6))
                    asked[-1][("only", "exclude")[number % 2]] = names.tolist()
            body = {"queries": asked, "k": int(generator.integers(1, 11))}
            path = "/v1/predict" if number % 3 else "/v1/neighbours"
            if number % 3:
                body["ranking"] = ("plain", "augmented")[number % 2]
            assert served.post(path, body)[0] == 200
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == []


def test_labels_by_id(served):
    labels = served.predictor.artifact.labels
    status, _, body = served.ask("GET", f"/v1/labels/{labels.ids[3]}")
    assert status == 200 and json.loads(body) == {
        "id": labels.ids[3],
        "text": labels.texts[3],
        "image": None,
        "frequency": int(labels.frequency[3]),
    }
    for path in ("/v1/labels/nobody", "/v1/labels/a%2Fb", "/v1/labels/%00%ff", "/v1/labels/"):
        status, _, body = served.ask("GET", path)
        assert status == 404 and "\n" not in json.loads(body)["error"], path
    for path in ("/v1/labels/topic3/image", "/v1/documents/nobody/image"):
        status, _, body = served.ask("GET", path)
        assert status == 404 and "picture" in json.loads(body)["error"]


def test_info(served):
    _, _, body = served.ask("GET", "/v1/info")
    assert b"somebody" not in body and str(served.predictor.artifact.folder).encode() not in body
    info, artifact = json.loads(body), served.predictor.artifact
    assert (info["name"], info["digest"]) == ("topics", artifact.digest)
    assert (info["labels"], info["documents"]) == (len(artifact.labels), len(artifact.documents))
    assert info["rankings"] == ["augmented", "plain"]
    assert info["metrics"] == artifact.manifest["metrics"]
    assert info["limits"]["max_k"] == 10
    assert (
        not info["images"]["possible"]
        and info["images"]["reason"] == "the model was trained without"
    )
    assert set(info["examples"]) <= set(artifact.documents.texts)


# What is refused

TEXT = {"text": "word"}
QUERIES = {"queries": [TEXT]}


@pytest.mark.parametrize(
    "body, status, said",
    [
        (b"{", 400, "body: expected JSON, got: Expecting property name"),
        (b"\xff", 400, "body: expected JSON"),
        (b"[" * 5000, 413, "body: expected at most 1104 commas and brackets, got more"),
        (b"1" * 5000, 400, "body: expected JSON, got a number of too many digits"),
        ("{}".encode("utf-16"), 400, "body: expected JSON in UTF-8, got: "),
        (b'{"k": 1, "k": 2}', 422, "body: expected each field once, got 'k' twice"),
        ({str(i): 1 for i in range(17)}, 422, "body: expected at most 16 fields of an object"),
        (b"", 422, "body: expected a value, got none"),
        ([], 422, "body: expected an object, got a list of 0"),
        ({"queries": []}, 422, "queries: expected at least 1 item, got a list of 0"),
        ({"queries": [TEXT] * 5}, 422, "queries: expected at most 4 items, got a list of 5"),
        ({"queries": [{}]}, 422, "queries[0]: expected a text or an image, got neither"),
        ({"queries": [TEXT, {"text": " \n"}]}, 422, "queries[1]: expected a text or an image"),
        ({"queries": [{"text": 3}]}, 422, "queries[0].text: expected a valid string, got 3"),
        ({"queries": [{"text": "a" * 201}]}, 422, "queries[0].text: expected at most 200"),
        (b'{"queries": [{"text": "\\ud800"}]}', 422, "queries[0].text: expected a valid string"),
        (b'{"queries": [{"text": "a", "\\ud800": 1}]}', 422, "queries[0]: expected"),
        ({"queries": [TEXT], "k": 0}, 422, "k: expected greater than or equal to 1, got 0"),
        ({"queries": [TEXT], "k": 1.5}, 422, "k: expected a valid integer, got 1.5"),
        (b'{"queries": [{"text": "a"}], "k": NaN}', 422, "k: expected a valid integer, got nan"),
        ({"queries": [TEXT], "ranking": "best"}, 422, "ranking: expected 'auto', 'plain' or"),
        ({"queries": [TEXT | {"only": ["x"]}]}, 422, "queries[0].only[0]: expected the id of a"),
        ({"queries": [TEXT | {"only": [True]}]}, 422, "queries[0].only[0]: expected an id, a text"),
        ({"queries": [TEXT | {"exclude": "a|" * 101}]}, 422, "queries[0].exclude: expected a list"),
        (
            {"queries": [TEXT | {"exclude": ["topic1, topic2"]}]},
            422,
            "queries[0].exclude[0]: expected the id of a label, got 'topic1, topic2'; ',' "
            "separates 2 ids of labels here: give them as a list of ids, or as a text in which",
        ),
        (
            {"queries": [TEXT | {"exclude": ["topic1"] * 41}]},
            422,
            "queries[0].exclude: expected at",
        ),
        ({"queries": [TEXT | {"images": ["YQ=="]}]}, 422, "queries[0].images: expected none, got"),
        (b" " * 100_001, 413, "body: expected at most 100000 bytes, got 100001"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, int) else str(value),
)
def test_bad_requests_are_answered_in_one_line(served, body, status, said):
    found, headers, answer = served.ask("POST", "/v1/predict", body)
    error = json.loads(answer)
    assert found == status and set(error) == {"error"}
    assert error["error"].startswith(said), error
    assert "\n" not in error["error"] and len(error["error"]) < 300
    assert headers["content-type"] == "application/json"


def test_a_body_without_a_length_is_bounded_too(served):
    with socket.create_connection(("127.0.0.1", served.port), 30) as client:
        client.sendall(
            b"POST /v1/predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may not read it all
            for _ in range(100):
                client.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        answer = client.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer


def test_all_requests_together_are_bounded(served, titles):
    """Ten bodies are held for as long as they are not whole; the next is refused."""
    head = (
        b"POST /v1/predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 99999\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 30))
            for _ in range(11)
        ]
        for client in clients:
            client.sendall(head + b" " * 99_990)
        ready, _, _ = select.select(clients, [], [], 30)  # whichever was the last to be read
        answers = [client.recv(1 << 16) for client in ready]
    assert len(answers) == 1 and answers[0].startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in answers[0]
    # What they held is free again as soon as they are seen to have gone.
    processes.until(lambda: served.service.metrics.text().count(b"xmc_held_bytes 0.0\n") == 1)
    assert served.post("/v1/predict", {"queries": [{"text": titles[0]}]})[0] == 200


def test_a_full_queue_is_503_with_a_time_to_come_back(served, titles, monkeypatch):
    async def full(self, queries, kind):
        raise Full

    monkeypatch.setattr(Batcher, "answer", full)
    status, headers, body = served.ask("POST", "/v1/predict", {"queries": [TEXT]})
    assert (status, headers["retry-after"]) == (503, bodies.RETRY_AFTER)
    assert json.loads(body)["error"] == "server: too many queries wait; try again"


def test_what_takes_too_long_is_503(served, monkeypatch):
    async def never(self, queries, kind):
        await asyncio.Event().wait()

    config = dataclasses.replace(served.service.config, timeout=0.05)
    monkeypatch.setattr(Batcher, "answer", never)
    monkeypatch.setattr(served.service, "config", config)
    status, headers, body = served.ask("POST", "/v1/predict", {"queries": [TEXT]})
    assert (status, headers["retry-after"]) == (503, bodies.RETRY_AFTER)
    assert "not answered within 0.05 seconds" in json.loads(body)["error"]


def test_a_thread_that_hangs_is_told_to_who_asks_for_health(served, monkeypatch, caplog):
    """After `stuck_after` and at once, and no longer than it hangs; more is not taken meanwhile."""
    gate, embed = threading.Event(), served.predictor.embed_measured
    config = dataclasses.replace(served.service.config, stuck_after=0.3, timeout=20)
    monkeypatch.setattr(served.service, "config", config)
    monkeypatch.setattr(served.predictor, "embed_measured", lambda *a: gate.wait(60) and embed(*a))
    stuck = re.compile(
        r"server: stuck: the ranking thread has not finished a batch for \d+ seconds"
    )

    def health():
        return {served.ask("GET", path)[::2] for path in ("/healthz", "/readyz")}

    assert health() == {(200, b'{"status":"ready"}')}
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        first = pool.submit(served.post, "/v1/predict", {"queries": [TEXT]})
        processes.until(lambda: served.ask("GET", "/healthz")[0] == 503)
        assert 0.3 < time.monotonic() - started < 5
        for status, body in [*health(), served.ask("POST", "/v1/predict", QUERIES)[::2]]:
            assert status == 503 and stuck.fullmatch(json.loads(body)["error"])
        seconds = []
        for _ in range(10):  # the shortest, since others may use the machine
            started = time.monotonic()
            served.ask("GET", "/healthz")
            seconds.append(time.monotonic() - started)
        assert min(seconds) < 0.25
        gate.set()
        assert first.result()[0] == 200
    assert health() == {(200, b'{"status":"ready"}')}
    (line,) = [record.getMessage() for record in caplog.records if "stands at" in record.message]
    assert "it stands at wait (" in line and "\n" not in line


def test_who_hangs_up_is_not_waited_for(served, monkeypatch):
    cancelled = []

    async def never(self, queries, kind):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(queries[0].text)

    monkeypatch.setattr(Batcher, "answer", never)
    body = json.dumps({"queries": [TEXT]}).encode()
    client = socket.create_connection(("127.0.0.1", served.port), 30)
    client.sendall(
        b"POST /v1/predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )

    async def waiting() -> None:
        while not cancelled:
            await asyncio.sleep(0.01)

    client.close()
    served.call(asyncio.wait_for(waiting(), 30))
    assert cancelled == ["word"]


def test_other_types_are_refused(served):
    """A form of another site can send these without asking."""
    body = b'{"queries":[{"text":"a"}]}'
    status, _, body = served.ask("POST", "/v1/predict", body, content_type="text/plain")
    assert status == 415 and "application/json" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("127.0.0.1", 200),
        ("10.1.2.3:8000", 200),  # as Prometheus names a pod
        ("[fd00::1]:8000", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ],
)
def test_hosts(served, host, status):
    assert served.ask("GET", "/v1/info", host=host)[0] == status
    assert served.ask("GET", "/healthz", host=host)[0] == 200  # probes go by address


def test_every_answer_has_the_headers(served):
    asked = [
        ("GET", "/", None),
        ("GET", "/v1/info", None),
        ("GET", "/nothing", None),
        ("POST", "/healthz", None),
        ("POST", "/v1/predict", b"{"),
        ("GET", "/metrics", None),
    ]
    for method, path, body in asked:
        _, headers, _ = served.ask(method, path, body)
        for name, value in guard.HEADERS:
            assert headers[name.decode()] == value.decode(), path
        assert "server" not in headers or "uvicorn" not in headers["server"]
        assert "access-control-allow-origin" not in headers
    policy = dict(guard.HEADERS)[b"content-security-policy"].decode()
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy


def test_other_methods_and_paths(served):
    status, headers, body = served.ask("GET", "/v1/predict")
    assert (status, headers["allow"]) == (405, "POST")
    assert json.loads(body)["error"] == "/v1/predict: Method Not Allowed"
    status, headers, _ = served.ask("DELETE", "/v1/labels/topic1")
    assert (status, headers["allow"]) == (405, "GET, HEAD")
    status, headers, body = served.ask("POST", "/v1/predict/", {"queries": [TEXT]})
    assert (status, headers["content-type"]) == (404, "application/json")
    assert "location" not in headers  # of another path, at an address that a proxy may hide
    for path in ("/nothing", "/static/../app.py", "/static/app.py", "/docs", "/v1"):
        assert served.ask("GET", path)[0] == 404, path


@pytest.mark.parametrize("path", ["/", "/v1/labels/topic1", "/metrics"])
def test_head_is_get_without_its_content(served, path):
    (status, headers, body), (_, of_get, content) = (
        served.ask(method, path) for method in ("HEAD", "GET")
    )
    assert (status, body) == (200, b"") and content
    assert headers["content-type"] == of_get["content-type"]
    if path != "/metrics":  # what it says has changed
        assert headers["content-length"] == of_get["content-length"] == str(len(content))


def test_null_is_a_field_left_out(served):
    asked = {"queries": [TEXT | dict.fromkeys(("images", "only", "exclude"))]}
    _, expected = served.post("/v1/predict", {"queries": [TEXT]})
    assert served.post("/v1/predict", asked | {"k": None, "ranking": None}) == (200, expected)


@pytest.mark.parametrize(
    "encoding, packed, status, said",
    [
        ("gzip", gzip.compress, 200, ""),
        ("gzip", bytes, 400, "body: expected gzip, as content-encoding says, got something else"),
        ("gzip", lambda body: gzip.compress(body)[:-9], 400, "body: expected gzip, as content-"),
        ("gzip", lambda body: 2 * gzip.compress(body), 400, "body: expected gzip, as content-"),
        ("gzip", lambda body: gzip.compress(b" " * 10**8), 413, "body: expected at most 100000 b"),
        ("br", bytes, 415, "content-encoding: expected gzip or none, got 'br'"),
    ],
)
def test_packed_bodies(served, encoding, packed, status, said):
    body = packed(json.dumps({"queries": [TEXT]}).encode())
    found, headers, answer = served.ask("POST", "/v1/predict", body, content_encoding=encoding)
    assert found == status and json.loads(answer).get("error", "").startswith(said)
    assert headers.get("accept-encoding") == ("gzip" if status == 415 else None)
    processes.until(lambda: b"xmc_held_bytes 0.0\n" in served.service.metrics.text())


def test_training_documents_are_shown_only_where_they_may_be(served, titles, monkeypatch):
    config = dataclasses.replace(served.service.config, show_documents=False)
    monkeypatch.setattr(served.service, "config", config)
    for path, body in (("/v1/neighbours", {"queries": [TEXT]}), ("/v1/documents/a/image", None)):
        status, _, answer = served.ask("GET" if body is None else "POST", path, body)
        assert status == 403 and "--serve.show_documents" in json.loads(answer)["error"]
    _, _, body = served.ask("GET", "/v1/info")
    assert (json.loads(body)["shows_documents"], json.loads(body)["examples"]) == (False, [])
    assert not any(title in body.decode() for title in titles)
    assert served.post("/v1/predict", {"queries": [TEXT]})[0] == 200


@pytest.mark.parametrize("host, shown", [("localhost", True), ("::1", True), ("0.0.0.0", False)])
def test_who_listens_to_other_machines_shows_no_training_documents(host, shown):
    for given, expected in ((None, shown), (True, True), (False, False)):
        config = ServeConfig(host=host, port=0, show_documents=given)
        with server._bound(config) as bound:
            assert server._with_documents(config, bound).show_documents == expected


def test_the_page_is_kept_by_its_tag(served):
    status, headers, body = served.ask("GET", "/static/app.js")
    assert status == 200 and headers["content-type"].startswith("text/javascript") and body
    assert served.ask("GET", "/static/app.js", if_none_match=headers["etag"])[0] == 304


def test_metrics(served, titles):
    def read():
        lines = served.ask("GET", "/metrics")[2].decode().splitlines()
        return {x.rpartition(" ")[0]: float(x.rpartition(" ")[2]) for x in lines if x[0] != "#"}

    before = read()
    served.post("/v1/predict", {"queries": [{"text": t} for t in titles[:3]]})
    served.ask("GET", "/whatever/is/asked")
    after = read()

    def more(name):
        return after[name] - before.get(name, 0)

    assert more('xmc_requests_total{route="/v1/predict",status="200"}') == 1
    assert more('xmc_requests_total{route="other",status="404"}') == 1
    assert more('xmc_request_seconds_count{route="/v1/predict"}') == 1
    assert (more("xmc_batch_queries_count"), more("xmc_batch_queries_sum")) == (1, 3)
    assert after["xmc_queue_queries"] == after["xmc_held_bytes"] == 0
    assert not any("whatever" in name for name in after)


# Connections


def test_a_head_that_does_not_end_is_refused(served):
    with socket.create_connection(("127.0.0.1", served.port), 30) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        answer = b""
        with contextlib.suppress(ConnectionError):  # it has hung up, with more to read
            while not select.select([client], [], [], 0)[0]:
                client.sendall(b"x: " + b"y" * 1000 + b"\r\n")
            answer = client.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 431 ") or answer == b""


def test_a_body_that_does_not_come_is_408(served, monkeypatch):
    asgi = served._server.config.loaded_app
    monkeypatch.setattr(asgi, "config", dataclasses.replace(asgi.config, read_timeout=0.05))
    with socket.create_connection(("127.0.0.1", served.port), 30) as client:
        client.sendall(
            b"POST /v1/predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


# What keeps a server from starting


def test_mistakes_are_one_line(exported, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port}: expected an address"):
            start.run(lambda: pytest.fail("a model was opened"), ServeConfig(port=port))
    with pytest.raises(
        ValueError, match=r"expected artifact\.json of an exported model, found none"
    ):
        start.run(lambda: tmp_path, ServeConfig(port=0))
    monkeypatch.delitem(sys.modules, "xmc_jax.shipping.serve.server")
    monkeypatch.delattr("xmc_jax.shipping.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r'found no uvicorn; install it: .*"\.\[serve\]"'):
        start.run(lambda: exported, ServeConfig())
