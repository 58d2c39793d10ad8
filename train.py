"""Fine-tune the tiny VLM with Image-LoRA on a new kind of screen, and check what the paper says.

python train.py                  measure, probe, select, train, measure again: about a minute on two CPU cores
python train.py --method lora    the same with standard LoRA (q, k, v, o, all tokens)

Image-LoRA is imagelora.py. LoRA and Partial LoRA are in data/methods.py, with the settings of all methods compared.

python -m data.walk              a guided walk: one question through every step, tensor by tensor
python -m data.costs             what LoRA and Image-LoRA cost at the scale of real models
python -m data.study.compare     every method on several base models, and the tables of the pages
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from data.command import command, make_directory, option, write_file  # before torch: it sets how torch's threads wait

# isort: split
import torch
from torch import Tensor, nn
from tqdm import tqdm

import imagelora
from data import pictures, prompts
from data.base import find_device, load_base, screens_and_features
from data.costs import run_costs
from data.evaluate import Answer, measure, measure_controls, summary, text_only_changes, text_only_logits
from data.methods import Method, attach_adapter, choose_heads, gate_scores
from data.prompts import TrainingData, training_batch
from tiny_vlm import TinyVLM

# Chosen on switch screens, for Image-LoRA in all heads and for the others on q, k, v and o (data/study/README.md).
RATES = {"image_lora": 0.02, "lora": 0.0025, "partial_lora": 0.0025, "none": 0.0}
FILES = ("adapter.pt", "predictions.png", "metrics.json")  # what a run can leave in OUT


@dataclass
class Config(Method):
    """One fine-tuning run. Each field is an option of the command line, too.

    method, projections, heads, num_heads, r, train_gamma and replay are those of Method, in data/methods.py."""

    task: str = option("grounding", "grounding: name -> point; referring: point -> name", ("grounding", "referring"))
    base: str = option("data/tiny_vlm.pt", "the model to fine-tune, made by data.study.pretrain")
    lr: float | None = option(None, f"AdamW's peak rate; None: {RATES['image_lora']}, lora {RATES['lora']}", least=0)
    steps: int = option(500, "training steps", least=1)
    history: int = option(0, "word problems before each screen: longer text, same image", least=0)
    test_screens: int = option(100, "test screens of the task, and about half as many of the old task", least=1)
    seed: int = option(1, "seed for the order of the data, the adapter's initial A, and the probe", least=0)
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")
    out: str = option("runs/switches", "output directory")

    def __post_init__(self):
        if self.replay > prompts.SCREENS_PER_STEP:
            raise ValueError(f"replay must be at most {prompts.SCREENS_PER_STEP}, the sequences of a step")
        if self.lr is None:
            self.lr = RATES[self.method]


# ---- One run: measure, select, attach, train, measure ----------------------------------------------------------------


class FinetuningRun(NamedTuple):
    result: dict  # the Config's fields and what was measured
    model: TinyVLM
    adapter: nn.Module | None
    base_answers: list[Answer]
    answers: list[Answer]


def run(cfg: Config) -> dict:
    """One run that writes no file and prints nothing. Returns the Config's fields and what was measured."""
    return finetune(cfg).result


