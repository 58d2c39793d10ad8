"""Fine-tune the tiny VLM by Image-LoRA on a new kind of screen, and watch what the paper says happen.

    python train.py                  before, probe, select, train, after, cost: under a minute on two CPU cores
    python train.py --method lora    the same with standard LoRA (q, k, v, o, all tokens)
    python train.py --explain        a guided walk: one question through every step, tensor by tensor
    python train.py --pretrain       make a base model like data/tiny_vlm.pt from nothing
    python train.py --compare        every method, task, budget and seed: the tables of data/README.md
    python train.py --costs          what LoRA and Image-LoRA cost at the scale of real models
    python train.py ... --help       the settings of one of these

Shapes:  B sequences · T tokens · N screens · P visual tokens per screen · D hidden size · L layers · H value heads
"""

import inspect
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # a thread that waits for another soon gives way; before torch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imagelora
from data import SPLITS, Settings, figures, option, parse, progress, prompts
from data.compare import CompareConfig, compare
from data.costs import CostsConfig, changes, print_costs, run_costs, watch
from data.lora import LoRA
from data.pretrain import PretrainConfig, pretrain
from data.screens import DOMAINS
from tiny_vlm import TinyVLM

METHODS = ("image_lora", "lora", "none")
HEADS = ("top", "matched", "lowest", "random", "least", "all")
PROBES = ("rank1", "exact", "gate")
RATES = {"image_lora": 0.08, "lora": 0.005}  # best on row: half of the heads; q, k, v, o (as good as 0.01)


@dataclass(frozen=True)
class Config(Settings):
    """One fine-tuning run; each field is an option of the command line too."""

    method: str = option("image_lora", "none measures the frozen model", METHODS)
    projections: str = option("qkvo", "of lora: which of q, k, v and o it adapts")
    tokens: str = option("all", "of lora: those it adapts", ("all", "visual"))
    task: str = option("grounding", "grounding: name -> point; referring: point -> name", ("grounding", "referring"))
    domain: str = option("row", "the kind of screen", DOMAINS)
    switches: str = option("shown", "in the pictures, of training and test", ("shown", "erased"))
    base: str = option(prompts.BASE, "the model to fine-tune, made by --pretrain")
    heads: str = option("top", f"{' | '.join(HEADS)}: by influence; or themselves, as '0:4,5 1:2' (layer:heads)")
    probe: str = option("rank1", "what scores the heads; gate: the authors' release", PROBES)
    num_heads: int = option(12, "value heads to adapt", least=1)
    tau: float = option(0.0, "layer budget ~ influence^tau: 0 even, 0.5 the authors', above 1 in fewer layers", least=0)
    r: int = option(8, "rank", least=1)
    lora_alpha: float = option(16.0, "the update is scaled by lora_alpha / r", least=0)
    normalize: bool = option(True, "scale by 1/sqrt|S| too")
    lr: float = option(
        0.0, f"peak learning rate of AdamW; 0 is {RATES['image_lora']}, of lora {RATES['lora']}", least=0
    )
    gamma_lr: float = option(0.1, "gamma's rate as a multiple of lr; 0 keeps gamma at 1", least=0)
    steps: int = option(500, "training steps", least=1)
    screens: int = option(8, "screens per step", least=1)
    questions: int = option(5, "questions per screen, packed into one sequence", least=1)
    history: int = option(0, "word problems told before each screen: longer text, same image", least=0)
    replay: int = option(0, "word problems trained on before each screen", least=0)
    prior: bool = option(False, "train only on targets whose place is a function of their name")
    test_screens: int = option(100, "screens that the accuracies are measured on", least=1)
    split: str = option("test", "which screens those are", SPLITS)
    seed: int = option(0, "of the data's order, the adapter's start and the probe", least=0)
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    out: str = option("", "output directory, default runs/DOMAIN")
    resume: bool = option(False, "go on from OUT/checkpoint.pt")
    controls: bool = option(True, "measure trivial answers and other skills beside the task")
    film: bool = option(False, "write OUT/training.gif too, a moving picture of the clicks")

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "lr", self.lr or RATES.get(self.method, 0.0))
        if self.heads not in HEADS:
            parse_heads(self.heads)
        if not self.projections or set(self.projections) - set("qkvo"):
            raise ValueError(f"projections must be letters of qkvo, got {self.projections!r}")


