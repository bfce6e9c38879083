"""Runs of the command in processes of their own that start at once: forked from one that has loaded the libraries."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SERVER = """
import json, os, signal, sys
import geopandas, timm, torch, segmentation_models_pytorch, distributed
import canopy.cli, canopy.region, canopy.model.package, canopy.mosaicker.predict, canopy.mosaicker.sheets
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdin.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["canopy", *order["words"]]
        canopy.cli.main()
    print(child, flush=True)
"""
"""Runs the command's own entry point in a fresh process per order."""


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A run of the command."""

    server: "ForkServer"
    pid: int
    stdout: Path
    stderr: Path

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal and wait; the exit code, negative for a signal."""
        os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return int(self.server.ask({"wait": self.pid}))

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


class ForkServer:
    """Starts runs of the command."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, order: dict[str, object]) -> str:
        """One order, one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._line()

    def start(self, *words: object) -> Fork:
        """`canopy WORDS`, in a process of its own."""
        self._count += 1
        files = {name: self._folder / f"{self._count}.{name}" for name in ("stdout", "stderr")}
        pid = self.ask({"words": [str(word) for word in words], **{name: str(path) for name, path in files.items()}})
        return Fork(server=self, pid=int(pid), **files)

    def close(self) -> None:
        """End the server; its runs have ended before."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=30) == 0