def finetune(cfg: Config, verbose=False, after_step: Callable | None = None) -> FinetuningRun:
    """Measure the base, select heads, attach an adapter, train it, measure again. Writes no file.

    after_step(step, model), if given, is called after each training step."""
    start = time.time()
    model = load_base(cfg.base, find_device(cfg.device))
    heads = None
    if cfg.method == "image_lora":
        # Choose by any scores now, so that heads which the model does not have are refused before anything is measured.
        any_scores = torch.ones(model.config.num_hidden_layers, model.config.num_key_value_heads)
        choose_heads(cfg.heads, any_scores, cfg.num_heads, cfg.seed)
    test = screens_and_features(model, "switches", "test", cfg.test_screens)
    # A screen without switches has more targets, so half as many screens are enough.
    old_test = screens_and_features(model, "source", "test", cfg.test_screens // 2 + 1)
    base_metrics, base_answers = measure(cfg, model, test, old_test)
    base_logits = text_only_logits(model)
    if verbose:
        print_base(cfg, model, base_metrics)

    data = training_data(cfg, model)
    probe_batches = [training_batch(cfg, data, i, probe=True) for i in range(prompts.PROBE_BATCHES)]
    if cfg.method == "image_lora":
        if cfg.heads == "gate":
            scores = gate_scores(model, probe_batches)
        else:
            scores = imagelora.score_heads(model, probe_batches, seed=cfg.seed)
        heads = choose_heads(cfg.heads, scores, cfg.num_heads, cfg.seed)
        if verbose:
            print_heads(scores, heads)

    adapter = attach_adapter(cfg, model, heads, cfg.seed)
    if adapter:
        train(cfg, model, adapter, data, verbose, after_step)

    metrics, answers = measure(cfg, model, test, old_test)
    result = {
        **asdict(cfg),
        "selected": heads,
        "before": base_metrics,
        **metrics,
        **text_only_changes(base_logits, text_only_logits(model)),
        **run_costs(cfg, model, probe_batches[0]["input_ids"], heads),
        "seconds": round(time.time() - start, 1),
        "device": model.device.type,
        "torch": torch.__version__,
    }
    if verbose:
        print_tuned(result)
    return FinetuningRun(result, model, adapter, base_answers, answers)


def training_data(cfg: Config, model: TinyVLM) -> TrainingData:
    """The training screens with switches and, if there is replay, as many without.

    The vision tower is frozen, so it runs here, once over each screen, and not in training."""
    count = min((prompts.PROBE_BATCHES + cfg.steps) * prompts.SCREENS_PER_STEP, prompts.TRAIN_SCREENS)
    screens, features = screens_and_features(model, "switches", "train", count)
    if not cfg.replay:
        return TrainingData(screens, features)
    return TrainingData(screens, features, *screens_and_features(model, "source", "train", count))


def train(cfg: Config, model: TinyVLM, adapter: nn.Module, data: TrainingData, verbose=False, after_step=None) -> None:
    """Train the adapter with AdamW. FloatingPointError if the loss is not finite."""
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    warm_up_steps = max(cfg.steps // 20, 1)
    on_gpu = model.device.type == "cuda"

    bar = tqdm(range(cfg.steps), "train", disable=not verbose)
    for step in bar:
        # The rate warms up over a twentieth of the steps, then decays to zero.
        lr = cfg.lr * min((step + 1) / warm_up_steps, 1 - step / cfg.steps)
        optimizer.param_groups[0]["lr"] = lr

        # 8 random screens, and five questions about each in one sequence (data/prompts.py, training_batch): input_ids
        # and labels [B, T], and image_features [B, P, D], what the vision tower has made of the screens. Training
        # begins after the PROBE_BATCHES that the probe has seen.
        batch = training_batch(cfg, data, prompts.PROBE_BATCHES + step)

        # The loss is the cross-entropy of the answers.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            output = model(**batch)
        loss = output.loss.item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}; try a smaller --lr than {cfg.lr}")

        # Gradients flow down to the lowest adapted layer, but only the adapter's parameters keep them and change.
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
        if after_step is not None:
            after_step(step + 1, model)


# ---- What is printed and saved ---------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    """One run, then the controls. Saves OUT/metrics.json, an Image-LoRA as adapter.pt, pictures of clicks."""
    out = Path(cfg.out)
    make_directory(out)
    tuned = finetune(cfg, verbose=True)
    result = tuned.result
    if cfg.task == "grounding":
        result = result | measure_controls(cfg, tuned.model)
        reworded = f"base, asked to click right of the name {result['reworded_acc']:.1%}"
        print(f"controls {reworded} · tuned, switches erased {result['erased_acc']:.1%}")
    if tuned.adapter:
        print_costs(result)

    for name in FILES:
        (out / name).unlink(missing_ok=True)  # Delete those of an earlier run, so that all of them are of the same run.
    if cfg.method == "image_lora":
        tuned.adapter.save(out / "adapter.pt")
    if cfg.task == "grounding":
        pictures.save([pictures.predictions(tuned.base_answers, tuned.answers)], out / "predictions.png")
    write_file(out / "metrics.json", json.dumps(result, indent=1).encode())
    saved = [name for name in FILES if (out / name).exists()]
    print(f"saved    {' '.join(saved)} in {out}/")


def print_base(cfg: Config, model: TinyVLM, metrics: dict) -> None:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{num_parameters / 1e6:.2f} M parameters · {model.config.num_patches} visual tokens a screen"
    print(f"base     {Path(cfg.base).name} · {size} · {model.device}")
    print(f"before   {summary(cfg.task, metrics)}")


def print_heads(scores: Tensor, heads: imagelora.Heads) -> None:
    """A bar for the score of each head, then the selected heads of each layer."""
    num_selected = sum(len(selected) for selected in heads.values())
    layers = [f"layer {layer}: {' '.join(map(str, selected))}" for layer, selected in heads.items()]
    bars = pictures.bars(scores, heads)
    print(f"probe    influence of {scores.numel()} heads, {prompts.PROBE_BATCHES} batches:  {bars}")
    print(f"select   {num_selected} of {scores.numel()} heads: {' · '.join(layers)}")


def print_tuned(result: dict) -> None:
    print(f"after    {summary(result['task'], result)}")
    difference = result["text_logits_max_abs_diff"]
    verdict = "changed" if difference else "identical"
    print(f"text     logits of 256 text-only prompts: {verdict} (max |difference| = {difference:.3g})")


def print_costs(result: dict) -> None:
    parameters = result["trainable_parameters"]
    flops = result["adapter_flops_per_screen"]
    size = f"{parameters:,} parameters ({parameters / result['lora_trainable_parameters']:.0%} of LoRA's, rank 8)"
    share_of_lora = f"{flops / result['lora_flops_per_screen']:.0%} of LoRA's"
    share_of_step = f"{flops / result['step_flops_per_screen']:.1%} of the step"
    print(f"cost     {size} · adapter {flops / 1e6:.2f} MFLOP per screen ({share_of_lora}, {share_of_step})")


if __name__ == "__main__":
    sys.exit(command(Config, main, __doc__))
