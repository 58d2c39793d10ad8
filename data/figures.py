"""Makes the pictures on the pages anew, in about a minute: python -m data.figures

tensors.png        what fine-tuning changes, layer by layer and token by token
training.gif       a few clicks while they move to the switches
look.png           where a head looks before and after fine-tuning

The diagrams heads.png and trade_off.png are drawn by data/study/diagrams.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import train
from data import pictures
from data.base import find_device, load_base, screens_and_features
from data.command import command, make_directory, option
from data.evaluate import evaluate
from data.walk import show_attention, show_question


@dataclass
class FiguresConfig:
    out: str = option("data/figures", "directory of the pictures")
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")


def make_figures(cfg: FiguresConfig) -> None:
    """The demo's run, filmed; then its pictures."""
    out = Path(cfg.out)
    make_directory(out)
    run = train.Config(device=cfg.device)
    # Many frames at the start, where clicks move, and few at the end.
    filmed_steps = {round(run.steps * (frame / 32) ** 2) for frame in range(33)}
    film = {}  # {step: answers, ...}

    def look(step: int, model) -> None:
        if step in filmed_steps:
            # Every seventh answer about nine screens: six, each about another screen, of words and icons.
            _, answers = evaluate(model, *screens_and_features(model, "switches", "test", 9))
            film[step] = answers[::7]

    look(0, load_base(run.base, find_device(run.device)))
    tuned = train.finetune(run, verbose=True, after_step=look)
    frames = []
    for step, answers in film.items():
        hits = sum(map(pictures.is_correct, answers))
        headline = f"step {step:,} of {run.steps:,}:  {hits} of {len(answers)} clicks hit"
        frames.append(pictures.page(list(map(pictures.clicks_panel, film[0], answers)), 3, headline))
    pictures.save(frames, out / "training.gif")
    show_question(tuned, out / "tensors.png")
    show_attention(tuned, out / "look.png")


if __name__ == "__main__":
    sys.exit(command(FiguresConfig, make_figures, __doc__))
