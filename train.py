"""Fine-tune the tiny VLM by Image-LoRA on a new kind of screen, and watch what the paper says happen.

    python train.py                  before, probe, select, train, after, cost: under a minute on two CPU cores
    python train.py --method lora    the same with standard LoRA (q, k, v, o of every layer, all tokens)
    python train.py --explain        a guided walk: one question through every step, tensor by tensor
    python train.py --pretrain       make a base model like data/tiny_vlm.pt from nothing
    python train.py --compare        every method, task, budget and seed: the tables of data/README.md
    python train.py --costs          what LoRA and Image-LoRA cost at the scale of real models
    python train.py ... --help       the settings of one of these

Shapes:  B sequences · T tokens · N screens · P visual tokens a screen · D hidden size · L layers · H value heads
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads wait for each other at full speed; before torch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imagelora
from data import SPLITS, Settings, figures, option, parse, progress, prompts
from data.compare import CompareConfig, compare
from data.costs import CostsConfig, changes, lora_costs, print_costs, run_costs, shape_of, watch
from data.pretrain import PretrainConfig, pretrain
from data.screens import DOMAINS
from tiny_vlm import TinyVLM

METHODS = ("image_lora", "lora", "none")
HEADS = ("top", "matched", "lowest", "random", "least", "all")
PROBES = ("rank1", "exact", "gate")


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
    lr: float = option(0.04, "peak learning rate of AdamW", least=0)
    gamma_lr: float = option(1.0, "gamma's rate as a multiple of lr; 0 keeps gamma at 1", least=0)
    steps: int = option(600, "training steps", least=1)
    screens: int = option(8, "screens a step", least=1)
    questions: int = option(5, "questions a screen, packed into one sequence", least=1)
    history: int = option(0, "word problems told before each screen: longer text, same image", least=0)
    replay: int = option(0, "word problems trained on before each screen", least=0)
    prior: bool = option(False, "train only on targets whose place is a function of their name")
    test_screens: int = option(200, "screens that the accuracies are measured on", least=1)
    split: str = option("test", "which screens those are", SPLITS)
    seed: int = option(0, "of the data's order, the adapter's start and the probe", least=0)
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    out: str = option("", "output directory, default runs/DOMAIN; of --explain runs/explain")
    resume: bool = option(False, "go on from OUT/checkpoint.pt")
    controls: bool = option(True, "measure trivial answers and other skills beside the task")
    film: bool = option(False, "write OUT/training.gif too, a moving picture of the clicks")

    def __post_init__(self):
        super().__post_init__()
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


def finetune(cfg: Config, checkpoint: dict | None = None) -> Iterator[tuple[str, dict]]:
    """base -> before -> heads -> step, step, ... -> after: yields (stage, what was found there).

    It prints and writes nothing: `main_job` does. checkpoint: what `main_job` kept of a step, to go on from."""
    start = time.time()
    model = load_base(cfg)
    yield "base", {"model": model}
    same = ("base", "task", "domain", "switches", "history", "test_screens", "split", "device", "controls")
    frozen = Config("none", **{name: getattr(cfg, name) for name in same})
    before, base_given = measure_base(frozen)
    base_text = prompts.text_logits(model)
    yield "before", {"before": before}

    data, batches = prompts.training_data(cfg, model.device)
    heads, result = None, {"heads_from": cfg.heads}
    if cfg.method == "image_lora":
        scores = head_scores(cfg, model, batches)
        heads = choose_heads(cfg, scores)
        result["scores"] = scores.tolist()
        yield "heads", {"scores": scores, "heads": heads}

    torch.manual_seed(cfg.seed)
    adapter = make_adapter(cfg, model, heads)
    result["heads"] = heads
    if adapter is not None:
        begun = time.time()
        yield from train(cfg, model, adapter, data, checkpoint)
        result["step_ms"] = 1000 * (time.time() - begun) / cfg.steps
        result |= run_costs(model, adapter, batches[0], cfg.method == "lora" and cfg.tokens == "all")
    after, given = prompts.measure(cfg, model)
    difference = prompts.text_logits(model) - base_text
    result |= {
        "before": before,
        "after": after,
        "text_logits_max_abs_diff": difference.abs().max().item(),
        **(controls(cfg, model, frozen) if cfg.controls and cfg.task == "grounding" else {}),
        "seconds": round(time.time() - start, 1),
        "device": str(model.device),
        "torch": torch.__version__,
    }
    yield "after", {"result": result, "model": model, "adapter": adapter, "given": [base_given, given]}


def controls(cfg: Config, model: TinyVLM, frozen: Config) -> dict:
    """What a click accuracy is to be held against: rules around the base's clicks, found on validation screens, and
    the tuned model before pictures without what is asked for."""
    learn = measure_base(replace(frozen, split="validation", controls=False))[1]
    return prompts.rules(learn, measure_base(frozen)[1]) | prompts.without_the_image(cfg, model)


def run(cfg: Config) -> dict:
    """`finetune` without prints and files: the Config's fields and what was measured."""
    torch.set_num_threads(1)
    *_, (_, found) = finetune(cfg)
    result = found["result"]
    return asdict(cfg) | result.pop("after") | result


