"""Fine-tune the tiny VLM by Image-LoRA on a new kind of screen, and watch what the paper says happen.

python train.py                  before, probe, select, train, after, cost: under a minute on two CPU cores
python train.py --method lora    the same with standard LoRA (q, k, v, o, all tokens)

python -m data.walk              a guided walk: one question through every step, tensor by tensor
python -m data.costs             what LoRA and Image-LoRA cost at the scale of real models
python -m data.study.compare     every method on three bases: the tables; data/study/ is the evidence
"""

import json
import math
import os
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # a thread that waits for another soon gives way; before torch

import torch
from torch import nn

import imagelora
from data import DEVICES, Settings, command, figures, option, progress, prompts
from data.baselines import LoRA, choose_heads, gate_scores
from data.costs import run_costs
from data.evaluate import Answer, film_frame, hit_rate, measure, measure_controls, score_line, text_only_logits
from data.prompts import find_device, load_base, training_batch, training_data
from tiny_vlm import TinyVLM

RATES = {"image_lora": 0.04, "lora": 0.005, "none": 0.0}  # best on switch screens: half of the heads; q, k, v, o


@dataclass(frozen=True)
class Config(Settings):
    """One fine-tuning run; each field is an option of the command line too."""

    method: str = option("image_lora", "none measures the frozen model", tuple(RATES))
    projections: str = option("qkvo", "of lora: which of q, k, v and o it adapts", ("qkvo", "v"))
    tokens: str = option("all", "of lora: those it adapts", ("all", "visual"))
    task: str = option("grounding", "grounding: name -> point; referring: point -> name", ("grounding", "referring"))
    domain: str = option("switches", "the kind of screen", ("switches", "dark", "source"))
    base: str = option("data/tiny_vlm.pt", "the model to fine-tune, made by data.study.pretrain")
    heads: str = option("top", "by the probe; gate: the authors'", ("top", "gate", "matched", "random", "all"))
    num_heads: int = option(12, "value heads to adapt", least=1)
    tau: float = option(0.0, "layer budget ~ influence^tau: 0 even, 0.5 the authors', above 1 in fewer layers", least=0)
    r: int = option(8, "rank; alpha is 2 r", least=1)
    lr: float | None = option(None, f"AdamW's peak rate; None: {RATES['image_lora']}, of lora {RATES['lora']}", least=0)
    gamma_lr: float = option(0.1, "gamma's rate as a multiple of lr; 0 keeps gamma at 1", least=0)
    steps: int = option(500, "training steps", least=1)
    history: int = option(0, "word problems told before each screen: longer text, same image", least=0)
    replay: int = option(0, "of a step's 8 sequences those that ask word problems after their image", least=0)
    test_screens: int = option(100, "screens that the accuracies are measured on", least=1)
    seed: int = option(1, "of the data's order, the adapter's start and the probe", least=0)
    device: str = option("auto", "where to compute", DEVICES)
    out: str = option("", "output directory, default runs/DOMAIN")
    film: bool = option(False, "write OUT/training.gif too, a moving picture of the clicks")

    def __post_init__(self):
        super().__post_init__()
        if self.film and self.task != "grounding":
            raise ValueError("the moving picture is one of clicks, so film needs the task grounding")
        if self.replay > prompts.SCREENS_PER_STEP:
            most = prompts.SCREENS_PER_STEP
            raise ValueError(f"replay must be at most {most}, the sequences of a step, got {self.replay}")


class Finetuned(NamedTuple):
    result: dict  # the Config's fields and what was measured
    model: TinyVLM
    adapter: nn.Module | None
    base_answers: list[Answer]
    answers: list[Answer]
    film: list[tuple[int, list[Answer]]]  # (step, a few answers)


def finetune(cfg: Config, say=print) -> Finetuned:
    """before -> probe, select -> attach -> train -> after. Writes no file; `say` is what prints a line."""
    start = time.time()
    model = load_base(cfg.base, find_device(cfg.device))
    cfg = replace(cfg, lr=RATES[cfg.method]) if cfg.lr is None else cfg
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    say(f"base     {Path(cfg.base).name} · {size} · {model.config.num_patches} visual tokens a screen · {model.device}")
    base_metrics, base_answers = measure(cfg, model)
    base_logits = text_only_logits(model)
    say(f"before   {score_line(cfg.domain, base_metrics)}")

    data = training_data(cfg, model.device)
    probe_batches = [training_batch(cfg, data, i)[0] for i in range(prompts.PROBE_BATCHES)]
    selected = adapter = None
    if cfg.method == "image_lora":
        selected = probe_and_select(cfg, model, probe_batches, say)
    torch.manual_seed(cfg.seed)  # after the probe, which draws numbers too
    if cfg.method == "image_lora":
        adapter = imagelora.attach(model, cfg.r, 2 * cfg.r, selected)
    elif cfg.method == "lora":
        adapter = LoRA(model, cfg.r, 2 * cfg.r, cfg.projections, visual_only=cfg.tokens == "visual")
    film = train(cfg, model, adapter, data, quiet=say is not print) if adapter else []

    metrics, answers = measure(cfg, model)
    difference = (text_only_logits(model) - base_logits).abs().max().item()
    say(f"after    {score_line(cfg.domain, metrics)}")
    verdict = "changed" if difference else "identical"
    say(f"text     logits of {len(base_logits)} text-only prompts: {verdict} (max |difference| = {difference:.3g})")
    result = asdict(cfg) | {"selected": selected, "before": base_metrics, "text_logits_max_abs_diff": difference}
    result |= metrics
    result |= run_costs(model, adapter, probe_batches[0], all_tokens=cfg.method == "lora" and cfg.tokens == "all")
    result |= {"seconds": round(time.time() - start, 1), "device": model.device.type, "torch": torch.__version__}
    return Finetuned(result, model, adapter, base_answers, answers, film)


