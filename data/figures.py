"""Makes the pictures on the pages anew, in about a minute: python -m data.figures

tensors.png        what fine-tuning changes, layer by layer and token by token
predictions.png    twelve answers before and after fine-tuning
training.gif       a few clicks while they move to the switches
look.png           where a head looks before and after fine-tuning
heads.png          what each head alone can learn, against its influence; drawn from the rows of the study
"""

import csv
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import train
from data import pictures
from data.base import ROOT, load_base, screens_and_features
from data.command import command, make_directory, option
from data.evaluate import evaluate
from data.walk import show_attention, show_changes

FRAMES = 32  # of the moving picture, about


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
    filmed_steps = {round(run.steps * (frame / FRAMES) ** 2) for frame in range(FRAMES + 1)}
    film = []  # [(step, answers), ...]

    def look(step: int, model) -> None:
        if step in filmed_steps:
            # Every seventh answer about nine screens: six, each about another screen, of words and icons.
            _, answers = evaluate(model, *screens_and_features(model, "switches", "test", 9))
            film.append((step, answers[::7]))

    look(0, load_base(run.base))
    tuned = train.finetune(run, verbose=True, after_step=look)
    pictures.save([pictures.predictions(tuned.base_answers, tuned.answers)], out / "predictions.png")
    pictures.save(pictures.moving_picture(film), out / "training.gif")
    show_changes(tuned.model, tuned.adapter, tuned.answers[0], out / "tensors.png")
    show_attention(tuned.model, tuned.adapter, tuned.base_answers, tuned.answers, out / "look.png")
    rows = runs_of_one_head()
    if rows:
        pictures.save([pictures.heads_alone(rows)], out / "heads.png")


def runs_of_one_head() -> list[dict]:
    """The study's runs that adapt one head, which is named as layer.head."""
    with open(ROOT / "data/study/runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["task"] == "grounding" and re.fullmatch(r"\d+\.\d+", row["heads"])]


if __name__ == "__main__":
    sys.exit(command(FiguresConfig, make_figures, __doc__))
