"""The tiny world, the base model, the baselines and the evidence. This file holds what all commands share."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from multiprocessing import parent_process

from tqdm import tqdm

# A thread that waits for others soon goes to sleep instead of spinning. This works only if it is set before torch is
# imported; every command comes by here first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

DEVICES = ("auto", "cpu", "cuda", "mps")
# Keep the order: the position of a split is part of the random seed of its samples.
SPLITS = ("train", "validation", "test", "pretrain")


def option(default, help: str, choices: tuple[str, ...] = (), least: float | None = None):
    """A field of a settings dataclass that is an option of the command line too; `least` is its smallest value."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


class Settings:
    """What dataclasses of options inherit. ValueError names one that is none of its choices, too small or infinite."""

    def __post_init__(self):
        for f in fields(self):
            value, least, choices = getattr(self, f.name), f.metadata["least"], f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
            if value is None or least is None:
                continue
            if not least <= value < 2**63:
                raise ValueError(f"{f.name} must be finite and at least {least}, got {value}")


def command(settings_class, job: Callable, description: str, arguments: list[str] | None = None) -> int:
    """Runs job(settings), with a command-line option for each field of the dataclass, and returns the exit status.

    The status is 0; 1 if the loss was not finite, 2 for bad input, 130 if it was interrupted."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    for f in fields(settings_class):
        help_text = f"{f.metadata['help']} (default {f.default!r})"
        if f.metadata["choices"]:
            help_text = f"{' | '.join(f.metadata['choices'])}: {help_text}"
        kind = {"type": float if f.default is None else type(f.default)}
        if f.default is False:
            kind = {"action": "store_true"}
        name = f"--{f.name.replace('_', '-')}"
        parser.add_argument(name, default=f.default, help=help_text.replace("%", "%%"), **kind)
    try:
        job(settings_class(**vars(parser.parse_args(arguments))))
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def progress(steps: Iterable, name: str, total: int | None = None, quiet: bool = False) -> tqdm:
    """A progress bar over these steps; none in a process of a pool."""
    layout = "{desc:<9}|{bar:24}| {n_fmt}/{total_fmt}{postfix}  {elapsed} < {remaining}"
    return tqdm(steps, name, total, bar_format=layout, disable=quiet or parent_process() is not None)
