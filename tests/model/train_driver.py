"""`canopy train` without what follows the last step, and with accidents: what tests run in processes of their own."""

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from canopy.errors import CanopyError
from canopy.model import losses, train

FORKS = multiprocessing.get_context("forkserver")
"""Its server imports torch and the rest once; every process is then a fresh fork of it, as good as a program of its own."""
FORKS.set_forkserver_preload([__name__])


class Accident(Callback):
    """Something happens to process `rank` at the start of batch `batch`, counted from the start of the process."""

    def __init__(self, what: str, batch: int, rank: int) -> None:
        self.what, self.batch, self.rank = what, batch, rank
        self.begun = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.begun += 1
        if self.begun != self.batch + 1 or trainer.global_rank != self.rank:
            return
        match self.what:
            case "nan":
                with torch.no_grad():
                    pl_module.network.head.conv3.bias.fill_(float("nan"))
            case "memory":
                torch.empty(1 << 60, dtype=torch.uint8)
            case _:
                os.kill(os.getpid(), signal.Signals[self.what])


def work(rank: int, world: int, port: int, recipe: Path, out: Path, log: Path, options: dict[str, Any]) -> None:
    """Process `rank` of `world`, as torchrun starts it."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
        rank_zero_only.rank = rank  # Lightning reads it from the environment when it is imported
    if options.get("own_sums"):
        losses.over_processes = lambda x: x
    train.finish = lambda *_, out, **__: out
    accident = options.get("accident")
    try:
        train.train(
            recipe, out=out, resume=options.get("resume"), resume_if_any=options.get("resume_if_any", False),
            callbacks=[Accident(*accident)] if accident else [],
        )  # fmt: skip
    except CanopyError as error:
        sys.stderr.write(f"line: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    except KeyboardInterrupt:
        os._exit(130)


def start(recipe: Path, out: Path, log: Path, *, processes: int = 1, **options: Any) -> list[Any]:
    """Processes that train together; what they say is appended to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (processes, port, recipe, out, log, options)
    workers = [FORKS.Process(target=work, args=(rank, *arguments)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    return workers


def run(recipe: Path, out: Path, *, processes: int = 1, **options: Any) -> tuple[list[int], str]:
    """Exit statuses, minus the signal's number for a killed process, and what the processes said."""
    log = out.parent / "log"
    log.unlink(missing_ok=True)
    workers = start(recipe, out, log, processes=processes, **options)
    for worker in workers:
        worker.join(600)
    return [worker.exitcode for worker in workers], log.read_text()
