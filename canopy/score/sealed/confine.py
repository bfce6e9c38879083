"""Run a program within a budget and away from everything but what it is given.

The process has an environment of a few words, a working folder of its own, and no descriptor of ours but its output. On
Linux it can read the interpreter, its libraries and the folders it is given, write to one, and reach no network
(`canopy.score.sealed.cage`). Elsewhere there is no such means that needs no rights and no further program: the process is
then only not told where the labels are, and the result says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import psutil

import canopy
from canopy.errors import SealError
from canopy.score.sealed import cage
from canopy.score.sealed.task import Budget

_POLL_S = 0.05

_SYSTEM: Final = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat",
    "/proc/sys/vm", "/proc/self", "/sys/devices/system", "/dev/urandom", "/dev/random",
)  # fmt: skip
"""What programs need of a Linux system, and holds nothing of anybody's."""

_DEVICES: Final = ("/dev/null", "/dev/zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a confined program ended."""

    ended: Literal["itself", "out of time", "out of memory"]
    code: int
    """Its exit code; negative: the signal that ended it."""
    seconds: float
    memory_mib: int
    """Most resident memory seen, of it and what it started."""
    said: str
    """The last line of its standard error."""
    means: str
    """How it was kept away from the rest of the machine."""


def means() -> str:
    """What keeps a program away from the rest of this machine, as far as can be told without starting one."""
    version = cage.landlock_version()
    return f"Landlock {version}" if version else "none"


def readable() -> tuple[Path, ...]:
    """Where the interpreter, its libraries and this package are: what every confined program may read."""
    paths = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent, Path(canopy.__file__).parent}
    paths |= {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {Path(path) for path in _SYSTEM}
    return tuple(sorted(path for path in paths if path.exists()))


def refuse_within_reach(secret: Path, given: Sequence[Path] = ()) -> None:
    """Refuses a secret file that lies where a confined program may read.

    Raises:
        SealError: naming the place.
    """
    for place in (*readable(), *given):
        if secret.resolve().is_relative_to(place.resolve()):
            raise SealError(f"{secret} lies in {place}, which a submitted model's process can read; move it elsewhere")


def run(command: Sequence[str], *, read: Sequence[Path], write: Path, budget: Budget) -> Ran:
    """Run `command` to its end, or to that of its budget.

    Args:
        command: Absolute path of a program, and its arguments.
        read: Folders and files it may read besides `readable`.
        write: Folder that it may write to; its working folder, and its home.
        budget: Time and memory, enforced by killing it, and the number of threads it is told.
    """
    environment = {
        "PATH": os.defpath, "HOME": str(write), "TMPDIR": str(write), "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": str(budget.threads), "NUMBA_CACHE_DIR": str(write), "MPLCONFIGDIR": str(write),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="canopy-") as folder:
        report, errors = Path(folder) / "means.json", Path(folder) / "stderr"
        wanted = {
            "command": [*command],
            "read": [str(path.resolve()) for path in (*readable(), *read) if path != Path("/proc/self")] + ["/proc/self"],
            "write": [str(write.resolve()), *(path for path in _DEVICES if Path(path).exists())],
            "report": str(report),
        }
        if not cage.landlock_version():
            wanted |= {"read": [], "write": []}
        start = time.monotonic()
        with errors.open("wb") as said:
            process = subprocess.Popen(  # noqa: S603 - the command is ours
                [sys.executable, "-I", cage.__file__, json.dumps(wanted)],
                cwd=write, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
                start_new_session=True,
            )  # fmt: skip
            ended, most = _watch(process, budget, start)
        seconds = time.monotonic() - start
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        used = json.loads(report.read_text(encoding="utf-8")) if report.exists() and report.stat().st_size else {}
    landlock = f"Landlock {used['landlock']}" if used.get("landlock") else "no means to keep it from files"
    network = "no network" if used.get("network") else "the network as it is"
    return Ran(
        ended=ended, code=process.returncode, seconds=seconds, memory_mib=round(most / 2**20),
        said=lines[-1] if lines else "", means=f"{landlock}, {network}",
    )  # fmt: skip


def _watch(
    process: subprocess.Popen[bytes], budget: Budget, start: float
) -> tuple[Literal["itself", "out of time", "out of memory"], int]:
    """Wait for the end of a process or of its budget; how it ended, and the most memory seen."""
    most = 0
    while True:
        most = max(most, _resident(process.pid))
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_POLL_S)
            return "itself", most
        if most > budget.memory_mib * 2**20:
            _kill(process)
            return "out of memory", most
        if time.monotonic() - start > budget.seconds:
            _kill(process)
            return "out of time", most


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(pid: int) -> int:
    total = 0
    for each in _family(pid):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += int(each.memory_info().rss)
    return total


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process with all it started."""
    for each in reversed(_family(process.pid)):
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.wait()
