"""Teach a tiny model to repeat a place: <x3> <y5> how many -> <x3> <y5>. It is a control for hints (data/questions.py).

    python -m data.study.copying --base data/tiny_vlm.pt --out runs/bases/2-copying.pt

Its language model learns this on old screens, in half of the sequences; the others hold old questions. So copying is a
skill that the model has, and does not use where it is asked for a click.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.base import find_device, load_base, screens_and_features
from data.command import command, make_directory, option, write_file
from data.evaluate import evaluate, measure_hints, measure_other_questions
from data.prompts import pack_sequences
from data.questions import BINS
from data.study.pretrain import old_samples, save_base

STEPS = 500
SCREENS = 1024
SCREENS_PER_STEP = 16
TEST_SCREENS = 100


@dataclass(frozen=True)
class CopyingConfig:
    base: str = option("data/tiny_vlm.pt", "the model to teach, made by data.study.pretrain")
    lr: float = option(3e-4, "AdamW's peak rate", minimum=0)
    seed: int = option(1, "of the questions and their order", minimum=0)
    device: str = option("cpu", "where to compute: cpu, cuda, mps, or auto")
    out: str = option("copying.pt", "file to write; beside it a record of what the model can do")


def copying_sample(rng) -> dict:
    """Asks for a place that is in the question."""
    x, y = rng.integers(BINS, size=2)
    place = f"<x{x}> <y{y}>"
    return {"instruction": f"{place} how many", "answer": place}


def repeat_place(rng):
    """A function that asks for a place instead of what a sample asks for."""
    return lambda sample: copying_sample(rng)


def teach(cfg: CopyingConfig) -> None:
    """Teach a model, write it, and measure it."""
    out = Path(cfg.out)
    model = load_base(cfg.base, find_device(cfg.device))
    make_directory(out.parent)
    screens, features = screens_and_features(model, "old", "train", SCREENS)
    torch.manual_seed(cfg.seed)
    optimizer = torch.optim.AdamW(model.language_model.parameters(), weight_decay=0.0)
    for step in tqdm(range(STEPS), "copy"):
        rng = np.random.default_rng([cfg.seed, step])
        picks = rng.choice(SCREENS, SCREENS_PER_STEP, replace=False)
        samples = []
        for i, pick in enumerate(picks):
            samples.append([copying_sample(rng)] if i % 2 == 0 else old_samples(screens[pick], 2, rng))
        batch = pack_sequences(samples, [[]] * len(samples), features.shape[1], model.device)
        optimizer.param_groups[0]["lr"] = cfg.lr * min((step + 1) / max(STEPS // 20, 1), 1 - step / STEPS)
        loss = model(**batch, image_features=features[picks]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_base(model, out)

    model = load_base(out, model.device)  # what was written, because it is in 16 bits
    old_test = screens_and_features(model, "old", "test", TEST_SCREENS)
    record = asdict(cfg) | {"torch": torch.__version__}
    record["copied_acc"], _ = evaluate(model, *old_test, "what_is_at", reword=repeat_place(np.random.default_rng(0)))
    record |= measure_other_questions(model, old_test)
    hints = measure_hints(model, old_test)
    record["followed_acc"] = hints["followed_acc"]  # a wrong hint, where it is asked for a click
    write_file(out.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())
    print(f"saved    {out}: copies {record['copied_acc']:.1%}, follows {record['followed_acc']:.1%} of wrong hints")


if __name__ == "__main__":
    sys.exit(command(CopyingConfig, teach, __doc__))
