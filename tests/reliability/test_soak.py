"""A server for ten minutes: right answers, no failures, no growth, whatever else it is asked."""

import http.client
import json
import os
import pathlib
import random
import re
import shutil
import signal
import threading
import time

import processes
import pytest
from served import read, write

pytestmark = pytest.mark.usefixtures("optimized")
SECONDS, CLIENTS = 600, 8
K = 3
BROKEN = [  # request line's path, headers beyond the usual, body; none is a valid question
    ("/v1/predict", {}, b""),
    ("/v1/predict", {}, b"{"),
    ("/v1/predict", {}, b"[" * 50_000),
    ("/v1/predict", {}, b'{"queries": []}'),
    ("/v1/predict", {}, b'{"queries": [{"text": 3}]}'),
    ("/v1/predict", {}, b'{"queries": [{"text": "x"}], "k": -1}'),
    ("/v1/predict", {}, b'{"queries": [{"text": "x"}], "k": 1e400}'),
    ("/v1/predict", {}, b'{"queries": [{"text": "\xff\xfe"}]}'),
    ("/v1/predict", {"content-type": "text/plain"}, b'{"queries": [{"text": "x"}]}'),
    ("/v1/predict", {}, b'{"queries": [{"text": "' + b"x" * 300_000 + b'"}]}'),
    ("/v1/nothing", {}, b"{}"),
    ("/../../etc/passwd", {}, b"{}"),
]


@pytest.fixture(scope="module")
def exported(topics, backbone, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("soak") / "export"
    shutil.copytree(backbone, folder)
    write(folder, *(read(topics / f"{name}.json.gz") for name in ("lbl", "trn")))
    return folder


def ask(client: http.client.HTTPConnection, path: str, headers: dict, body: bytes):
    client.request("POST", path, body, {"content-type": "application/json"} | headers)
    answer = client.getresponse()
    return answer.status, answer.read()


def question(text: str) -> bytes:
    return json.dumps({"queries": [{"text": text}], "k": K}).encode()


class Client(threading.Thread):
    """Asks valid and broken questions in turns, and remembers what was wrong with the answers."""

    def __init__(self, port: int, seed: int, expected: dict[str, list], end: threading.Event):
        super().__init__(daemon=True)
        self._port, self._random, self._expected, self._end = (
            port,
            random.Random(seed),
            expected,
            end,
        )
        self.valid, self.broken, self.ended = 0, 0, False
        self.wrong: list[str] = []

    def run(self) -> None:
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        while not self._end.is_set():
            if self._random.random() < 0.7:
                text = self._random.choice(list(self._expected))
                status, body = ask(client, "/v1/predict", {}, question(text))
                self.valid += 1
                if status != 200 or not _same(_labels(body), self._expected[text]):
                    self.wrong.append(f"{text}: {status} {body[:200]!r}")
            else:
                broken = self._random.choice(BROKEN)
                try:
                    status, body = ask(client, *broken)
                except ConnectionError:  # it does not read a body to its end that is too long
                    client.close()
                    status, body = 400, b""
                self.broken += 1
                if not 400 <= status < 500:
                    self.wrong.append(f"{broken[0]} {broken[2][:50]!r}: {status} {body[:200]!r}")
        client.close()
        self.ended = True


def _labels(body: bytes) -> list[tuple[str, float]]:
    """Ids and scores."""
    (result,) = json.loads(body)["results"]
    return [(label["id"], label["score"]) for label in result["labels"]]


def _same(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> bool:
    """The same labels, and scores but for what depends on who else is in a batch."""
    if [uid for uid, _ in found] != [uid for uid, _ in expected]:
        return False
    return all(abs(a - b) < 1e-5 for (_, a), (_, b) in zip(found, expected))


def resident(pid: int) -> int:
    """KiB of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


@pytest.mark.reliability
def test_ten_minutes(exported, topics, figures):
    flags = ["-m", "xmc_jax.main", "--mode=serve", f"--artifact={exported}", "--serve.port=0"]
    titles = [item["title"] for item in read(topics / "tst.json.gz")][:40]
    with processes.started(1, flags) as group:
        pid = group.processes[0].pid

        def said() -> str:
            return group.output(0, "err")

        def replaced(times: int) -> None:
            processes.until(lambda: said().count(": replaced, ") == times, 120)

        processes.until(lambda: "ready at" in said(), 120)
        port = int(re.search(r"ready at http://127\.0\.0\.1:(\d+)", said())[1])
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        expected = {}
        for title in titles:
            status, body = ask(client, "/v1/predict", {}, question(title))
            assert status == 200 and len(_labels(body)) == K
            expected[title] = _labels(body)
        end = threading.Event()
        clients = [Client(port, seed, expected, end) for seed in range(CLIENTS)]
        for one in clients:
            one.start()
        memory, reloads = [], 0
        started = time.monotonic()
        while time.monotonic() - started < SECONDS:
            # The same folder under another name, so that it is opened anew; labels are the same.
            manifest = json.loads((exported / "artifact.json").read_text())
            reloads += 1
            text = json.dumps(manifest | {"name": f"topics {reloads}"})
            (exported / "artifact.json.new").write_text(text)
            os.replace(exported / "artifact.json.new", exported / "artifact.json")
            os.kill(pid, signal.SIGHUP)
            replaced(reloads)
            # What was freed has just been given back; from here on it is kept for what comes.
            memory.append(resident(pid))
            end.wait(20)
        end.set()
        for one in clients:
            one.join(60)
            assert not one.is_alive()
            assert one.ended, f"after {one.valid} and {one.broken} questions"
        wrong = [line for one in clients for line in one.wrong]
        assert not wrong, wrong[:5]
        group.processes[0].send_signal(signal.SIGTERM)
        (done,) = group.wait(60)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    # After a warm-up: the first reloads, each of which holds two models for a moment.
    settled = memory[len(memory) // 4]
    growth = max(memory[-3:]) / settled - 1
    figures(
        seconds=SECONDS,
        valid=sum(one.valid for one in clients),
        broken=sum(one.broken for one in clients),
        reloads=reloads,
        memory_mib=[round(x / 1024) for x in memory],
        growth=growth,
    )
    assert growth < 0.02, memory
