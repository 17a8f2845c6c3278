"""Connections between processes: who is gone, how the run ended, and strangers at the door."""

import contextlib
import json
import queue
import socket

import pytest

from xmc_jax.runtime import peers

HOST, LONG = "127.0.0.1", 20


class Heard:
    """What a process was told, as it comes."""

    def __init__(self):
        self.lines = queue.Queue()

    def __call__(self, line: str, code: int) -> None:
        self.lines.put(line)
        assert code == (peers.LOST if "is gone" in line else 1)

    def next(self) -> str:
        return self.lines.get(timeout=LONG)


@pytest.fixture
def three():
    """Process 0's end, those of the others, and what each was told."""
    heard = [Heard() for _ in range(3)]
    hub = peers.Hub(3, 10, heard[0])
    spokes = [peers.Spoke(HOST, hub.address, i, 10, heard[i], LONG) for i in (1, 2)]
    assert hub.wait(LONG) == ()
    return hub, spokes, heard


def closed(link) -> None:
    """As when a process is killed."""
    with contextlib.suppress(OSError):  # the other end has said that it is over, and was quicker
        link._connection.shutdown(socket.SHUT_RDWR)


def test_who_is_gone_is_told_to_process_0_and_by_it_to_the_rest(three):
    _, spokes, heard = three
    closed(spokes[0]._link)
    said = f"process 1 ({socket.gethostname()}) is gone: its connection is closed"
    assert heard[0].next() == heard[2].next() == said


def test_all_see_that_process_0_is_gone(three):
    hub, _, heard = three
    hub._over = True  # one that is gone hears and tells nothing
    for link in list(hub._peers.values()):
        closed(link)
    said = f"process 0 ({socket.gethostname()}) is gone: its connection is closed"
    assert heard[1].next() == heard[2].next() == said


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_told_to_all_others_and_the_end_after_it_is_no_news(three, failing):
    hub, spokes, heard = three
    (hub, *spokes)[failing].say("ended with it", 1)
    for link in [spokes[0]._link] if failing else list(hub._peers.values()):
        closed(link)
    others = [one for i, one in enumerate(heard) if i != failing]
    assert [one.next() for one in others] == ["ended with it"] * 2
    assert all(one.lines.empty() for one in heard)


def test_after_a_good_end_nobody_is_missed(three):
    hub, spokes, heard = three
    hub.say("")
    spokes[0].say("")
    links = [spokes[0]._link, *hub._peers.values()]
    for link in links:
        closed(link)
    spokes[1].say("told to process 0, which no longer listens", 1)
    assert all(one.lines.empty() for one in heard)


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b'{"token": "a guess", "process": 1}\n', b"[1]\n"]
)
def test_strangers_are_turned_away(said):
    heard = Heard()
    hub = peers.Hub(2, 10, heard)
    port, _ = hub.address.split()
    with socket.create_connection((HOST, int(port)), LONG) as stranger:
        stranger.sendall(said)
        with pytest.raises((ConnectionError, StopIteration)):
            next(iter(lambda: stranger.recv(1), b""))
            raise AssertionError("answered")
    assert list(hub.wait(0)) == [1]
    peers.Spoke(HOST, hub.address, 1, 10, Heard(), LONG)
    assert hub.wait(LONG) == ()
    assert heard.lines.empty()


def test_those_who_did_not_come_are_named():
    hub = peers.Hub(4, 10, Heard())
    peers.Spoke(HOST, hub.address, 2, 10, Heard(), LONG)
    assert list(hub.wait(0)) in ([1, 3], [1, 2, 3])  # it may be on its way
    hub.wait(0.2)
    assert {1, 3} <= set(hub.wait(0))


@pytest.mark.parametrize("silence", [4, 10, 60])
def test_a_host_is_gone_after_its_time_of_silence(silence):
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    with (
        socket.create_server((HOST, 0)) as server,
        socket.create_connection(server.getsockname()) as connection,
    ):
        peers._Link(connection, silence)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, every, count, unanswered = (
            connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names
        )
    assert idle + every * count == silence
    assert unanswered == 1000 * silence


def test_messages_may_come_in_pieces():
    heard = Heard()
    hub = peers.Hub(2, 10, heard)
    port, token = hub.address.split()
    hello = json.dumps({"token": token, "process": 1, "host": "there"}).encode() + b"\n"
    with socket.create_connection((HOST, int(port)), LONG) as other:
        other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in hello:
            other.sendall(bytes([byte]))
        assert json.loads(other.makefile().readline()) == {"host": socket.gethostname()}
    assert heard.next() == "process 1 (there) is gone: its connection is closed"
