"""Synthetic screens, word problems and the tokenizer; everything is reproducible from (domain, split, index, seed)."""

import argparse
from dataclasses import field, fields
from multiprocessing import parent_process

from tqdm import tqdm

SPLITS = ("train", "validation", "test", "pretrain")  # a sample's random seed has the place of its split among these


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
            if least is not None and not least <= value < 2**63:
                raise ValueError(f"{f.name} must be finite and at least {least}, got {value}")


def parse(settings_class, arguments: list[str], prog: str, description: str):
    """The settings in these arguments: an option for each field of the dataclass."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog, description=description, formatter_class=form, allow_abbrev=False)
    for f in fields(settings_class):
        known = " | ".join(f.metadata["choices"])
        text = f"{known}{': ' * bool(known)}{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        kind = {"type": type(f.default)}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction if f.default else "store_true"}
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, help=text, **kind)
    return settings_class(**vars(parser.parse_args(arguments)))


def progress(first: int, total: int, name: str) -> tqdm:
    """A progress bar over the steps first..total-1; none in a process of a pool."""
    layout = "{desc:<9}|{bar:24}| {n_fmt}/{total_fmt}{postfix}  {elapsed} < {remaining}"
    quiet = parent_process() is not None
    return tqdm(range(first, total), name, total, initial=first, bar_format=layout, disable=quiet)
