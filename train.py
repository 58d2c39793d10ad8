"""Fine-tune the tiny VLM with Image-LoRA on a new kind of screen, and see what that changes and what it cannot.

python train.py                  measure, probe, select, attach, train, turn down, measure again: a minute or so
python train.py --method lora    the same with standard LoRA (q, k, v, o, all tokens)

Image-LoRA is imagelora.py, and its rivals are in data/rivals.py. data/prompts.py makes the batches, data/replay.py the
other questions among them, data/evaluate.py measures, and data/report.py prints.

Shapes:  B sequences · T tokens · N screens · P patches, the visual tokens of a screen · D hidden size
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

# A thread that waits for others soon goes to sleep instead of spinning. Torch reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import imagelora
from data import evaluate, pictures, prompts, report
from data.base import find_device, load_base, screens_and_features
from data.command import command, make_directory, option, write_file
from data.costs import run_costs
from data.gamma import measure_curve, strengths
from data.replay import make_replay_data
from data.rivals import LoRA
from tiny_vlm import TinyVLM

# Validation screens of three tiny models chose these rates (data/study/README.md).
RATES = {"image_lora": 0.01, "lora": 0.0025, "partial_lora": 0.00125}
FILES = ("adapter.pt", "predictions.png", "metrics.json")  # what a run can leave in OUT


@dataclass
class Config:
    """One fine-tuning run. Its fields are options of the command line, too, except for the last two."""

    method: str = option("image_lora", "partial_lora is LoRA at visual tokens only", tuple(RATES))
    projections: str = option("qkvo", "what lora and partial_lora adapt", ("qkvo", "qk", "v", "mlp", "all"))
    base: str = option("data/tiny_vlm.pt", "the model to fine-tune, made by data.study.pretrain")
    heads: str = option("top", "top: by the probe; random: as many in each layer; all; or a list such as 1.3,2.0")
    num_heads: int = option(12, "how many of the 24 value heads are top or random", minimum=1)
    r: int = option(8, "rank; alpha is 2 r", minimum=1)
    gamma: float = option(1.0, "what the update is multiplied by after training, to turn it down", minimum=0)
    lr: float | None = option(None, f"AdamW's peak rate; None: the method's own, of {RATES}", minimum=0)
    steps: int = option(500, "training steps", minimum=1)
    text: int = option(0, "word problems before each screen: longer text, same image", minimum=0)
    vary_text: bool = option(False, "train with 0 to --text word problems, a number drawn anew for each step")
    hint: str = option("none", "question: training tells the correct place: <x3> <y5> click wifi", ("none", "question"))
    replay: int = option(0, "how many of the 16 sequences of a step hold other questions or word problems", minimum=0)
    seed: int = option(1, "seed for the order of the data, the adapter's initial A, and the probe", minimum=0)
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")
    out: str = option("runs/switches", "output directory")
    test_screens: int = 100  # new screens that a model is tested on, and about half as many old ones
    no_normalize: bool = False  # image_lora without selection-size normalization, the factor 1/sqrt|S|

    def __post_init__(self):
        is_image_lora = self.method == "image_lora"
        for name, need, is_there in (
            ("projections", "method lora or partial_lora", not is_image_lora),
            ("heads", "method image_lora", is_image_lora),
            ("no_normalize", "method image_lora", is_image_lora),
            ("num_heads", "heads top or random", is_image_lora and self.heads in ("top", "random")),
            ("vary_text", "text", self.text > 0),
        ):
            if not is_there and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} has no effect without {need}; leave it out")
        if not re.fullmatch(r"top|random|all|\d+\.\d+(,\d+\.\d+)*", self.heads):
            raise ValueError(f"heads must be top, random, all or a list such as 1.3,2.0, got {self.heads!r}")
        if self.replay > prompts.SCREENS_PER_STEP:
            raise ValueError(f"replay must be at most {prompts.SCREENS_PER_STEP}, the sequences of a step")
        if self.lr is None:
            self.lr = RATES[self.method]


class FinetuningRun(NamedTuple):
    result: dict  # the Config's fields and what was measured
    model: TinyVLM
    adapter: nn.Module
    base_answers: list[evaluate.Answer]
    answers: list[evaluate.Answer]


def run(cfg: Config) -> dict:
    """One run that writes no file and prints nothing. Returns the Config's fields and what was measured."""
    return finetune(cfg).result


