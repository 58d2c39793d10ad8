"""Fine-tune the tiny VLM with Image-LoRA on a new kind of screen, and see what that changes and what it cannot.

python train.py                  measure, probe, select, attach, train, turn down, measure again: a minute or so
python train.py --method lora    the same with standard LoRA (q, k, v, o, all tokens)

Image-LoRA is imagelora.py, and its rivals are in data/rivals.py. The questions and the batches that are made of them
are in data/questions.py and data/prompts.py, replay in data/replay.py, the measures in data/evaluate.py, and what
turning down does in data/gamma.py.

Shapes:  B sequences · T tokens · N screens · P patches, the visual tokens of a screen · D hidden size
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

# A thread that waits for others soon goes to sleep instead of spinning. Torch reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import nn
from tqdm import tqdm

import imagelora
from data import evaluate, pictures, prompts, questions, report
from data.base import find_device, load_base, screens_and_features
from data.command import command, make_directory, option, write_file
from data.costs import run_costs
from data.gamma import measure_curve, strengths
from data.replay import make_replay_data
from data.rivals import LoRA
from tiny_vlm import TinyVLM

# Validation screens of three tiny models chose these rates: Image-LoRA's in all heads, the others' on q, k, v and o
# (data/study/README.md).
RATES = {"image_lora": 0.01, "lora": 0.0025, "partial_lora": 0.00125}
FILES = ("adapter.pt", "predictions.png", "metrics.json")  # what a run can leave in OUT


@dataclass
class Config:
    """One fine-tuning run. Each field is an option of the command line, too."""

    method: str = option("image_lora", "partial_lora is LoRA at visual tokens only", tuple(RATES))
    projections: str = option("qkvo", "which of q, k, v and o all methods but image_lora adapt", ("qkvo", "qk", "v"))
    base: str = option("data/tiny_vlm.pt", "the model to fine-tune, made by data.study.pretrain")
    heads: int = option(12, "how many of 24 value heads image_lora adapts, the most influential first", minimum=1)
    r: int = option(8, "rank; alpha is 2 r", minimum=1)
    gamma: float = option(1.0, "what the update is multiplied by after training, to turn it down", minimum=0)
    lr: float | None = option(None, f"AdamW's peak rate; None: the method's own, of {RATES}", minimum=0)
    steps: int = option(500, "training steps", minimum=1)
    text: int = option(0, "word problems before each screen: longer text, same image", minimum=0)
    hint: str = option(
        "none",
        "where the correct place stands in training: question: <x3> <y5> click wifi; or before_image",
        ("none", *questions.HINTS),
    )
    replay: int = option(0, "how many of the 16 sequences of a step hold other questions or word problems", minimum=0)
    seed: int = option(1, "seed for the order of the data, the adapter's initial A, and the probe", minimum=0)
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")
    out: str = option("runs/switches", "output directory")

    def __post_init__(self):
        if self.replay > prompts.SCREENS_PER_STEP:
            raise ValueError(f"replay must be at most {prompts.SCREENS_PER_STEP}, the sequences of a step")
        if self.method == "image_lora" and self.projections != type(self).projections:
            raise ValueError("--projections does nothing without --method lora or partial_lora")
        if self.method != "image_lora" and self.heads != type(self).heads:
            raise ValueError("--heads does nothing without --method image_lora")
        if self.lr is None:
            self.lr = RATES[self.method]


class FinetuningRun(NamedTuple):
    result: dict  # the Config's fields and what was measured
    model: TinyVLM
    adapter: nn.Module
    base_answers: list[evaluate.Answer]
    answers: list[evaluate.Answer]


def finetune(cfg: Config, after_step: Callable | None = None) -> FinetuningRun:
    """Measure the base, select heads, attach an adapter, train it, measure again. Writes no file.

    after_step(step, model), if given, is called after each training step."""
    start = time.time()
    model = load_base(cfg.base, find_device(cfg.device))
    check_heads(cfg, model)

    # Screens, and what the frozen vision tower makes of them, [N, P, D]. So the tower never runs in training.
    num_train = min((prompts.PROBE_BATCHES + cfg.steps) * prompts.SCREENS_PER_STEP, prompts.TRAIN_SCREENS)
    train_data = screens_and_features(model, "new", "train", num_train)
    new_test = screens_and_features(model, "new", "test", evaluate.TEST_SCREENS)
    old_test = screens_and_features(model, "old", "test", evaluate.TEST_SCREENS // 2 + 1)
    replay_data = make_replay_data(model, train_data, cfg.seed) if cfg.replay else None

    # Before training, measure the new task on new screens; other questions and the new task's own words on old screens;
    # word problems; and the logits of prompts without an image.
    before, base_answers = evaluate.measure(model, new_test, old_test, num_problems=cfg.text)
    base_logits = evaluate.text_only_logits(model)
    report.print_before(cfg, model, before, replay_data)

    heads = probe(cfg, model, train_data) if cfg.method == "image_lora" else None
    adapter = attach_adapter(cfg, model, heads)
    batch_of = partial(prompts.training_batch, cfg, train_data, replay_data=replay_data)
    train(cfg, model, adapter, batch_of, after_step, verbose=True)

    # Turn the update down, and see what comes back. Then measure the same again, at the run's own gamma.
    curve = measure_curve(model, adapter, old_test, cfg.text)
    for gamma in strengths(adapter):
        gamma.mul_(cfg.gamma)
    after, answers = evaluate.measure(model, new_test, old_test, num_problems=cfg.text)
    if cfg.hint != "none":
        after |= evaluate.measure_hints(model, new_test, cfg.hint)
    difference = (evaluate.text_only_logits(model) - base_logits).abs().max().item()
    report.print_after(curve, after, difference)
    result = {**asdict(cfg), "selected": heads, "before": before, "curve": curve, **after}
    result |= {"replay_answers_acc": replay_data and replay_data.share_correct, "text_logits_max_abs_diff": difference}
    result |= run_costs(cfg, model, adapter, prompts.training_batch(cfg, train_data, 0)["input_ids"])
    result |= {"seconds": round(time.time() - start, 1), "device": model.device.type, "torch": torch.__version__}
    return FinetuningRun(result, model, adapter, base_answers, answers)


def check_heads(cfg: Config, model: TinyVLM) -> None:
    """ValueError unless the model has so many heads and can have this rank. It is better to fail before measuring."""
    if cfg.method == "image_lora":
        any_scores = torch.ones(model.config.num_hidden_layers, model.config.num_key_value_heads)
        imagelora.attach(model, cfg.r, heads=imagelora.select_heads(any_scores, cfg.heads)).detach()


def probe(cfg: Config, model: TinyVLM, train_data: tuple) -> imagelora.Heads:
    """The heads that could lower the loss of the first batches most. The probe does not change the model."""
    batches = [prompts.training_batch(cfg, train_data, i) for i in range(prompts.PROBE_BATCHES)]
    scores = imagelora.score_heads(model, batches, seed=cfg.seed)  # [layers, heads]
    heads = imagelora.select_heads(scores, cfg.heads)
    report.print_heads(scores, heads)
    return heads


def attach_adapter(cfg: Config, model: TinyVLM, heads: imagelora.Heads | None) -> nn.Module:
    """Freeze the model and attach the adapter of the method. It starts at B = 0, as the base model."""
    torch.manual_seed(cfg.seed)  # so that A does not depend on the random numbers that were drawn before
    if cfg.method == "image_lora":
        return imagelora.attach(model, cfg.r, 2 * cfg.r, heads)
    return LoRA(model, cfg.r, 2 * cfg.r, cfg.projections, "visual" if cfg.method == "partial_lora" else "all")


def train(cfg: Config, model: TinyVLM, adapter: nn.Module, batch_of: Callable, after_step=None, verbose=False) -> None:
    """Train the adapter with AdamW. FloatingPointError if the loss is not finite.

    batch_of(index): 16 random screens with a question about each. That is input_ids and labels [B, T], the labels -100
    except on the answer, and image_features [B, P, D]. The first PROBE_BATCHES were the probe's."""
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    warm_up_steps = max(cfg.steps // 20, 1)
    bar = tqdm(range(cfg.steps), "train", disable=not verbose)
    for step in bar:
        # The rate warms up over a twentieth of the steps, then decays to zero.
        lr = cfg.lr * min((step + 1) / warm_up_steps, 1 - step / cfg.steps)
        optimizer.param_groups[0]["lr"] = lr

        # The loss is the cross-entropy of the answers.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = model(**batch_of(prompts.PROBE_BATCHES + step)).loss
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; try a smaller --lr than {cfg.lr}")

        # Gradients flow down to the lowest adapted layer, but only the adapter's parameters keep them and change.
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
        if after_step is not None:
            after_step(step + 1, model)


def main(cfg: Config) -> None:
    """One run, then the controls. Saves OUT/metrics.json, an Image-LoRA as adapter.pt, pictures of clicks."""
    out = Path(cfg.out)
    make_directory(out)
    tuned = finetune(cfg)
    result = tuned.result | evaluate.measure_controls(cfg, tuned.model)
    report.print_controls_and_costs(result)

    for name in FILES:
        (out / name).unlink(missing_ok=True)  # Delete those of an earlier run, so that all of them are of the same run.
    if cfg.method == "image_lora":
        tuned.adapter.save(out / "adapter.pt")
    pictures.save(pictures.predictions(tuned.base_answers, tuned.answers), out / "predictions.png")
    write_file(out / "metrics.json", json.dumps(result, indent=1).encode())
    saved = [name for name in FILES if (out / name).exists()]
    print(f"saved    {' '.join(saved)} in {out}/")


if __name__ == "__main__":
    sys.exit(command(Config, main, __doc__))
