"""Files and folders that appear whole or not at all, even if the process or the machine dies.

A file is written beside its target, flushed to the disk, renamed, and the rename is flushed as
well. A folder is filled beside its target and then takes the target's place in one rename. On gs://
a file appears when it is whole; a folder has a file that says so, which is written last.
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

from xmc_jax.files import locks, manifests

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Adds the name of a file to the errors of the system that come without one, as of a write."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replaced(path: epath.PathLike, durable: bool = True) -> Iterator[IO[bytes]]:
    """Yields a binary file that becomes `path` when the block ends without an error.

    After an error `path` is as it was and nothing is left beside it. Two writers of one path take
    turns. The block may open `file.name` once more, as for a memory map.

    Args:
        path: local or remote; its folder is made if it is missing.
        durable: whether to wait for the disk. Without, a file is still seen whole or not at all as
            long as the machine does not fail.

    Raises:
        OSError: the disk refuses the write.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target):
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            epath.Path(file.name).copy(target, overwrite=True)
        return
    target = pathlib.Path(target).resolve()  # a link stays one
    partial = target.with_name(f".{target.name}.partial")
    with naming(path), locks.hold(partial) as file:
        try:
            file.truncate(0)  # what a killed writer left
            yield file
            to_disk(file) if durable else file.flush()
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    if durable:
        folder_to_disk(target.parent)


def write(path: epath.PathLike, content: str | bytes, durable: bool = True) -> None:
    """Writes a small file in one step; see `replaced`. Text is encoded as UTF-8."""
    with replaced(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced_folder(path: epath.PathLike, marker: str | None = None) -> Iterator[pathlib.Path]:
    """Yields an empty local folder that becomes `path` when the block ends without an error.

    A folder that is already at `path` stays readable until the new one takes its place, and is
    removed afterwards. After an error or a kill `path` is as it was; the next call for the same
    path removes what a killed process left. Object stores have no such move: there `marker` is
    removed first and written last, and a folder without it is no whole one.

    Args:
        path: only one process at a time may replace it, see `locks.locked`.
        marker: name of a file that each such folder has; needed on gs://.

    Raises:
        OSError: the disk refuses a write.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as local:
            yield pathlib.Path(local)
            _upload(pathlib.Path(local), epath.Path(path), marker)
        return
    target = pathlib.Path(path).resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(target)
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


def _upload(local: pathlib.Path, target: epath.Path, marker: str | None) -> None:
    """Makes a remote folder one with the files of a local one."""
    (target / marker).unlink(missing_ok=True)
    names = manifests.names(local)
    for name in manifests.names(target) if target.exists() else ():
        if name not in names:
            (target / name).unlink()
    for name in sorted(names, key=lambda name: name == marker):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        epath.Path(local / name).copy(target / name, overwrite=True)


def move_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Gives a file, already on the disk, another name; a file that had the name is removed."""
    os.replace(source, target)
    folder_to_disk(target.parent)


def move_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Gives a folder another name on the same disk and removes the folder that had the name.

    On Linux both folders change names in one step (renameat2). Where a file system cannot, the old
    folder is called `.<name>.old` for a moment; see `recover_folder`.

    Args:
        target: its new path; a folder there is removed.
    """
    old = set_aside_path(target)
    if not target.exists():
        os.replace(source, target)
    elif _exchanged(source, target):
        old = source
    else:
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(source, target)
    folder_to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def set_aside(target: pathlib.Path) -> None:
    """Renames a folder to `set_aside_path`, to make room for a new one; see `recover_folder`."""
    old = set_aside_path(target)
    shutil.rmtree(old, ignore_errors=True)
    move_file(target, old)


def recover_folder(target: pathlib.Path) -> None:
    """Gives a folder its name back that `set_aside`, or a kill in `move_folder`, has taken."""
    old = set_aside_path(target)
    if old.exists() and not target.exists():
        os.replace(old, target)
        folder_to_disk(target.parent)


def set_aside_path(target: pathlib.Path) -> pathlib.Path:
    """The name of a folder that waits until a new one has taken its place."""
    return target.with_name(f".{target.name}.old")


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
