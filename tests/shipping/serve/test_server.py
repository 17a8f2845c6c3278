"""The process of --mode=serve: it starts, reloads, drains and ends; its mistakes in one line."""

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import threading

import processes
import pytest

from xmc_jax.shipping.serve import service

SMALL = ("--serve.max_batch=1", "--serve.max_k=10", "--serve.max_exclude=0", "--serve.port=0")

QUERY = json.dumps({"queries": [{"text": "word"}], "k": 3})


def flags(folder):
    return ["-m", "xmc_jax.main", "--mode=serve", f"--artifact={folder}", *SMALL]


def said(group):
    return group.output(0, "err")


def ready(group) -> int:
    """Its port."""
    processes.until(lambda: "ready at" in said(group), 120)
    return int(re.search(r"ready at http://127\.0\.0\.1:(\d+)", said(group))[1])


def post(port, text):
    client = http.client.HTTPConnection("127.0.0.1", port, 60)
    body = json.dumps({"queries": [{"text": text}], "k": 3})
    client.request("POST", "/v1/predict", body, {"content-type": "application/json"})
    answer = client.getresponse()
    found = answer.status, json.loads(answer.read())
    client.close()
    return found


def get(port, path):
    client = http.client.HTTPConnection("127.0.0.1", port, 60)
    client.request("GET", path)
    answer = client.getresponse()
    found = answer.status, json.loads(answer.read())
    client.close()
    return found


@pytest.mark.slow
def test_a_server_s_life(exported, tmp_path):
    """Ready; the same, a damaged and another artifact by SIGHUP; requests drained by SIGTERM."""
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    with processes.started(1, flags(folder)) as group:
        processes.until(lambda: "listens at" in said(group), 120)
        port = int(re.search(r"listens at http://127\.0\.0\.1:(\d+)", said(group))[1])
        assert get(port, "/healthz")[0] == 200
        assert ready(group) == port
        assert get(port, "/readyz") == (200, {"status": "ready"})
        status, first = post(port, "word")
        assert status == 200

        os.kill(group.processes[0].pid, signal.SIGHUP)
        processes.until(lambda: ": unchanged, " in said(group))

        texts = folder / "labels" / "texts.utf8.npy"
        whole = texts.read_bytes()
        texts.write_bytes(whole[:-1])
        os.kill(group.processes[0].pid, signal.SIGHUP)
        processes.until(lambda: "the model stays as it was" in said(group))
        line = next(x for x in said(group).splitlines() if "stays as it was" in x)
        assert "texts.utf8.npy: expected" in line
        assert post(port, "word") == (200, first)
        texts.write_bytes(whole)

        manifest = json.loads((folder / "artifact.json").read_text())
        (folder / "artifact.json").write_text(json.dumps(manifest | {"name": "other"}))
        before = get(port, "/v1/info")[1]["digest"]
        os.kill(group.processes[0].pid, signal.SIGHUP)
        processes.until(lambda: ": replaced, " in said(group), 120)
        info = get(port, "/v1/info")[1]
        assert info["name"] == "other" and info["digest"] != before
        assert post(port, "word") == (200, first)

        # A request that is being sent when the end comes is answered.
        body = json.dumps({"queries": [{"text": "word"}], "k": 3}).encode()
        client = socket.create_connection(("127.0.0.1", port), 60)
        client.sendall(
            b"POST /v1/predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body[:10])
        )
        processes.until(lambda: b"xmc_held_bytes 10.0" in metrics(port))
        os.kill(group.processes[0].pid, signal.SIGTERM)
        processes.until(lambda: "ending, since there was SIGTERM" in said(group))
        client.sendall(body[10:])
        answer = b""
        while part := client.recv(1 << 16):
            answer += part
        client.close()
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503") or json.loads(content) == first
        assert head.startswith(b"HTTP/1.1 200"), answer
        (done,) = group.wait(60)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def metrics(port):
    client = http.client.HTTPConnection("127.0.0.1", port, 60)
    client.request("GET", "/metrics")
    return client.getresponse().read()


@pytest.mark.slow
def test_sigterm_ends_it_while_it_warms_up(exported):
    with processes.started(1, flags(exported)) as group:
        processes.until(lambda: "listens at" in said(group), 120)
        port = int(re.search(r"listens at http://127\.0\.0\.1:(\d+)", said(group))[1])
        if get(port, "/readyz")[0] == 503:
            assert post(port, "word") == (503, {"error": "server: starting; try again"})
        os.kill(group.processes[0].pid, signal.SIGTERM)
        (done,) = group.wait(30)
    assert done.returncode == 0, done.stderr


_HANGS = """
import pathlib, sys, time
from absl import logging
from xmc_jax.shipping.predictor import Predictor
from xmc_jax.shipping.serve import server, service
from xmc_jax.config import ServeConfig
logging.set_verbosity(logging.INFO)
service.warm_up = lambda predictor, config: None
Predictor.embed_measured = lambda *arguments: time.sleep(1000)
server._LAST = 1
config = ServeConfig(port=0, stuck_after=0.2, drain=1)
server.run(lambda: pathlib.Path(sys.argv[1]), config)
"""


@pytest.mark.slow
def test_sigterm_ends_it_while_its_thread_hangs(exported):
    with processes.started(1, ["-c", _HANGS, str(exported)]) as group:
        port = ready(group)
        client = http.client.HTTPConnection("127.0.0.1", port, 60)
        client.request("POST", "/v1/predict", QUERY, {"content-type": "application/json"})
        processes.until(lambda: get(port, "/healthz")[0] == 503)
        os.kill(group.processes[0].pid, signal.SIGTERM)
        (done,) = group.wait(10)
    assert done.returncode == 1
    assert re.search(r"it stands at <lambda> \(<string>:\d+\) < ranked \(", done.stderr)
    assert "the ranking thread did not end within 1 s" in done.stderr


def test_what_takes_long_does_not_keep_a_process():
    """A model that is warmed up in a thread, when the end comes; errors come through."""

    async def main() -> None:
        with pytest.raises(ValueError, match="broken"):
            await service.in_thread(int, "broken")
        assert await service.in_thread(divmod, 7, 3) == (2, 1)
        waiting = asyncio.ensure_future(service.in_thread(threading.Event().wait))
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(main())  # ends, though the thread does not
