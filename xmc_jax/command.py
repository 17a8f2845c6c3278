"""What the commands apart from `main` share: flags by argparse, errors in one line, exit codes."""

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

Parsed = TypeVar("Parsed")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors of one line, where argparse prints the usage too."""

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def run(name: str, parse: Callable[[], Parsed], act: Callable[[Parsed], None]) -> int:
    """Runs a command.

    Args:
        name: what its errors begin with.
        parse: flags to what `act` takes; a ValueError is a mistaken flag.
        act: does the work and prints what there is to say; a ValueError is bad data.

    Returns:
        The exit status: 0, 1 for bad data, 2 for bad flags, 130 if interrupted.
    """
    try:
        parsed = parse()
    except ValueError as error:
        return _said(name, error, 2)
    try:
        act(parsed)
    except (ValueError, OSError) as error:
        return _said(name, error, 1)
    except KeyboardInterrupt:
        return _said(name, "interrupted; run the same command again", 130)
    return 0


def _said(name: str, error: Exception | str, status: int) -> int:
    print(f"{name}: {str(error).removeprefix(f'{name}: ')}", file=sys.stderr)
    return status
