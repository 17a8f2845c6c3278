"""Latency and throughput of `--mode=serve`: a server process, and clients on the same machine.

python -m benchmarks.serve --artifact=runs/first/export

Queries are titles of the artifact's training documents, one per request, in an order drawn from
--seed, for the ten best labels. A client keeps its connection, and asks again as soon as it has its
answer; all clients are one process with one thread, over 127.0.0.1. In turn:

    together    --clients at a time, for --seconds
    alone       one client, a third of that; batching is on, and there is nothing to batch
    unbatched   --clients at a time, likewise, of a server with --serve.max_batch=1
    one_by_one  one client of that server

The results go to --out: "benchmark", "settings", environment ("processor", "cores", "python",
"versions", "date", "commit") and "results": of each of these requests, errors (other statuses than
200, and answers without ten labels), requests per second, the median and the 99th percentile of
milliseconds, queries per batch as the server counts them, and milliseconds of CPU of the server and
of the clients per request; "times_one_by_one", throughput together over that one by one, and
"times_unbatched"; and "start_seconds" of both servers until ready, with what they compiled kept on
disk. CPU time suffers less than the rest from other work on the machine.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.environment import environment, save
from xmc_jax.shipping import artifact

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "fastapi", "httptools", "numpy", "uvicorn", "uvloop")
K = 10
_READY = re.compile(rb"ready at http://127\.0\.0\.1:(\d+)")
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
_WARM = 0.5  # seconds of a phase that do not count


class Client(asyncio.Protocol):
    """A connection that asks, and asks again when it has the answer.

    Args:
        requests: what it sends, over and over.
        seconds: told of each answer: when it was asked for, how long it took, whether it is right.
    """

    def __init__(self, requests: Sequence[bytes], answers: list[tuple[float, float, bool]]):
        self._requests, self._answers, self._next = requests, answers, 0
        self._got, self._asked = b"", 0.0
        self.ended = asyncio.get_running_loop().create_future()
        self.ending = False

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self._transport = transport
        self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        if not self.ended.done():  # the server has gone
            self._answers.append((self._asked, time.perf_counter() - self._asked, False))
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._got += data
        head, separator, body = self._got.partition(b"\r\n\r\n")
        if not separator or len(body) < int(_LENGTH.search(head + b"\r\n")[1]):
            return
        right = self._got.startswith(b"HTTP/1.1 200") and body.count(b'"score":') == K
        self._answers.append((self._asked, time.perf_counter() - self._asked, right))
        if self.ending:
            self.ended.set_result(None)
            self._transport.close()
        else:
            self._ask()

    def _ask(self) -> None:
        self._got, self._asked = b"", time.perf_counter()
        self._transport.write(self._requests[self._next % len(self._requests)])
        self._next += 1


async def load(
    port: int, requests: Sequence[bytes], clients: int, seconds: float
) -> list[tuple[float, float, bool]]:
    """Asks for so many seconds; of each answer when it was asked for, how long it took, and whether
    it is right."""
    answers: list[tuple[float, float, bool]] = []
    loop, started = asyncio.get_running_loop(), []
    for number in range(clients):
        own = requests[number::clients]
        _, client = await loop.create_connection(
            lambda own=own: Client(own, answers), "127.0.0.1", port
        )
        started.append(client)
    await asyncio.sleep(seconds)
    for client in started:
        client.ending = True
    await asyncio.wait_for(asyncio.gather(*(client.ended for client in started)), 60)
    return answers


@contextlib.contextmanager
def server(folder: pathlib.Path, *flags: str) -> Iterator[tuple[subprocess.Popen, int, float]]:
    """A server process, its port, and the seconds until it was ready.

    Raises:
        RuntimeError: it ended; with the end of what it said.
    """
    started, said = time.perf_counter(), b""
    command = [sys.executable, "-m", "xmc_jax.main", "--mode=serve", f"--artifact={folder}"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--serve.port=0", *flags], stdout=log, stderr=log, cwd=ROOT
        )
        try:
            while (found := _READY.search(said)) is None:
                if process.poll() is not None:
                    raise RuntimeError(f"exit code {process.returncode}: {said[-1000:].decode()}")
                time.sleep(0.05)
                log.seek(0)
                said = log.read()
            yield process, int(found[1]), time.perf_counter() - started
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise RuntimeError(f"exit code {process.returncode} at its end")
        finally:
            process.kill()
            process.wait()


def phase(
    process: subprocess.Popen, port: int, requests: Sequence[bytes], clients: int, seconds: float
) -> dict[str, Any]:
    """One row of the results."""
    before, own = _counted(port, process.pid), time.process_time()
    started = time.perf_counter()
    answers = asyncio.run(load(port, requests, clients, seconds))
    own, after = time.process_time() - own, _counted(port, process.pid)
    everything = len(answers)
    inside = [a for a in answers if a[0] - started > _WARM]
    took = np.array([a[1] for a in inside]) * 1000
    span = max(a[0] + a[1] for a in inside) - started - _WARM
    batches = after["batches"] - before["batches"]
    return {
        "clients": clients,
        "seconds": round(span, 2),
        "requests": len(inside),
        "errors": sum(not a[2] for a in answers),
        "requests_per_second": round(len(inside) / span, 1),
        "p50_ms": round(float(np.percentile(took, 50)), 2),
        "p99_ms": round(float(np.percentile(took, 99)), 2),
        "queries_per_batch": round((after["queries"] - before["queries"]) / batches, 2),
        "server_cpu_ms": round(1000 * (after["cpu"] - before["cpu"]) / everything, 2),
        "clients_cpu_ms": round(1000 * own / everything, 2),
    }


def _counted(port: int, pid: int) -> dict[str, float]:
    text = _get(port, "/metrics")
    values = dict(re.findall(r"^(xmc_batch_queries_\w+) (\S+)$", text, re.MULTILINE))
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return {
        "batches": float(values["xmc_batch_queries_count"]),
        "queries": float(values["xmc_batch_queries_sum"]),
        "cpu": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
    }


def _get(port: int, path: str) -> str:
    async def get() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode()
        )
        content = await reader.read()
        writer.close()
        return content

    return asyncio.run(get()).decode()


def _request(text: str) -> bytes:
    body = json.dumps({"queries": [{"text": text}], "k": K}).encode()
    head = (
        "POST /v1/predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; what it printed, as it is written to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=pathlib.Path, required=True, help="an exported folder")
    parser.add_argument("--clients", type=int, default=32, help="default 32")
    parser.add_argument("--seconds", type=float, default=60, help="default 60")
    parser.add_argument("--seed", type=int, default=0, help="of the order of queries, default 0")
    out = pathlib.Path(__file__).parent / "results" / "serve.json"
    parser.add_argument("--out", type=pathlib.Path, default=out, help="JSON file of the results")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    opened = artifact.open(arguments.artifact, verify=False)
    order = np.random.default_rng(arguments.seed).permutation(len(opened.documents))
    requests = [_request(opened.documents.texts[row]) for row in order.tolist()]
    results: dict[str, Any] = {}
    starts: dict[str, float] = {}
    for name, flags, phases in (
        ("batching", (), ("together", "alone")),
        ("max_batch=1", ("--serve.max_batch=1",), ("unbatched", "one_by_one")),
    ):
        with server(arguments.artifact, *flags) as (process, port, starts[name]):
            for row, clients in zip(phases, (arguments.clients, 1)):
                seconds = arguments.seconds if row == "together" else arguments.seconds / 3
                results[row] = found = phase(process, port, requests, clients, seconds)
                print(
                    f"{row:10}  {found['requests_per_second']:7.1f} requests/s  p50 "
                    f"{found['p50_ms']:6.2f} ms  p99 {found['p99_ms']:6.2f} ms  "
                    f"{found['errors']} errors  {found['queries_per_batch']:5.2f} per batch  CPU "
                    f"{found['server_cpu_ms']:.2f} + {found['clients_cpu_ms']:.2f} ms"
                )
    together = results["together"]["requests_per_second"]
    for name in ("one_by_one", "unbatched"):
        results[f"times_{name}"] = round(together / results[name]["requests_per_second"], 2)
        print(f"together is {results[f'times_{name}']} times {name}")
    results["start_seconds"] = {name: round(seconds, 1) for name, seconds in starts.items()}
    content = {
        "benchmark": "serve",
        "settings": {
            "model": opened.name,
            "digest": opened.digest,
            "labels": len(opened.labels),
            "documents": len(opened.documents),
            "k": K,
            "clients": arguments.clients,
            "seconds": arguments.seconds,
            "seed": arguments.seed,
        },
        **environment(PACKAGES),
        "results": results,
    }
    save(arguments.out, content)
    return content


if __name__ == "__main__":
    main()