def finetune(cfg: Config, verbose=False, after_step: Callable | None = None) -> FinetuningRun:
    """Measure the base, select heads, attach an adapter, train it, measure again. Writes no file."""
    start = time.time()
    model = load_base(cfg.base, find_device(cfg.device))
    check_adapter(cfg, model)

    # Screens, and what the frozen vision tower makes of them, [N, P, D]. So the tower never runs in training.
    train_data = screens_and_features(model, "new", "train", prompts.TRAIN_SCREENS)
    new_test = screens_and_features(model, "new", "test", cfg.test_screens)
    old_test = screens_and_features(model, "old", "test", cfg.test_screens // 2 + 1)  # these have more targets
    replay_data = make_replay_data(model, train_data, cfg.seed) if cfg.replay else None

    # Before training, measure the new task on new screens; other questions and the new task's own words on old screens;
    # word problems; and the logits of prompts without an image.
    before, base_answers = evaluate.measure(model, new_test, old_test, num_problems=cfg.text)
    base_logits = evaluate.text_only_logits(model)
    if verbose:
        report.print_before(cfg, model, before, replay_data)

    # The probe reads batches of the new task alone. Training may replay other questions, too.
    batch_of = partial(prompts.training_batch, cfg, train_data)
    heads = choose_heads(cfg, model, batch_of, verbose)
    adapter = attach_adapter(cfg, model, heads)
    train(cfg, model, adapter, partial(batch_of, replay_data=replay_data), after_step, verbose)

    # Turn the update down, and see what comes back. Then measure the same again, at the run's own gamma.
    curve = measure_curve(model, adapter, old_test, cfg.text)
    for gamma in strengths(adapter):
        gamma.mul_(cfg.gamma)
    after, answers = evaluate.measure(model, new_test, old_test, num_problems=cfg.text)
    if cfg.hint == "question":
        after |= evaluate.measure_hints(model, new_test)
    difference = (evaluate.text_only_logits(model) - base_logits).abs().max().item()
    if verbose:
        report.print_after(curve, after, difference)
    result = asdict(cfg) | {"selected": heads, "before": before, "curve": curve, "text_logits_max_abs_diff": difference}
    result |= after | run_costs(cfg, model, batch_of(0)["input_ids"], heads)
    result |= {"seconds": round(time.time() - start, 1), "device": model.device.type, "torch": torch.__version__}
    return FinetuningRun(result, model, adapter, base_answers, answers)


def check_adapter(cfg: Config, model: TinyVLM) -> None:
    """ValueError if the model cannot have this rank or these heads. It is better to fail before measuring."""
    D, num_heads = model.config.hidden_size, model.config.num_hidden_layers * model.config.num_key_value_heads
    if not 1 <= cfg.r <= D:
        raise ValueError(f"r must be in 1..{D}, the hidden size of the model, got {cfg.r}")
    if cfg.heads not in ("top", "random"):
        imagelora.attach(model, cfg.r, heads=choose_heads(cfg, model, batch_of=None)).detach()
    elif cfg.method == "image_lora" and not 1 <= cfg.num_heads <= num_heads:
        raise ValueError(f"num_heads must be in 1..{num_heads}, the value heads of the model, got {cfg.num_heads}")


def choose_heads(cfg: Config, model: TinyVLM, batch_of: Callable | None, verbose=False) -> imagelora.Heads | None:
    """The value heads to adapt, {layer: [head, ...]}, or None if the method is not image_lora.

    batch_of: as in `train`. For top and random, the probe reads its first batches. It does not change the model."""
    if cfg.method != "image_lora":
        return None
    heads = {}
    num_layers, H = model.config.num_hidden_layers, model.config.num_key_value_heads
    if cfg.heads == "all":
        return {layer: list(range(H)) for layer in range(num_layers)}
    if cfg.heads not in ("top", "random"):
        for layer, head in re.findall(r"(\d+)\.(\d+)", cfg.heads):
            heads.setdefault(int(layer), []).append(int(head))
        return heads
    scores = imagelora.score_heads(model, map(batch_of, range(prompts.PROBE_BATCHES)), seed=cfg.seed)  # [layers, heads]
    rng = np.random.default_rng(cfg.seed)
    for layer, top in imagelora.select_heads(scores, cfg.num_heads).items():
        heads[layer] = top if cfg.heads == "top" else sorted(rng.permutation(H)[: len(top)].tolist())
    if verbose:
        report.print_heads(scores, heads)
    return heads


def attach_adapter(cfg: Config, model: TinyVLM, heads: imagelora.Heads | None) -> nn.Module:
    """Freeze the model and attach the adapter of the method. It starts at B = 0, as the base model."""
    torch.manual_seed(cfg.seed)  # so that A does not depend on the random numbers that were drawn before
    if cfg.method == "image_lora":
        return imagelora.attach(model, cfg.r, 2 * cfg.r, heads, normalize=not cfg.no_normalize)
    return LoRA(model, cfg.r, 2 * cfg.r, cfg.projections, "visual" if cfg.method == "partial_lora" else "all")


def train(cfg: Config, model: TinyVLM, adapter: nn.Module, batch_of: Callable, after_step=None, verbose=False) -> None:
    """Train the adapter with AdamW. FloatingPointError if the loss is not finite.

    batch_of(index): 16 random screens with a question about each. That is input_ids and labels [B, T], the labels -100
    except on the answer, and image_features [B, P, D]. after_step(step, model), if given, is called after each step."""
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    warm_up_steps = max(cfg.steps // 20, 1)
    bar = tqdm(range(cfg.steps), "train", disable=not verbose)
    for step in bar:
        # The rate warms up over a twentieth of the steps, then decays to zero.
        optimizer.param_groups[0]["lr"] = cfg.lr * min((step + 1) / warm_up_steps, 1 - step / cfg.steps)

        # The loss is the cross-entropy of the answers. The first batches were the probe's.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = model(**batch_of(prompts.PROBE_BATCHES + step)).loss
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; try a smaller --lr than {cfg.lr}")

        # Gradients flow down to the lowest adapted layer, but only the adapter's parameters keep them and change.
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
        if after_step:
            after_step(step + 1, model)


def main(cfg: Config) -> None:
    """One run, then the controls. Saves OUT/metrics.json, an Image-LoRA as adapter.pt, pictures of clicks."""
    out = Path(cfg.out)
    make_directory(out)
    tuned = finetune(cfg, verbose=True)
    result = tuned.result | evaluate.measure_controls(cfg, tuned.model)
    report.print_controls_and_costs(result)
    for name in FILES:
        (out / name).unlink(missing_ok=True)  # Delete those of an earlier run, so that all of them are of the same run.
    if cfg.method == "image_lora":
        tuned.adapter.save(out / "adapter.pt")
    pictures.save_predictions(tuned.base_answers, tuned.answers, out / "predictions.png")
    write_file(out / "metrics.json", json.dumps(result, indent=1).encode())
    print(f"saved    {' '.join(name for name in FILES if (out / name).exists())} in {out}/")


if __name__ == "__main__":
    sys.exit(command(Config, main, __doc__))