def parse_heads(text: str) -> imagelora.Heads:
    """'0:4,5 1:2' -> {0: [4, 5], 1: [2]}. Raises ValueError."""
    try:
        layers = [part.split(":") for part in text.split()]
        return {int(layer): [int(head) for head in heads.split(",")] for layer, heads in layers}
    except ValueError:
        raise ValueError(f"heads must be one of {', '.join(HEADS)} or like '0:4,5 1:2', got {text!r}") from None


# ---- The run: one procedure that computes, stage by stage ------------------------------------------------------------


def finetune(cfg: Config, checkpoint: dict | None = None) -> Iterator[tuple[str, SimpleNamespace]]:
    """base -> before -> heads -> step, step, ... -> after: yields (stage, all that is known by then).

    It prints and writes nothing: `main_job` does. checkpoint: what `main_job` kept of a step, to go on from."""
    start = time.time()
    now = SimpleNamespace(model=load_base(cfg), heads=None, scores=None)
    yield "base", now
    same = ("base", "task", "domain", "switches", "history", "test_screens", "split", "device", "controls")
    frozen = Config("none", **{name: getattr(cfg, name) for name in same})
    now.before, now.base_given = measure_base(frozen)
    base_text = prompts.text_logits(now.model)
    yield "before", now

    data, batches = prompts.training_data(cfg, now.model.device)
    if cfg.method == "image_lora":
        now.scores = head_scores(cfg, now.model, batches)
        now.heads = choose_heads(cfg, now.scores)
        yield "heads", now

    torch.manual_seed(cfg.seed)
    now.adapter = make_adapter(cfg, now.model, now.heads)
    now.result = {"heads": now.heads, "heads_from": cfg.heads}
    if now.adapter is not None:
        begun = time.time()
        yield from train(cfg, now, data, checkpoint)
        now.result["step_ms"] = 1000 * (time.time() - begun) / cfg.steps
        all_tokens = cfg.method == "lora" and cfg.tokens == "all"
        now.result |= run_costs(now.model, now.adapter, batches[0], all_tokens)
    after, now.given = prompts.measure(cfg, now.model)
    difference = prompts.text_logits(now.model) - base_text
    if cfg.task == "grounding":
        now.result["target_attention"] = prompts.looks(cfg, now.model).tolist()
    if cfg.controls and cfg.task == "grounding":
        learn = measure_base(replace(frozen, split="validation", controls=False))[1]
        now.result |= prompts.rules(learn, now.base_given) | prompts.without_the_image(cfg, now.model)
    now.result |= {
        "before": now.before,
        "after": after,
        "scores": None if now.scores is None else now.scores.tolist(),
        "text_logits_max_abs_diff": difference.abs().max().item(),
        "seconds": round(time.time() - start, 1),
        "device": str(now.model.device),
        "torch": torch.__version__,
    }
    yield "after", now


def run(cfg: Config) -> dict:
    """`finetune` without prints and files: the Config's fields and what was measured."""
    torch.set_num_threads(1)
    *_, (_, now) = finetune(cfg)
    return asdict(cfg) | now.result.pop("after") | now.result


def load_base(cfg: Config) -> TinyVLM:
    found = torch.accelerator.current_accelerator(check_available=True)
    there = [found.type, "cpu"] if found else ["cpu"]
    if cfg.device not in ("auto", *there):
        raise ValueError(f"device {cfg.device} is not available here; expected one of {', '.join(there)}")
    device = there[0] if cfg.device == "auto" else cfg.device
    path = prompts.base_path(cfg.base)
    return TinyVLM.from_pretrained(path).to(device)


@cache
def measure_base(frozen: Config) -> tuple[dict, list]:
    """`prompts.measure` of the model as it is, once a process."""
    return prompts.measure(frozen, load_base(frozen))


