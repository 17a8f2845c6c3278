"""A small process of its own between a process of a run and process 0's coordinator.

JAX's client ends its process with a stack trace the moment its connection breaks, as when process 0
is killed. Here the connection is to 127.0.0.1 and stays whole, so that there is time to say what
happened. A process and no thread: some calls of the client wait for it and hold Python's lock.

    python runtime/relay.py HOST PORT

The first line of output is the port to connect to. It ends with its standard input.
"""

import contextlib
import os
import signal
import socket
import sys
import threading


def _pass_on(near: socket.socket, host: str, port: int) -> None:
    """One connection, both ways."""
    try:
        far = socket.create_connection((host, port), timeout=10)
    except OSError:
        near.close()  # as if it had been refused: the client tries again
        return
    far.settimeout(None)
    for one in (near, far):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_copy, args=(far, near), daemon=True).start()
    _copy(near, far)
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_WR)  # the client has closed; the other way is never closed first


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)


def _accept(listener: socket.socket, host: str, port: int) -> None:
    while True:
        near, _ = listener.accept()
        threading.Thread(target=_pass_on, args=(near, host, port), daemon=True).start()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends with its process
        signal.signal(number, signal.SIG_IGN)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    target = (listener, sys.argv[1], int(sys.argv[2]))
    threading.Thread(target=_accept, args=target, daemon=True).start()
    os.read(0, 1)


if __name__ == "__main__":
    main()