def load_base(cfg: Config) -> TinyVLM:
    found = torch.accelerator.current_accelerator(check_available=True)
    there = [found.type, "cpu"] if found else ["cpu"]
    if cfg.device not in ("auto", *there):
        raise ValueError(f"device {cfg.device} is not available here; expected one of {', '.join(there)}")
    return TinyVLM.from_pretrained(prompts.base_path(cfg.base)).to(there[0] if cfg.device == "auto" else cfg.device)


@cache
def measure_base(frozen: Config) -> tuple[dict, list]:
    """`prompts.measure` of the model as it is, once a process."""
    return prompts.measure(frozen, load_base(frozen))


def train(cfg: Config, model: TinyVLM, adapter: nn.Module, data: tuple, checkpoint: dict | None) -> Iterator:
    """AdamW on the loss of the answers, the rate warmed up over a twentieth of the steps, then decayed to zero.

    Yields ("step", ...) before each update. Raises FloatingPointError at a loss that is not finite."""
    groups = [{"params": [], "scale": 1.0}, {"params": [], "scale": cfg.gamma_lr}]
    for name, parameter in adapter.named_parameters():
        groups[name.endswith("gamma")]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=0.0)
    first = 0
    if checkpoint:
        first = checkpoint["step"]
        adapter.load_state_dict(checkpoint["adapter"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    warm_up = max(cfg.steps // 20, 1)
    for step in range(first, cfg.steps):
        lr = cfg.lr * min((step + 1) / warm_up, 1 - step / cfg.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        batch, boxes = prompts.batch_of(cfg, data, prompts.PROBE_BATCHES + step)  # after the probe's
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            output = model(**batch)
        loss, click = output.loss.item(), None
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}; try a smaller --lr than {cfg.lr}")
        if cfg.task == "grounding" and not cfg.replay:
            click = prompts.hit_rate(output.logits, batch["labels"], boxes)
        found = {"step": step, "loss": loss, "click": click, "optimizer": optimizer}
        yield "step", found | {"model": model, "adapter": adapter}
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()


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
        return {layer: sorted(rng.permutation(num_heads)[: len(heads)].tolist()) for layer, heads in top.items()}
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
        for stage, found in finetune(cfg, checkpoint):
            if stage != "step":
                bar.clear()
                report(stage, cfg, found)
                continue
            step = found["step"]
            if step % 20 == 0:  # what is kept has just given a finite loss
                save_checkpoint(cfg, found, curve, out)
            if cfg.film and step % (cfg.steps // 32 + 1) == 0:
                film.append((step, prompts.few_answers(cfg, found["model"])))
            curve.append((step, found["loss"], found["click"]))
            clicks = [click for _, _, click in curve[-10:] if click is not None]
            shown = f"  click {np.mean(clicks):.0%}" if clicks else ""
            bar.set_postfix_str(f"loss {found['loss']:.3f}{shown}", refresh=False)
            bar.update()
    figures.save(figures.predictions(*found["given"]), out / "predictions.png")
    if found["adapter"] is not None:
        found["adapter"].save(out / "adapter.pt")
        figures.save(figures.curve(curve), out / "curve.png")
    if film:
        film.append((cfg.steps, prompts.few_answers(cfg, found["model"])))
        figures.save_moving(figures.moving(film), out / "training.gif")
    text = json.dumps(asdict(cfg) | found["result"], indent=1) + "\n"
    imagelora.safe_write(text.encode(), out / "metrics.json")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"saved    {out}/ {' '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")


def save_checkpoint(cfg: Config, found: dict, curve: list, out: Path) -> None:
    content = {
        "settings": asdict(cfg),
        "step": found["step"],
        "adapter": found["adapter"].state_dict(),
        "optimizer": found["optimizer"].state_dict(),
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


def report(stage: str, cfg: Config, found: dict) -> None:
    """The lines of a stage."""
    if stage == "base":
        model = found["model"]
        size = sum(p.numel() for p in model.parameters()) / 1e6
        name, patches = Path(cfg.base).name, model.config.num_patches
        print(f"base     {name} · {size:.2f} M parameters · {patches} visual tokens a screen · {model.device}")
    elif stage == "before":
        print(f"before   {prompts.score_line(cfg.domain, found['before'])}")
    elif stage == "heads":
        scores, heads = found["scores"], found["heads"]
        batches = f"{prompts.PROBE_BATCHES}×{cfg.screens} screens"
        print(f"probe    {cfg.probe} influence of {scores.numel()} heads, {batches}:  {figures.bars(scores, heads)}")
        chosen = " · ".join(f"layer {layer}: {' '.join(map(str, h))}" for layer, h in heads.items())
        print(f"select   {sum(map(len, heads.values()))} of {scores.numel()} heads: {chosen}")
    else:
        report_after(cfg, found["result"])


def report_after(cfg: Config, result: dict) -> None:
    print(f"after    {prompts.score_line(cfg.domain, result['after'])}")
    named = {
        "constant": "best constant",
        "name_offset": "base + an offset a name",
        "erased": "switches erased",
        "exchanged": "exchanged with their names",
    }
    shown = [f"{text} {result[f'{key}_acc']:.1%}" for key, text in named.items() if f"{key}_acc" in result]
    if shown:
        print(f"controls {' · '.join(shown)}")
    difference = result["text_logits_max_abs_diff"]
    verdict = f"{'changed' if difference else 'identical'} (max |difference| = {difference:.3g})"
    print(f"text     logits of 256 text-only prompts: {verdict}")
    if cfg.method == "none":
        return
    parameters, of_lora = result["trainable_parameters"], result["lora_trainable_parameters"]
    flops, lora, step = (result[f"{name}_flops_per_screen"] for name in ("adapter", "lora", "step"))
    counted = "counted = computed" if result["counted_flops_per_screen"] == flops else "counted differs from computed"
    small = f"cost     {parameters:,} parameters ({parameters / of_lora:.0%} of LoRA)"
    print(f"{small} · adapter {flops / 1e6:.2f} MFLOP a screen ({flops / lora:.0%} of LoRA), {counted}")
    print(f"         {flops / step:.1%} of the whole training step's {step / 1e6:.0f} MFLOP a screen")


# ---- The baseline: standard LoRA on whole Linear layers --------------------------------------------------------------


class LoRA(nn.Module):
    """y + (alpha / r) x A B on these projections of every language layer; the rest of the model is frozen.

    names: letters of q, k, v, o. visual_only: only the rows of visual tokens are updated, as in Image-LoRA.
    """

    def __init__(self, model: TinyVLM, r: int, lora_alpha: float, names: str = "qkvo", visual_only: bool = False):
        super().__init__()
        self.r, self.scaling = r, lora_alpha / r
        self.names, self.visual_only = names, visual_only
        self.shape = shape_of(model)
        self.enabled, self.rows = True, None
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()
        model.requires_grad_(False)
        model.register_forward_pre_hook(self._find_rows, with_kwargs=True)
        for layer in model.language_model.layers:
            for name in names:
                linear = getattr(layer.self_attn, f"{name}_proj")
                linear.register_forward_hook(partial(self._add, len(self.A)))
                A = torch.empty(linear.in_features, r, device=model.device)
                nn.init.kaiming_uniform_(A.T, a=math.sqrt(5))
                self.A.append(A)
                self.B.append(torch.zeros(r, linear.out_features, device=model.device))

    def _find_rows(self, model, args, kwargs) -> None:
        """The rows of B * T that are updated: None for all of them; inside `disabled()` none."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        visual = (ids == model.config.image_token_id).flatten() & self.enabled
        self.rows = None
        if self.visual_only or not self.enabled:
            self.rows = visual.nonzero().squeeze(1)

    def _add(self, i: int, linear, inputs, y: Tensor) -> Tensor:
        x = inputs[0].flatten(0, -2)  # [B * T, d_in]
        if self.rows is not None:
            x = x[self.rows]
        update = self.scaling * (x @ self.A[i]) @ self.B[i]
        if self.rows is None:
            return y + update.view_as(y)
        return y.flatten(0, -2).index_add(0, self.rows, update).view_as(y)

    @contextmanager
    def disabled(self):
        """Within it the model is the base model."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def flops(self, num_tokens: int) -> int:
        """FLOPs of the adapter in one training step (forward and backward) over so many tokens."""
        return lora_costs(*self.shape, num_tokens, self.r, self.names)[1]

    def save(self, path: Path) -> None:
        imagelora.safe_save({"r": self.r, "scaling": self.scaling, "lora": self.state_dict()}, path)


def make_adapter(cfg: Config, model: TinyVLM, heads: imagelora.Heads | None) -> nn.Module | None:
    if cfg.method == "image_lora":
        return imagelora.attach(model, cfg.r, cfg.lora_alpha, heads, cfg.normalize)
    if cfg.method == "none":
        return None
    return LoRA(model, cfg.r, cfg.lora_alpha, cfg.projections, visual_only=cfg.tokens == "visual")


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
    metrics = json.loads((out / "metrics.json").read_text()) if (out / "metrics.json").exists() else {}
    if differs(cfg, metrics | {"heads": metrics.get("heads_from")}):
        main_job(cfg)
    print()
    model = load_base(cfg)
    drawn, features = prompts.seen(cfg.base, cfg.domain, "test", 60, model.device)
    base_given = prompts.evaluate(model, drawn, features)[1]
    screen, sample, point = base_given[0]
    one = prompts.questions([sample], features[:1])
    station("1 prompt", f"<bos>, {model.config.num_patches} x <image>, {sample['instruction']}")
    station("", f"right is a click in the box {sample['bbox']}; the base model clicks {point}")
    batches = prompts.training_data(cfg, model.device)[1]
    scores = head_scores(cfg, model, batches)
    station("2 probe", "I(l, h) = ||dL/dB_l(h)||^2, a line a layer, the largest = 1", imagelora.score_heads)
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
    shown = prompts.four_of(given)
    asked = [prompts.questions([given[i][1]], features[[drawn.index(given[i][0])]]) for i in shown]
    place, looks = figures.where_it_looks(model, adapter, asked)
    screens, samples, after = zip(*(given[i] for i in shown))
    picture = figures.look(screens, samples, looks, [base_given[i][2] for i in shown], after, place)
    figures.save(picture, out / "look.png")
    station("12 picture", f"{out}/look.png: where head {place[1]} of layer {place[0]} looks, the most focused one")


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
        norms = tensor[rows].unflatten(1, (-1, attention.head_dim)).norm(dim=(0, 2)).tolist()
        station("", f"{name:9}" + "  ".join(f"{norm:6.2f}" for norm in norms))
    moved = changes(model, adapter, one)
    shown = ", ".join(f"{moved[f'q{layer}']:.0%} in layer {layer}" for layer in range(len(model.language_model.layers)))
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