def train(cfg: Config, now: SimpleNamespace, data: tuple, checkpoint: dict | None) -> Iterator:
    """AdamW on the loss of the answers, the rate warmed up over a twentieth of the steps, then decayed to zero.

    Yields ("step", now) before each update. Raises FloatingPointError at a loss that is not finite."""
    groups = [{"params": [], "scale": 1.0}, {"params": [], "scale": cfg.gamma_lr}]
    for name, parameter in now.adapter.named_parameters():
        groups[name.endswith("gamma")]["params"].append(parameter)
    now.optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=0.0)
    if checkpoint:
        now.adapter.load_state_dict(checkpoint["adapter"])
        now.optimizer.load_state_dict(checkpoint["optimizer"])
    device, warm_up = now.model.device.type, max(cfg.steps // 20, 1)
    for now.step in range(checkpoint["step"] if checkpoint else 0, cfg.steps):
        decay = 1 - now.step / cfg.steps
        rate = min((now.step + 1) / warm_up, decay)
        for group in now.optimizer.param_groups:
            group["lr"] = cfg.lr * rate * group["scale"]
        batch, boxes = prompts.batch_of(cfg, data, prompts.PROBE_BATCHES + now.step)  # after the probe's
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            output = now.model(**batch)
        now.loss, now.click = output.loss.item(), None
        if not math.isfinite(now.loss):
            raise FloatingPointError(f"the loss is {now.loss} at step {now.step}; try a smaller --lr than {cfg.lr}")
        if cfg.task == "grounding" and not cfg.replay:
            now.click = prompts.hit_rate(output.logits, batch["labels"], boxes)
        yield "step", now
        now.optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(now.adapter.parameters(), 1.0)
        now.optimizer.step()


def head_scores(cfg: Config, model: TinyVLM, batches: list[dict]) -> Tensor:
    """Influence of every value head [L, H]."""
    if cfg.probe == "gate":
        return prompts.gate_scores(model, batches)
    return imagelora.score_heads(model, batches, probe=cfg.probe, seed=cfg.seed)


def choose_heads(cfg: Config, scores: Tensor) -> imagelora.Heads:
    """The heads that cfg.heads names; scores [L, H]. matched: random, with as many in each layer as the probe's."""
    if cfg.heads not in HEADS:
        return parse_heads(cfg.heads)
    num_heads, rng = scores.shape[1], np.random.default_rng(cfg.seed)
    if cfg.heads in ("top", "matched"):
        top = imagelora.select_heads(scores, cfg.num_heads, cfg.tau)
        if cfg.heads == "top":
            return top
        matched = {}
        for layer, heads in top.items():
            drawn = rng.permutation(num_heads)[: len(heads)]
            matched[layer] = sorted(drawn.tolist())
        return matched
    order = {
        "all": range(scores.numel()),
        "lowest": range(cfg.num_heads),
        "random": rng.permutation(scores.numel())[: cfg.num_heads],
        "least": scores.flatten().argsort()[: cfg.num_heads],
    }
    heads = {}
    for i in sorted(map(int, order[cfg.heads])):
        heads.setdefault(i // num_heads, []).append(i % num_heads)
    return heads


def make_adapter(cfg: Config, model: TinyVLM, heads: imagelora.Heads | None) -> nn.Module | None:
    if cfg.method == "image_lora":
        return imagelora.attach(model, cfg.r, cfg.lora_alpha, heads, cfg.normalize)
    if cfg.method == "none":
        return None
    return LoRA(model, cfg.r, cfg.lora_alpha, cfg.projections, visual_only=cfg.tokens == "visual")


# ---- What is shown and saved -----------------------------------------------------------------------------------------


def main_job(cfg: Config) -> None:
    """Shows what `finetune` finds, and saves OUT/metrics.json, adapter.pt, predictions.png and curve.png."""
    out = Path(cfg.out or f"runs/{cfg.domain}")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # fails now, rather than after training
    (out / "metrics.json").unlink(missing_ok=True)  # of an earlier run
    checkpoint = load_checkpoint(cfg, out) if cfg.resume else None
    curve, film = checkpoint["curve"] if checkpoint else [], []
    with progress(len(curve), cfg.steps, "train") as bar:
        for stage, now in finetune(cfg, checkpoint):
            if stage != "step":
                bar.clear()
                report(stage, cfg, now)
                continue
            if now.step % 20 == 0:  # what is kept has just given a finite loss
                save_checkpoint(cfg, now, curve, out)
            if cfg.film and now.step % (cfg.steps // 32 + 1) == 0:
                film.append((now.step, prompts.few_answers(cfg, now.model)))
            curve.append((now.step, now.loss, now.click))
            _, losses, clicks = zip(*curve[-10:])
            shown = "" if None in clicks else f"  click {np.mean(clicks):.0%}"
            bar.set_postfix_str(f"loss {np.mean(losses):.2f}{shown}", refresh=False)
            bar.update()
    figures.save(figures.predictions(now.base_given, now.given), out / "predictions.png")
    if now.adapter is not None:
        now.adapter.save(out / "adapter.pt")
        figures.save(figures.curve(curve), out / "curve.png")
    if film:
        film.append((cfg.steps, prompts.few_answers(cfg, now.model)))
        figures.save_moving(figures.moving(film), out / "training.gif")
    text = json.dumps(asdict(cfg) | now.result, indent=1) + "\n"
    imagelora.safe_write(text.encode(), out / "metrics.json")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"saved    {out}/ {' '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")


def save_checkpoint(cfg: Config, now: SimpleNamespace, curve: list, out: Path) -> None:
    content = {
        "settings": asdict(cfg),
        "step": now.step,
        "adapter": now.adapter.state_dict(),
        "optimizer": now.optimizer.state_dict(),
        "curve": curve,
    }
    imagelora.safe_save(content, out / "checkpoint.pt")


def load_checkpoint(cfg: Config, out: Path) -> dict | None:
    """OUT/checkpoint.pt, None where there is none. ValueError if it is of another run."""
    path = out / "checkpoint.pt"
    if not path.exists():
        print(f"resume   there is no {path}; from the start")
        return None
    saved = imagelora.safe_load(path)
    if name := differs(cfg, saved.get("settings", {})):
        raise ValueError(f"{path} is of a run with other settings; {name} is {getattr(cfg, name)!r} here")
    print(f"resume   from step {saved['step']} of {cfg.steps}")
    return saved


def differs(cfg: Config, settings: dict) -> str | None:
    """The first field that makes these settings those of another run."""
    for name, value in asdict(cfg).items():
        if name not in ("device", "out", "resume", "film") and settings.get(name) != value:
            return name


def report(stage: str, cfg: Config, now: SimpleNamespace) -> None:
    """The lines of a stage."""
    if stage == "base":
        size = sum(p.numel() for p in now.model.parameters()) / 1e6
        name, patches = Path(cfg.base).name, now.model.config.num_patches
        print(f"base     {name} · {size:.2f} M parameters · {patches} visual tokens per screen · {now.model.device}")
    elif stage == "before":
        print(f"before   {prompts.score_line(cfg.domain, now.before)}")
    elif stage == "heads":
        count = now.scores.numel()
        batches = f"{prompts.PROBE_BATCHES} batches of {cfg.screens} screens"
        print(f"probe    {cfg.probe} influence of {count} heads, {batches}:  {figures.bars(now.scores, now.heads)}")
        chosen = " · ".join(f"layer {layer}: {' '.join(map(str, h))}" for layer, h in now.heads.items())
        print(f"select   {sum(map(len, now.heads.values()))} of {count} heads: {chosen}")
    else:
        report_after(cfg, now.result)


def report_after(cfg: Config, result: dict) -> None:
    print(f"after    {prompts.score_line(cfg.domain, result['after'])}")
    rules = {
        "constant": "best constant",
        "offset": "base + an offset per kind",
        "name_offset": "per name",
    }
    changed = {
        "erased": "switches erased",
        "exchanged": "exchanged with their names",
    }
    for title, named in ("controls", rules), ("", changed):
        shown = [f"{text} {result[f'{key}_acc']:.1%}" for key, text in named.items() if f"{key}_acc" in result]
        if shown:
            print(f"{title:9}{' · '.join(shown)}")
    difference = result["text_logits_max_abs_diff"]
    verdict = f"{'changed' if difference else 'identical'} (max |difference| = {difference:.3g})"
    print(f"text     logits of 256 text-only prompts: {verdict}")
    if cfg.method == "none":
        return
    parameters, of_lora = result["trainable_parameters"], result["lora_trainable_parameters"]
    flops, lora, step = (result[f"{name}_flops_per_screen"] for name in ("adapter", "lora", "step"))
    counted = "counted = computed" if result["counted_flops_per_screen"] == flops else "counted differs from computed"
    small = f"cost     {parameters:,} parameters ({parameters / of_lora:.0%} of LoRA)"
    print(f"{small} · adapter {flops / 1e6:.2f} MFLOP per screen ({flops / lora:.0%} of LoRA), {counted}")
    print(f"         {flops / step:.1%} of the decoder's training step, {step / 1e6:.0f} MFLOP per screen")


# ---- A guided walk: one screen and one question through base, probe, selection, training steps and decoding ----------


def station(title: str, text: str, ran=None) -> None:
    """A line of the walk; `ran` is the function of imagelora.py that has just run."""
    where = f"   [imagelora.py:{inspect.getsourcelines(ran)[1]}]" if ran else ""
    print(f"{title:13}{text}{where}")


def explain(cfg: Config) -> None:
    """Print, station by station, the tensors of the method, their shapes and the numbers that matter.

    The adapter is that of the finished run in OUT; where there is none, it is made first."""
    if cfg.method != "image_lora" or cfg.task != "grounding":
        raise ValueError(f"the walk is one of image_lora and grounding, not of {cfg.method} and {cfg.task}")
    out = Path(cfg.out or f"runs/{cfg.domain}")
    path, metrics = out / "metrics.json", {}
    if path.exists():
        metrics = json.loads(path.read_text())
    if differs(cfg, metrics | {"heads": metrics.get("heads_from")}):
        main_job(cfg)
    print()
    model = load_base(cfg)
    drawn, features = prompts.seen(cfg.base, cfg.domain, "test", cfg.test_screens, model.device)
    base_given = prompts.evaluate(model, drawn, features)[1]
    screen, sample, point = base_given[0]
    one = prompts.questions([sample], features[:1])
    station("1 prompt", f"<bos>, {model.config.num_patches} x <image>, {sample['instruction']}")
    station("", f"right is a click in the box {sample['bbox']}; the base model clicks {point}")
    batches = prompts.training_data(cfg, model.device)[1]
    scores = head_scores(cfg, model, batches)
    station("2 probe", "I(l, h) = ||dL/dB_l(h)||^2, a line per layer, the largest = 1", imagelora.score_heads)
    for row in (scores / scores.max()).tolist():
        station("", "  ".join(f"{score:.2f}" for score in row))
    heads = choose_heads(cfg, scores)
    chosen = sum(map(len, heads.values()))
    station("3 selection", f"{chosen} of {scores.numel()} heads: {heads}", imagelora.select_heads)
    torch.manual_seed(cfg.seed)
    adapter = make_adapter(cfg, model, heads)
    values = adapter.layers[str(min(heads))]
    station("4 attach", f"layer {min(heads)}: A {list(values.A.shape)}, B {list(values.B.shape)} = 0", imagelora.attach)
    model(**batches[0]).loss.backward()
    norms = ", ".join(f"{name} {p.grad.norm():.2g}" for name, p in values.named_parameters())
    station("5 backward", f"norms of the gradients: {norms}; while B = 0, A and gamma have none")
    model, base_text = adapter.detach(), prompts.text_logits(model)

    adapter = imagelora.load(model, out / "adapter.pt")
    explain_update(model, adapter, one)
    change = (prompts.text_logits(model) - base_text).abs().max()
    station("9 text", f"logits of {len(base_text)} prompts without an image: max change {change:g}")
    explain_decoding(model, adapter, sample, features[:1])
    given = prompts.evaluate(model, drawn, features)[1]
    station("11 answer", f"{point} before, {given[0][2]} now; right is a click in {sample['bbox']}")
    place, before, after, shown = prompts.turned_head(cfg, model, adapter, base_given, given)
    figures.save(figures.look(shown, place), out / "look.png")
    station("12 picture", f"{out}/look.png: how head {place[1]} of layer {place[0]} has turned to the right targets;")
    station("", f"they had {before:.0%} of its attention and have {after:.0%} now")


def explain_update(model: TinyVLM, adapter: imagelora.ImageLoRA, one: dict) -> None:
    """What the adapter adds to the values of a prompt, in the lowest adapted layer."""
    lowest = min(adapter.heads)
    attention = model.language_model.layers[lowest].self_attn
    x, value = watch(model, one, v=attention.v_proj)["v"]
    base_value = F.linear(x, attention.v_proj.weight)[0]  # X W_V [T, H * d_h]
    update = value[0] - base_value
    rows = update.abs().sum(1).nonzero().squeeze(1)
    station("6 M X", f"trained; rows adapted: {rows[0]} .. {rows[-1]}, the image's", imagelora.ValueAdapter.add_update)
    station("7 update", f"layer {lowest}, norms over these rows by head:", imagelora.ValueAdapter.forward)
    for name, tensor in (("X W_V(h)", base_value), ("update", update)):
        by_head = tensor[rows].unflatten(1, (-1, attention.head_dim))  # [N, H, d_h]
        norms = by_head.norm(dim=(0, 2)).tolist()
        shown = "  ".join(f"{norm:6.2f}" for norm in norms)
        station("", f"{name:9}{shown}")
    moved = changes(model, adapter, one)
    layers = range(len(model.language_model.layers))
    shown = ", ".join(f"{moved[f'q{layer}']:.0%} in layer {layer}" for layer in layers)
    station("8 looking", f"queries moved by {shown}: the lowest adapted layer looks where it looked")


def explain_decoding(model: TinyVLM, adapter: imagelora.ImageLoRA, sample: dict, features: Tensor) -> None:
    """How many rows are adapted in each forward pass of an answer."""
    rows = []
    values = next(iter(adapter.layers.values()))
    counts = [
        model.register_forward_pre_hook(lambda module, inputs: rows.append(0)),
        values.register_forward_pre_hook(lambda module, inputs: rows.append(rows.pop() + len(inputs[0]))),
    ]
    prompts.answer(model, [sample], features)
    for count in counts:
        count.remove()
    station("10 decoding", f"rows adapted, by forward pass: {rows}", imagelora.ImageLoRA._find_rows)


# ---- The command line ------------------------------------------------------------------------------------------------


MODES = {  # option -> (its settings, the job)
    "--explain": (Config, explain),
    "--pretrain": (PretrainConfig, pretrain),
    "--costs": (CostsConfig, print_costs),
    "--compare": (CompareConfig, lambda cfg: compare(cfg, Config, run)),
}


def main(arguments: list[str]) -> int:
    """Runs a job; returns the exit status: 0, 1 the loss was not finite, 2 bad input, 130 interrupted."""
    mode = next((argument for argument in arguments if argument in MODES), "")
    config_class, job = MODES.get(mode, (Config, main_job))
    try:
        options = [argument for argument in arguments if argument != mode]
        job(parse(config_class, options, f"train.py {mode}".strip(), __doc__))
    except KeyboardInterrupt:
        goes_on = {"": " --resume", "--compare": ""}  # the others start anew
        again = shlex.join(a for a in arguments if a != "--resume") + goes_on.get(mode, "")
        print(f"\nstopped; {'go on' if mode in goes_on else 'start anew'} with: python train.py {again}")
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
