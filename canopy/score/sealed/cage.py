"""Start a program that can read and write named places only; nothing but the standard library is loaded before it.

Run as a script by `canopy.score.sealed.confine`, with a JSON object as its one argument:

    command   list: the program and its arguments
    read      list: files and folders that may be read, and from which programs may be started
    write     list: folders that may be written below, and devices
    report    path: where to say which means were used, as JSON

The means are Landlock (Linux 5.13 and later, for anybody, root included) for files, TCP and signals, and an empty network
namespace where one can be made. Both hold for everything the program starts, and cannot be undone from inside.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import struct
import sys

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on all architectures
_PATH_BENEATH = 1
_ASK_VERSION = 1
_NO_NEW_PRIVS = 38
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_DIR, _MAKE_FILE, _TRUNCATE, _IOCTL = 1 << 7, 1 << 8, 1 << 14, 1 << 15
_FIRST_RIGHTS = (1 << 13) - 1
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
"""Rights that a single file may have; the others are for folders."""
_RIGHTS_BY_VERSION = ((2, 1 << 13), (3, _TRUNCATE), (5, _IOCTL))
_READS = _EXECUTE | _READ_FILE | _READ_DIR
_WRITES = _READS | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_FILE | _TRUNCATE


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """Version of Landlock here; 0 where there is none."""
    if platform.system() != "Linux":
        return 0
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION))))


def _done(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def lock_files(read: list[str], write: list[str]) -> int:
    """Take from this process, for good, all rights to files but those named; returns Landlock's version, 0 without any."""
    version = landlock_version()
    if not version:
        return 0
    libc = _libc()
    handled = _FIRST_RIGHTS
    for least, right in _RIGHTS_BY_VERSION:
        handled |= right if version >= least else 0
    net, scopes = (0b11 if version >= 4 else 0), (0b11 if version >= 6 else 0)
    attributes = struct.pack("=QQQ", handled, net, scopes)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _done(
        libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)), "landlock"
    )
    for paths, rights in ((read, _READS), (write, _WRITES)):
        for path in paths:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights & handled & (-1 if os.path.isdir(path) else _FILE_RIGHTS)  # noqa: PTH112 - a path as it is
            rule = struct.pack("=Qi", allowed, place)
            _done(
                libc.syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0)), path
            )
            os.close(place)
    _done(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    _done(libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)), "landlock")
    os.close(ruleset)
    return version


def leave_network() -> bool:
    """Move this process into a network namespace without any interface; whether that could be done."""
    if platform.system() != "Linux":
        return False
    return bool(_libc().unshare(_NEW_NET) == 0 or _libc().unshare(_NEW_USER | _NEW_NET) == 0)


def main() -> None:
    """Confine this process and become the command."""
    wanted = json.loads(sys.argv[1])
    # Opened before, written after: the place of the report is no place that the program may write to.
    with open(wanted["report"], "w", encoding="utf-8") as report:  # noqa: PTH123 - before anything is loaded
        means = {"network": leave_network(), "landlock": lock_files(wanted["read"], wanted["write"])}
        json.dump(means, report)
    os.execv(wanted["command"][0], wanted["command"])  # noqa: S606 - there is no shell to be asked


if __name__ == "__main__":
    main()
