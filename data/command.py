"""What all commands share: a dataclass becomes a command line, and files are written as a whole or not at all."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path


def option(default, help: str, choices: tuple[str, ...] | None = None, minimum: float | None = None):
    """A field of a dataclass that is an option of the command line, too."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


def command(settings_class, job: Callable, description: str, arguments: list[str] | None = None) -> int:
    """Runs job(settings), with a command-line option for each field of the dataclass that `option` made.

    Returns the exit status: 0; 1 if the loss was not finite, 2 for bad options or files, 130 if it was interrupted."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form, allow_abbrev=False)
    options = [f for f in fields(settings_class) if f.metadata]  # those made by option()
    for f in options:
        kind = {"type": float if f.default is None else type(f.default), "choices": f.metadata["choices"]}
        if f.default is False:
            kind = {"action": "store_true"}
        help = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, help=help, **kind)
    values = vars(parser.parse_args(arguments))
    for f in options:
        value, minimum = values[f.name], f.metadata["minimum"]
        if value is not None and minimum is not None and not minimum <= value < 2**63:
            parser.error(f"{f.name} must be finite and at least {minimum}, got {value}")
    try:
        job(settings_class(**values))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (FloatingPointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


def make_directory(path: Path) -> None:
    """ValueError if it cannot be made or written to: it is better to fail now than after training."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"cannot write files into {path} ({error.strerror}); choose another directory") from error


def write_file(path: Path, content: bytes) -> None:
    """Writes beside `path` and then moves it there, so that a killed run leaves no half file."""
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
