"""`canopy train` without what follows the last step, and with accidents: a program that tests start as processes."""

import argparse
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from canopy.errors import CanopyError
from canopy.model import losses, train


class Accident(Callback):
    """Something happens to process `rank` at the start of batch `batch`, counted from the start of the process."""

    def __init__(self, what: str, batch: int, rank: int) -> None:
        self.what, self.batch, self.rank = what, batch, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            if self.what == "nan":
                with torch.no_grad():
                    pl_module.network.head.conv3.bias.fill_(float("nan"))
            else:
                os.kill(os.getpid(), signal.Signals[self.what])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume-if-any", action="store_true")
    parser.add_argument("--own-sums", action="store_true", help="each process divides by its own valid pixels")
    parser.add_argument("--accident", help="name of a signal, or nan")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rank", type=int, default=0)
    args = parser.parse_args()
    if args.own_sums:
        losses.over_processes = lambda x: x
    train.finish = lambda *_, out, **__: out
    callbacks = [Accident(args.accident, args.batch, args.rank)] if args.accident else []
    try:
        train.train(args.recipe, out=args.out, resume_if_any=args.resume_if_any, callbacks=callbacks)
    except CanopyError as error:
        raise SystemExit(f"line: {error}") from None


if __name__ == "__main__":
    main()
