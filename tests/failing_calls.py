"""System calls that fail, as of a disk that is worn out: `import failing_calls` in a child process.

    failing_calls.fail("fsync")

A filter of Linux's (seccomp), which no process gets rid of again; what it starts inherits it.
"""

import ctypes
import errno
import os
import platform
import struct

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
# Of both architectures, None where there is no such call.
_CALLS = {
    "write": ((1, 64), (20, 66), (18, 68), (296, 70)),  # write, writev, pwrite64, pwritev
    "fsync": ((74, 82), (75, 83)),  # fsync, fdatasync
    "rename": ((82, None), (264, 38), (316, 276)),  # rename, renameat, renameat2
    "mkdir": ((83, None), (258, 34)),  # mkdir, mkdirat
}
KINDS = tuple(_CALLS)
_LOAD, _EQUAL, _ABOVE, _RETURN = 0x20, 0x15, 0x25, 0x06  # of Berkeley packet filters
_NUMBER, _ARCHITECTURE, _FIRST = 0, 4, 16  # where they are told the call and its first argument
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_OF_ALL_THREADS = 1


def fail(*kinds: str, error: int = errno.EIO) -> None:
    """Makes calls of this process fail from here on, writes but to the standard streams.

    Args:
        *kinds: of `KINDS`.
        error: with which.

    Raises:
        OSError: such filters cannot be had here.
    """
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {machine}")
    column = list(_ARCHITECTURES).index(machine)
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _ARCHITECTURES[machine])]
    program += [(_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, _NUMBER)]
    fails = [(_RETURN, 0, 0, _ERROR | error)]
    fails_if_above_2 = [(_LOAD, 0, 0, _FIRST), (_ABOVE, 0, 1, 2), *fails, (_RETURN, 0, 0, _ALLOW)]
    for kind in kinds:
        then = fails_if_above_2 if kind == "write" else fails
        for numbers in _CALLS[kind]:
            if numbers[column] is not None:
                program += [(_EQUAL, 0, len(then), numbers[column]), *then]
    program.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    held = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(held)), 16)
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter = 38, 1
    refused = libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.syscall(
        _SECCOMP[machine], set_filter, _OF_ALL_THREADS, ctypes.byref(head)
    )
    if refused:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
