"""Files and folders that appear whole or not at all, even if the process or the machine dies.

A file is written beside its target, flushed to the disk, renamed, and the rename is flushed as
well. A folder is filled beside its target and then takes the target's place in one rename.
"""

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


@contextlib.contextmanager
def replaced(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Yields a binary file that becomes `path` when the block ends without an error.

    After an error `path` is as it was and nothing is left beside it. On gs:// an object appears
    when it is whole, so it is written directly, from a temporary local file.

    Args:
        path: local or remote; its folder is made if it is missing.

    Raises:
        OSError: the disk refuses the write.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target):
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            target.write_bytes(file.read())
        return
    partial = pathlib.Path(target.parent, f".{target.name}.partial")
    try:
        with partial.open("w+b") as file:
            yield file
            to_disk(file)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder_to_disk(target.parent)


def write(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a small file in one step; see `replaced`. Text is encoded as UTF-8."""
    with replaced(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced_folder(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """Yields an empty folder that becomes `path` when the block ends without an error.

    A folder that is already at `path` stays readable until the new one takes its place, and is
    removed afterwards. After an error or a kill `path` is as it was; the next call for the same
    path removes what a killed process left.

    Args:
        path: a local folder; only one process at a time may replace it, see `locks.locked`.

    Raises:
        OSError: the disk refuses a write.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        tree_to_disk(partial)
        move_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def move_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Gives a folder another name on the same disk and removes the folder that had the name.

    On Linux both folders change names in one step (renameat2). Where a file system cannot, the old
    folder is called `.<name>.old` for a moment.

    Args:
        source: a folder, already on the disk.
        target: its new path; a folder there is removed.
    """
    if not target.exists():
        os.replace(source, target)
    elif _exchanged(source, target):
        folder_to_disk(target.parent)
        shutil.rmtree(source)
    else:
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(source, target)
        folder_to_disk(target.parent)
        shutil.rmtree(old)
    folder_to_disk(target.parent)


def _exchanged(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two folders have exchanged names; False where the system has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def to_disk(file: IO[Any]) -> None:
    """Waits until the disk has all that was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def folder_to_disk(folder: epath.PathLike) -> None:
    """Waits until the disk has the names of a local folder's entries."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def tree_to_disk(folder: pathlib.Path) -> None:
    """Waits until the disk has every file and folder below a local folder."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        folder_to_disk(parent)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path names an object store, such as gs://bucket/name."""
    return "://" in str(path)
