"""The tiny world, the base model, the baselines and the evidence. This file makes options of dataclasses."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import field, fields

# A thread that waits for others soon goes to sleep instead of spinning. This works only if it is set before torch is
# imported; every command comes by here first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def option(default, help: str, choices: tuple[str, ...] | None = None):
    """A field of a dataclass that is an option of the command line, too."""
    return field(default=default, metadata={"help": help, "choices": choices})


def command(settings_class, job: Callable, description: str, arguments: list[str] | None = None) -> int:
    """Runs job(settings), with a command-line option for each field of the dataclass, and returns the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    for f in fields(settings_class):
        help_text = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        if f.default is False:
            kind = {"action": "store_true"}
        else:
            kind = {"type": float if f.default is None else type(f.default), "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, help=help_text, **kind)
    try:
        job(settings_class(**vars(parser.parse_args(arguments))))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