def probe_and_select(cfg: Config, model: TinyVLM, batches: list[dict], say) -> imagelora.Heads:
    """The value heads to adapt: those that carry the image into the answer, or a control's."""
    if cfg.heads == "gate":
        scores = gate_scores(model, batches)
    else:
        scores = imagelora.score_heads(model, batches, seed=cfg.seed)
    selected = choose_heads(cfg.heads, scores, cfg.num_heads, cfg.tau, cfg.seed)
    say(f"probe    influence of {scores.numel()} heads, {len(batches)} batches:  {figures.bars(scores, selected)}")
    layers = [f"layer {layer}: {' '.join(map(str, heads))}" for layer, heads in selected.items()]
    say(f"select   {sum(map(len, selected.values()))} of {scores.numel()} heads: {' · '.join(layers)}")
    return selected


def train(cfg: Config, model: TinyVLM, adapter: nn.Module, data: tuple, quiet: bool) -> list:
    """AdamW on the loss of the answers, the rate warmed up over a twentieth of the steps, then decayed to zero.

    The vision tower is frozen and does not run here: it has run once over all screens, and a batch holds its features.
    Returns the film, [(step, a few answers)]. Raises FloatingPointError at a loss that is not finite."""
    gammas = [parameter for name, parameter in adapter.named_parameters() if name.endswith("gamma")]
    others = [parameter for name, parameter in adapter.named_parameters() if not name.endswith("gamma")]
    groups = [{"params": others, "scale": 1.0}, {"params": gammas, "scale": cfg.gamma_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm_up, on_gpu = max(cfg.steps // 20, 1), model.device.type == "cuda"
    film, losses, clicks = [], deque(maxlen=10), deque(maxlen=10)
    bar = progress(range(cfg.steps), "train", quiet=quiet)
    for step in bar:
        if cfg.film and figures.is_filmed(step, cfg.steps):
            film.append((step, film_frame(cfg, model)))
        rate = cfg.lr * min((step + 1) / warm_up, 1 - step / cfg.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]

        # 8 screens with 5 questions each: input_ids, labels [B, T], image_features [B, P, D]; the probe took the first
        batch, boxes = training_batch(cfg, data, prompts.PROBE_BATCHES + step)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            output = model(**batch)
        losses.append(output.loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}; try a smaller --lr than {cfg.lr}")
        optimizer.zero_grad()
        output.loss.backward()  # down to the lowest adapter; the base is frozen
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()

        status = f"loss {sum(losses) / len(losses):.2f}"
        if cfg.task == "grounding":
            clicks.append(hit_rate(output.logits, batch["labels"], boxes))
            status += f"  click {sum(clicks) / len(clicks):.0%}"
        bar.set_postfix_str(status, refresh=False)
    if cfg.film:
        film.append((cfg.steps, film_frame(cfg, model)))
    return film


def run(cfg: Config) -> dict:
    """`finetune` without prints: the Config's fields and what was measured."""
    return finetune(cfg, say=lambda line: None).result


# ---- What is shown and saved -----------------------------------------------------------------------------------------


def main_job(cfg: Config) -> None:
    """`finetune`, then controls and costs. Saves OUT/metrics.json, an Image-LoRA as adapter.pt, pictures of clicks."""
    out = Path(cfg.out or f"runs/{cfg.domain}")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # fails now, rather than after training
    done = finetune(cfg)
    result, saved = done.result, []
    if cfg.task == "grounding":
        result = result | measure_controls(cfg, done.model, done.base_answers)
        report_controls(result)
    if done.adapter:
        report_costs(result)
    (out / "metrics.json").unlink(missing_ok=True)  # of an earlier run; this one's comes last
    if cfg.method == "image_lora":
        done.adapter.save(out / "adapter.pt")
        saved.append("adapter.pt")
    if cfg.task == "grounding":
        figures.save([figures.predictions(done.base_answers, done.answers)], out / "predictions.png")
        saved.append("predictions.png")
    if done.film:
        figures.save(figures.moving(done.film), out / "training.gif")
        saved.append("training.gif")
    imagelora.safe_write(json.dumps(result, indent=1).encode(), out / "metrics.json")
    print(f"saved    {out}/ {' '.join(saved)} metrics.json")


def report_controls(result: dict) -> None:
    """The frozen base, moved by a rule and asked otherwise; the tuned model, where the switches are missing."""
    line = "controls base + an offset for each name {offset_acc:.1%}"
    if "erased_acc" in result:
        line += " · base, asked to click right of the name {reworded_acc:.1%}"
        line += "\n         tuned, switches erased {erased_acc:.1%}"
    print(line.format(**result))


def report_costs(result: dict) -> None:
    parameters, lora_parameters = result["trainable_parameters"], result["lora_trainable_parameters"]
    flops, lora, step = (result[f"{name}_flops_per_screen"] for name in ("adapter", "lora", "step"))
    counted = "counted = computed" if result["counted_flops_per_screen"] == flops else "counted differs from computed"
    small = f"cost     {parameters:,} parameters ({parameters / lora_parameters:.0%} of LoRA's, rank 8)"
    print(f"{small} · adapter {flops / 1e6:.2f} MFLOP per screen ({flops / lora:.0%} of LoRA's), {counted}")
    print(f"         {flops / step:.1%} of the decoder's training step, {step / 1e6:.0f} MFLOP per screen")


if __name__ == "__main__":
    sys.exit(command(Config, main_job, __doc__))
