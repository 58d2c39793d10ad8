"""Fine-tune the tiny VLM by Image-LoRA on a new kind of screen, and watch what the paper says happen.

    python train.py                        before, probe, select, train, after, cost; about a minute on two CPU cores
    python train.py --method lora          the same with standard LoRA (q, k, v, o of every layer, all tokens)
    python train.py --explain              a guided walk: one question through every step, tensor by tensor
    python train.py --pretrain             make a base model like data/tiny_vlm.pt from nothing: base.pt
    python train.py --compare              all methods, prompts, budgets and seeds: the tables and figures of README

--help after one of these lists its settings.

Shapes:  B sequences · T tokens · N screens · P visual tokens a screen · D hidden size · L layers · H value heads
"""

import argparse
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import chain, product
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import imagelora
from data import figures, screens
from data.tokenizer import BOS, EOS, ID, IMAGE, PAD, VOCABULARY, decode, encode, parse_point
from data.word_problems import word_problem
from tiny_vlm import TinyVLM, TinyVLMConfig

PROBE_BATCHES = 16  # of training data; each has its own random A, so the more, the less noise
METHODS = ("image_lora", "lora", "lora_value", "none")
BASE = Path(__file__).parent / "data" / "tiny_vlm.pt"
FIGURES = BASE.parent / "figures"


def require(config, least: int, *names: str) -> None:
    """Raise ValueError where one of these fields is below `least`, not finite or too large."""
    for name in names:
        if not least <= getattr(config, name) < 2**63:
            raise ValueError(f"{name} must be finite and at least {least}, got {getattr(config, name)}")


@dataclass(frozen=True)
class Config:
    """The main job's settings; each field is a command-line option of the same name."""

    method: str = "image_lora"  # image_lora | lora (q, k, v, o, all tokens) | lora_value (v, all tokens) | none
    domain: str = "settings"  # settings | dark | blueprint | source
    num_heads: int = 10  # value heads to adapt (image_lora)
    r: int = 8  # rank
    lora_alpha: float = 16.0  # the update is scaled by lora_alpha / r
    tau: float = 4.0  # layer budget ~ influence^tau: 0 even, 1 proportional, above 1 in fewer layers
    lr: float = 1e-2  # peak learning rate of AdamW
    steps: int = 400  # training steps
    screens: int = 16  # screens a step
    questions: int = 4  # questions a screen, packed into one sequence
    history: int = 0  # word problems told before each screen: longer text, same image
    test_screens: int = 200  # screens that the accuracies are measured on
    seed: int = 0  # of the data, the adapter's start and the probe
    device: str = "auto"  # auto | cpu | cuda | mps
    out: str = ""  # output directory; default runs/DOMAIN
    resume: bool = False  # go on from OUT/checkpoint.pt

    def __post_init__(self):
        choices = {"method": METHODS, "domain": screens.DOMAINS, "device": ("auto", "cpu", "cuda", "mps")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        require(self, 1, "num_heads", "r", "steps", "screens", "questions", "test_screens")
        require(self, 0, "lora_alpha", "tau", "lr", "history", "seed")


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: <bos> [word problems] <image> * P, then questions with their answers; the loss is on answers only


def turn(sample: dict) -> tuple[list[int], list[int]]:
    """(ids, labels) of an instruction and its answer."""
    question, answer = encode(sample["instruction"]), encode(f"{sample['answer']} {EOS}")
    return question + answer, [-100] * len(question) + answer


def pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    """Rows of different lengths -> [B, T]."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for f, row in zip(fill, rows)])


def pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 images [side, side, 3] -> pixel_values [N, 3, side, side] in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def packed_batch(
    drawn, questions: int, history: int, rng, patches: int, first: int, refer=0.0, by_colour=0.0, learn_history=False
):
    """One sequence per screen: `history` word problems (numbered from `first`), the image, `questions` about it.

    Returns ({input_ids, labels}, boxes [B, questions] of the clicks, None where a point is given).
    """
    ids, labels, boxes = [], [], []
    for i, screen in enumerate(drawn):
        turns = [turn(word_problem("train", (first + i) * max(history, 1) + j)) for j in range(history)]
        if not learn_history:  # it is only read
            turns = [(tokens, [-100] * len(tokens)) for tokens, _ in turns]
        turns.append(([ID[IMAGE]] * patches, [-100] * patches))
        targets = screen.targets()
        boxes.append([])
        for _ in range(questions):
            element = targets[rng.integers(len(targets))]
            click, colour = rng.random() >= refer, rng.random() < by_colour
            ask = partial(screens.grounding, rng=rng, by_colour=colour) if click else screens.referring
            turns.append(turn(ask(screen, element)))
            boxes[-1].append(element.click if click else None)
        ids.append([ID[BOS]] + [t for tokens, _ in turns for t in tokens])
        labels.append([-100] + [t for _, tokens in turns for t in tokens])
    return {"input_ids": pad(ids, ID[PAD]), "labels": pad(labels, -100)}, boxes


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def answer(model: TinyVLM, prompts: list[str], images: list[np.ndarray] | None = None, history: int = 0) -> list[str]:
    """Greedy answers to questions, each about its image if there are images. Batches of 256, padded on the left."""
    answers = []
    for start in range(0, len(prompts), 256):
        chunk, context, features = prompts[start : start + 256], [], None
        if images is not None:
            shown = images[start : start + 256]
            unique = {id(image): image for image in shown}  # the vision encoder sees each screen once
            order = {key: i for i, key in enumerate(unique)}
            seen = model.get_image_features(pixels(list(unique.values())).to(model.device))
            features = seen[[order[id(image)] for image in shown]]  # [B, P, D]
            context = [t for j in range(history) for t in turn(word_problem("validation", j))[0]]
            context += [ID[IMAGE]] * model.config.num_patches
        rows = [[ID[BOS]] + context + encode(prompt) for prompt in chunk]
        ids = pad(rows, ID[PAD], left=True).to(model.device)
        mask = (ids != ID[PAD]).long()
        out = model.generate(ids, max_new_tokens=3, attention_mask=mask, image_features=features)
        answers += [decode(row) for row in out[:, ids.shape[1] :].tolist()]
    return answers


def evaluate(model: TinyVLM, domain: str, split: str, num_screens: int, history: int = 0) -> tuple[dict, list]:
    """Click accuracy by ScreenSpot's rule, every target of every screen asked once.

    Returns ({action_acc, text_acc, icon_acc, wrong_format_num, num_total}, [(screen, sample, point)])."""
    rng = np.random.default_rng(0)
    asked = [
        (screen, screens.grounding(screen, element, rng))
        for screen in (screens.draw_screen(domain, split, i) for i in range(num_screens))
        for element in screen.targets()
    ]
    answers = answer(model, [s["instruction"] for _, s in asked], [screen.image for screen, _ in asked], history)
    points = [parse_point(a) for a in answers]
    hits = np.array([screens.is_hit(point, sample["bbox"]) for point, (_, sample) in zip(points, asked)])
    kinds = np.array([sample["data_type"] for _, sample in asked])
    metrics = {
        "action_acc": float(hits.mean()),
        "text_acc": float(hits[kinds == "text"].mean()),
        "icon_acc": float(hits[kinds == "icon"].mean()),
        "wrong_format_num": sum(point is None for point in points),
        "num_total": len(points),
    }
    return metrics, [(screen, sample, point) for (screen, sample), point in zip(asked, points)]


def evaluate_word_problems(model: TinyVLM, split: str, count: int = 512) -> float:
    """Share of word problems whose final number is right."""
    problems = [word_problem(split, i) for i in range(count)]
    answers = answer(model, [p["instruction"] for p in problems])
    return float(np.mean([a.split()[-1:] == p["answer"].split()[-1:] for a, p in zip(answers, problems)]))


@torch.no_grad()
def text_logits(model: TinyVLM, count: int = 512) -> Tensor:
    """Logits of text-only prompts (test word problems with their answers) [count, T, V]."""
    ids = pad([[ID[BOS]] + turn(word_problem("test", i))[0] for i in range(count)], ID[PAD])
    return model(ids.to(model.device)).logits


# ---------------------------------------------------------------------------------------------------------------------
# The main job


def prepare(cfg: Config) -> tuple[TinyVLM, Path, int, int]:
    """The base model on its device, the output directory, and this process's rank of how many. ValueError, OSError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(cfg.device)
    if cfg.screens % world:
        raise ValueError(f"screens must be a multiple of the {world} processes, got {cfg.screens}")
    out = Path(cfg.out or f"runs/{cfg.domain}")
    model = load_base(BASE).to(device)
    heads_total = model.config.num_hidden_layers * model.config.num_key_value_heads
    if cfg.method == "image_lora" and cfg.num_heads > heads_total:
        raise ValueError(f"num_heads must be at most the base's {heads_total} value heads, got {cfg.num_heads}")
    if cfg.r > model.config.hidden_size:
        raise ValueError(f"r must be at most the base's hidden size {model.config.hidden_size}, got {cfg.r}")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # fails now, rather than after training
        (out / "metrics.json").unlink(missing_ok=True)  # of an earlier run
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return model, out, rank, world


def main_job(cfg: Config) -> None:
    """before -> probe -> select -> train -> after -> cost -> saved. Under torchrun, data-parallel."""
    start = time.time()
    model, out, rank, world = prepare(cfg)
    say = print if rank == 0 else lambda *args: None

    def measure() -> tuple[dict, list]:
        metrics, points = evaluate(model, cfg.domain, "test", cfg.test_screens, cfg.history)
        return metrics | {"word_problem_acc": evaluate_word_problems(model, "test")}, points

    size, where = sum(p.numel() for p in model.parameters()), f"{model.device}"
    where += f" · {world} processes" if world > 1 else ""
    patches = model.config.num_patches
    say(f"base     {BASE.name} · {size / 1e6:.2f} M parameters · {patches} visual tokens a screen · {where}")
    before, base_points = measure()
    base_text = text_logits(model)
    say(f"before   click accuracy on {cfg.domain} screens {accuracy_line(before)}")

    heads = None
    if cfg.method == "image_lora":
        probed = (training_batch(cfg, model, i)[0] for i in range(PROBE_BATCHES))
        scores = imagelora.score_heads(model, probed, seed=cfg.seed)
        heads = imagelora.select_heads(scores, cfg.num_heads, cfg.tau)
        shown = PROBE_BATCHES * cfg.screens
        say(f"probe    rank-1 influence of {scores.numel()} heads, {shown} screens:  {bars(scores, heads)}")
        chosen = " · ".join(f"layer {layer}: {' '.join(map(str, h))}" for layer, h in heads.items())
        say(f"select   {cfg.num_heads} of {scores.numel()} heads: {chosen}")

    torch.manual_seed(cfg.seed)
    adapter = make_adapter(model, cfg.method, cfg.r, cfg.lora_alpha, heads)
    after, tuned_points, difference, cost = before, base_points, 0.0, {}
    if adapter is not None:
        try:
            cost = train_adapter(cfg, model, adapter, out, rank, world)
        except Diverged as error:
            adapter.save(out / "adapter.pt")
            raise Diverged(f"{error}; {out / 'adapter.pt'} is the last good adapter") from None
        after, tuned_points = measure()
        difference = (text_logits(model) - base_text).abs().max().item()
    say(f"after    click accuracy on {cfg.domain} screens {accuracy_line(after)}")
    verdict = "identical" if difference == 0 else "changed"
    say(f"text     logits of {len(base_text)} text-only prompts: {verdict} (max |difference| = {difference:.3g})")
    if cost:
        parameters, flops = cost["trainable_parameters"], cost["adapter_flops_per_screen"]
        say(
            f"cost     {parameters:,} parameters ({parameters / cost['lora_trainable_parameters']:.0%} of LoRA)"
            f" · adapter {flops / 1e6:.2f} MFLOP a screen ({flops / cost['lora_flops_per_screen']:.0%} of LoRA),"
            f" {'counted = computed' if cost['counted_equals_computed'] else 'counted differs from computed'}"
        )
    if rank == 0:
        if adapter is not None:
            adapter.save(out / "adapter.pt")
        save_png(figures.predictions(base_points, tuned_points), out / "predictions.png")
        run = {"device": str(model.device), "torch": torch.__version__, "seconds": round(time.time() - start, 1)}
        result = {"before": before, "after": after, "text_logits_max_abs_diff": difference, "heads": heads}
        write_json(out / "metrics.json", asdict(cfg) | run | result | cost)
        (out / "checkpoint.pt").unlink(missing_ok=True)
        say(f"saved    {out}/ {'adapter.pt ' if adapter is not None else ''}metrics.json predictions.png")
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def training_batch(cfg: Config, model: TinyVLM, i: int, mine: slice = slice(None)) -> tuple[dict, list]:
    """Batch number i of the training data, of which the probe takes the first ones, and the boxes of its clicks."""
    first, rng = i * cfg.screens, np.random.default_rng([cfg.seed, i])
    drawn = [screens.draw_screen(cfg.domain, "train", first + j, cfg.seed) for j in range(cfg.screens)]
    batch, boxes = packed_batch(drawn, cfg.questions, cfg.history, rng, model.config.num_patches, first)
    batch["pixel_values"] = pixels([screen.image for screen in drawn])
    return {name: tensor[mine].to(model.device) for name, tensor in batch.items()}, boxes[mine]


def train_adapter(cfg: Config, model: TinyVLM, adapter: nn.Module, out: Path, rank: int, world: int) -> dict:
    """Train the adapter, this process on its share of each step's screens; returns its costs."""
    replica = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    precision = torch.autocast("cuda", torch.bfloat16) if model.device.type == "cuda" else nullcontext()
    share = cfg.screens // world
    mine = slice(rank * share, (rank + 1) * share)
    clicks = deque(maxlen=16 * cfg.screens * cfg.questions)  # of the last 16 steps, the answers given teacher-forced

    def loss_of(step):
        batch, boxes = training_batch(cfg, model, PROBE_BATCHES + step, mine)
        with precision:
            result = replica(**batch)
        answers = batch["labels"][:, 1:] >= 0  # each is x, y, <eos>
        words = [VOCABULARY[i] for i in result.logits[:, :-1][answers].argmax(-1).tolist()]
        given = [parse_point(f"{x} {y}") for x, y in zip(words[::3], words[1::3])]
        clicks.extend(screens.is_hit(point, box) for point, box in zip(given, chain.from_iterable(boxes)))
        return result.loss, f"loss {result.loss.item():.3f}  click {np.mean(clicks):.0%}"

    settings = json.dumps({k: v for k, v in asdict(cfg).items() if k not in ("device", "out", "resume")})
    files = {"checkpoint": out / "checkpoint.pt", "signature": settings, "resume": cfg.resume}
    with progress(cfg.steps, "train", quiet=rank > 0) as bar:
        tune(adapter, cfg.lr, cfg.steps, loss_of, bar, **files)
    batch, _ = training_batch(cfg, model, PROBE_BATCHES, mine)
    parameters, computed, counted = costs(model, adapter, batch)
    lora_parameters, lora = imagelora.lora_costs(*shape_of(model.config), batch["input_ids"].numel(), cfg.r)
    return {
        "trainable_parameters": parameters,
        "lora_trainable_parameters": lora_parameters,
        "adapter_flops_per_screen": computed / share,
        "lora_flops_per_screen": lora / share,
        "counted_equals_computed": counted == computed,
    }


def accuracy_line(m: dict) -> str:
    line = f"{m['action_acc']:6.1%}  (text {m['text_acc']:.1%}  icon {m['icon_acc']:.1%})"
    return line + (f"    word problems {m['word_problem_acc']:.1%}" if "word_problem_acc" in m else "")


def bars(scores: Tensor, heads: dict) -> str:
    """A bar for each head, layer by layer, scaled to the largest score; selected heads are bracketed."""
    height = (scores / scores.max().clamp(min=1e-30) * 8).ceil().int().tolist()
    layers = [
        "".join(
            f"[{' ▁▂▃▄▅▆▇█'[v]}]" if h in heads.get(layer, []) else f" {' ▁▂▃▄▅▆▇█'[v]} " for h, v in enumerate(row)
        )
        for layer, row in enumerate(height)
    ]
    return " · ".join(layers)


# ---------------------------------------------------------------------------------------------------------------------
# A guided walk: one screen and one question through base, probe, selection, a training step and decoding


@torch.no_grad()
def watch(model: TinyVLM, batch: dict, **modules: nn.Module) -> dict[str, Tensor]:
    """What these modules put out in one forward pass, and the logits."""
    seen = {}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
        for name, module in modules.items()
    ]
    seen["logits"] = model(**batch).logits
    for hook in hooks:
        hook.remove()
    return seen


@dataclass(frozen=True)
class ExplainConfig:
    """The walk's settings; all others are those of the main job."""

    domain: str = "settings"  # settings | dark | blueprint | source
    seed: int = 0  # of the data, the adapter's start and the probe


def explain(given: ExplainConfig) -> None:
    """Print, station by station, the tensors of the method, their shapes and the numbers that matter."""
    cfg, model = Config(**asdict(given)), load_base(BASE)
    patches = model.config.num_patches
    screen = screens.draw_screen(cfg.domain, "test", 0)
    sample = screens.grounding(screen, screen.targets()[0], np.random.default_rng(cfg.seed))
    question = encode(sample["instruction"])
    ids = torch.tensor([[ID[BOS]] + [ID[IMAGE]] * patches + question])
    one = {"input_ids": ids, "pixel_values": pixels([screen.image])}

    def asked() -> str:
        return decode(model.generate(**one, max_new_tokens=3)[0, ids.shape[1] :].tolist())

    def show(station: str, text: str) -> None:
        print(f"{station:15}{text}")

    show("1 the prompt", f"input_ids {list(ids.shape)}: <bos>, <image> x {patches}, {sample['instruction']}")
    show("", f"the right answer {sample['answer']} (a cell of 16 x 16), the base model's {asked()}")
    visual = imagelora.VisualRows([model.config.image_token_id])
    visual.begin(model, (), one)
    ((rows, _),) = visual.running.values()
    show("2 M", f"the rows of visual tokens [{len(rows)}]: {rows[0]} .. {rows[-1]} of 0 .. {ids.numel() - 1}")

    batches = [training_batch(cfg, model, i)[0] for i in range(PROBE_BATCHES + 1)]
    scores = imagelora.score_heads(model, batches[:-1], seed=cfg.seed)
    show("3 probe", f"I(l, h) = ||dL/dB_l(h)||^2, {PROBE_BATCHES} batches {list(scores.shape)}, the largest = 1")
    for layer, row in enumerate((scores / scores.max()).tolist()):
        show("", f"layer {layer}   " + "  ".join(f"{score:.2f}" for score in row))
    heads = imagelora.select_heads(scores, cfg.num_heads, cfg.tau)
    show("4 selection", f"heads {heads}: {cfg.num_heads} of {scores.numel()} heads")

    torch.manual_seed(cfg.seed)
    adapter = imagelora.attach(model, cfg.r, cfg.lora_alpha, heads)
    layer, first = next(iter(heads)), next(iter(adapter.layers.values()))
    attention = model.language_model.layers[layer].self_attn
    parts = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "output": attention.o_proj}
    with adapter.disabled():
        base, base_text = watch(model, one, **parts), text_logits(model, 8)
    show("5 attach", f"layer {layer}: A {list(first.A.shape)}, B {list(first.B.shape)} = 0, gamma = 1")
    show("", f"logits as the base model's: {torch.equal(watch(model, one)['logits'], base['logits'])}")

    optimizer, batch = torch.optim.AdamW(adapter.parameters(), lr=cfg.lr, weight_decay=0.0), batches[-1]
    loss = model(**batch).loss
    loss.backward()
    norms = ", ".join(f"{name} {p.grad.norm().item():.2g}" for name, p in first.named_parameters())
    optimizer.step()
    show("6 a step", f"at the full rate; gradient norms: {norms}; with B = 0, A and gamma have none yet")
    show("", f"loss {loss.item():.3f} -> {model(**batch).loss.item():.3f}")

    tuned = watch(model, one, **parts)
    change = {name: (tuned[name] - base[name])[0] for name in base}  # [T, ...]
    moved = change["v"].abs().sum(1).nonzero().squeeze(1)
    by_head = change["v"].unflatten(1, (-1, attention.head_dim)).norm(dim=(0, 2)).tolist()
    show("7 values", f"X W_V + update {list(tuned['v'].shape)} changed in rows {moved[0]} .. {moved[-1]}; by head:")
    show("", "  ".join(f"{norm:.3f}" for norm in by_head))
    queries, keys = (change[name].abs().max() for name in "qk")
    text = change["output"][(ids[0] != model.config.image_token_id)].norm(dim=1).tolist()
    show("8 attention", f"queries changed by {queries:g}, keys by {keys:g}: where to look is unchanged; the output")
    show("", f"at the text tokens <bos> {sample['instruction']} by " + ", ".join(f"{norm:.3f}" for norm in text))
    show("", "(<bos> stands before the image)")
    show("9 logits", f"with the image: max change {change['logits'].abs().max():.3f}; the answer is now {asked()}")
    show("", f"(after one step of the {cfg.steps} that python train.py takes)")
    show("", f"8 text-only prompts: max change {(text_logits(model, 8) - base_text).abs().max():g}")

    gathered = []  # at each call of the layer's v_proj
    hook = attention.v_proj.register_forward_hook(lambda m, x, y: gathered.append(len(adapter.visual.rows_for(x[0]))))
    asked()
    hook.remove()
    show("10 decoding", f"visual rows adapted in prefill and in each step after it: {gathered}; the cache has the rest")
    show("11 cost", f"{adapter.flops(patches):,} FLOP a screen, forward and backward; {adapter.extra_repr()}")


# ---------------------------------------------------------------------------------------------------------------------
# The training loop, of the adapters and of the base model


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the checkpoint was written."""


class Diverged(Exception):
    """The loss is NaN or infinite."""


def same_form(a, b) -> bool:
    """Whether a has the keys, types and shapes of b, and only finite tensors."""
    if isinstance(b, Tensor):
        form = [(t.shape, t.dtype, t.layout, t.is_meta) for t in (a, b) if isinstance(t, Tensor)]
        return len(form) == 2 and form[0] == form[1] and bool(a.isfinite().all())
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(same_form(a[k], b[k]) for k in b)
    if isinstance(b, list):
        return isinstance(a, list) and len(a) == len(b) and all(map(same_form, a, b))
    return type(a) is type(b)


class Stop:
    """Turns Ctrl-C and SIGTERM into a flag that the training loop reads after each step, where it has a checkpoint."""

    def __init__(self, signals):
        self.requested, self.signals = False, signals

    def __enter__(self):
        self.before = {s: signal.signal(s, self._request) for s in self.signals}
        return self

    def _request(self, number, frame):
        self.requested = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train_loop(
    module, optimizers, steps, schedule, loss_of, bar, checkpoint=None, signature="", resume=False, every=100
):
    """Train `module` from step 0, or from `checkpoint` with resume=True, to `steps`.

    loss_of(step) -> (loss, text for the bar); schedule(step / steps) scales the learning rates. All randomness is a
    function of the step, so a resumed run repeats an uninterrupted one. The checkpoint is written every `every` steps
    and on Interrupted. Raises ValueError where the checkpoint is of another run, Diverged at a loss that is not finite.
    """
    start, rank0 = 0, not bar.disable
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    peak = [[group["lr"] for group in o.param_groups] for o in optimizers]

    def content(step):
        states = [o.state_dict()["state"] for o in optimizers]
        return {"signature": signature, "step": step, "module": module.state_dict(), "optimizers": states}

    if resume and checkpoint.exists():
        saved = imagelora.safe_load(checkpoint)
        if saved.get("signature") != signature:
            raise ValueError(f"{checkpoint} is of a run with other settings than {signature}")
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()  # fills its state, to compare the saved one with
        if not same_form(saved, content(0)) or not 0 <= saved["step"] <= steps:
            raise ValueError(f"{checkpoint} does not fit this run; delete it to start again")
        module.load_state_dict(saved["module"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        start = saved["step"]
        bar.update(start)
    if resume and rank0:
        tqdm.write(f"resume   from step {start} of {steps}" + ("" if start else f" (there is no {checkpoint})"))

    def save(step):
        if checkpoint and rank0:
            imagelora.safe_save(content(step), checkpoint)

    good = [p.detach().clone() for p in parameters]  # the last with which the loss was finite
    with Stop((signal.SIGINT, signal.SIGTERM) if checkpoint else ()) as stop:
        for step in range(start, steps):
            for optimizer, rates in zip(optimizers, peak):
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * schedule(step / steps)
            loss, text = loss_of(step)
            if not loss.isfinite():
                for parameter, last in zip(parameters, good):
                    parameter.data.copy_(last)
                raise Diverged(f"the loss is {loss.item()} at step {step}; try a smaller --lr than {peak[-1][-1]}")
            good = [p.detach().clone() for p in parameters]
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            bar.set_postfix_str(text, refresh=False)
            bar.update()
            if torch.distributed.is_initialized():  # all processes stop after the same step
                flag = torch.tensor(float(stop.requested), device=parameters[0].device)
                torch.distributed.all_reduce(flag)
                stop.requested = flag.item() > 0
            if stop.requested or (step + 1) % every == 0 or step + 1 == steps:
                save(step + 1)
            if stop.requested:
                raise Interrupted(f"stopped after step {step + 1} of {steps}")


def tune(adapter: nn.Module, lr: float, steps: int, loss_of, bar, **checkpoint) -> None:
    """`train_loop` of an adapter: AdamW, the rate warmed up over 20 steps and decayed to zero linearly."""
    optimizers = [torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)]

    def schedule(done):
        return min((done * steps + 1) / 20, 1 - done)

    train_loop(adapter, optimizers, steps, schedule, loss_of, bar, **checkpoint)


def progress(total: int, name: str, quiet: bool = False) -> tqdm:
    layout = "{desc:<9}|{bar:24}| {n_fmt}/{total_fmt}{postfix}  {elapsed} < {remaining}"
    return tqdm(total=total, desc=name, bar_format=layout, disable=quiet)


# ---------------------------------------------------------------------------------------------------------------------
# The baseline: standard LoRA on whole Linear layers and all tokens


def shape_of(config: TinyVLMConfig) -> tuple[int, int, int, int, int]:
    """Layers, hidden size, query heads, value heads, head size: what `imagelora.lora_costs` takes."""
    heads = config.num_attention_heads
    return config.num_hidden_layers, config.hidden_size, heads, config.num_key_value_heads, config.hidden_size // heads


class LoRA(nn.Module):
    """y + (alpha / r) x A B on the named projections of every language layer; the rest of the model is frozen."""

    def __init__(self, model: TinyVLM, r: int, lora_alpha: float, targets=("q_proj", "k_proj", "v_proj", "o_proj")):
        super().__init__()
        self.r, self.scaling, self.enabled = r, lora_alpha / r, True
        self.shape, self.names = shape_of(model.config), [t[0] for t in targets]
        self.linears = [getattr(layer.self_attn, t) for layer in model.language_model.layers for t in targets]
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for i, linear in enumerate(self.linears):
            self.A.append(nn.Parameter(torch.empty(linear.in_features, r, device=model.device)))
            self.B.append(nn.Parameter(torch.zeros(r, linear.out_features, device=model.device)))
            nn.init.kaiming_uniform_(self.A[i].T, a=math.sqrt(5))
            linear.register_forward_hook(partial(self._add, i))
        model.requires_grad_(False)
        model.lora = self

    def _add(self, i: int, linear, inputs, y: Tensor) -> Tensor:
        return y + (self.scaling * (inputs[0] @ self.A[i])) @ self.B[i] if self.enabled else y

    @contextmanager
    def disabled(self):
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def flops(self, num_tokens: int) -> int:
        """FLOPs in one training step (forward and backward) over so many tokens."""
        return imagelora.lora_costs(*self.shape, num_tokens, self.r, self.names)[1]

    def save(self, path) -> None:
        imagelora.safe_save({"r": self.r, "scaling": self.scaling, "lora": self.state_dict()}, path)


def make_adapter(model, method: str, r: int, lora_alpha: float, heads: dict | None, normalize=True) -> nn.Module | None:
    """The adapter of a method of METHODS on the model."""
    if method == "image_lora":
        return imagelora.attach(model, r, lora_alpha, heads, normalize)
    if method == "none":
        model.requires_grad_(False)
        return None
    return LoRA(model, r, lora_alpha, *([("v_proj",)] if method == "lora_value" else []))


@contextmanager
def constant_added(modules: list[nn.Module]):
    """Within it the outputs of these modules need a gradient, as those of adapted ones do.

    A frozen model has no backward pass at all; with this constant it has the one that an adapter causes."""
    constant = torch.zeros((), device=next(modules[0].parameters()).device, requires_grad=True)
    handles = [module.register_forward_hook(lambda module, inputs, y: y + constant) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_training_flops(model: TinyVLM, adapter: nn.Module, batch: dict) -> int:
    """The adapter's FLOPs in one training step as PyTorch counts them: those of a step with it, less those of the same
    step with only a constant added to the adapted projections."""
    if isinstance(adapter, LoRA):
        adapted = adapter.linears
    else:
        adapted = [model.language_model.layers[layer].self_attn.v_proj for layer in adapter.heads]

    def step() -> int:
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        return counter.get_total_flops()

    with_adapter = step()
    with adapter.disabled(), constant_added(adapted):
        floor = step()
    adapter.zero_grad()
    return with_adapter - floor


def costs(model: TinyVLM, adapter: nn.Module, batch: dict) -> tuple[int, int, int]:
    """The adapter's trainable parameters and its FLOPs in a training step on this batch, computed and counted."""
    ids = batch["input_ids"]
    tokens = ids.numel() if isinstance(adapter, LoRA) else int((ids == ID[IMAGE]).sum())
    counted = count_training_flops(model, adapter, batch)
    return sum(p.numel() for p in adapter.parameters()), adapter.flops(tokens), counted


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining: a base whose vision encoder has seen every domain but blueprint, whose questions were all of `source`

# what a visual token should decode to: what it shows, its colour, and the x and y of the element's centre
LENS = [[*screens.LABELS, *screens.ICONS, "switch"], list(screens.COLOURS)]
LENS += [[f"<{axis}{i}>" for i in range(screens.BINS)] for axis in "xy"]


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining settings; each field is a command-line option of the same name (after --pretrain)."""

    steps: int = 4000  # training steps
    screens: int = 16  # source screens with questions a step
    questions: int = 6  # questions a screen
    refer: float = 0.25  # share of questions that give the point and ask what is there
    by_colour: float = 0.3  # share of questions that name an icon by its colour alone, where that is enough
    settings_screens: int = 4  # settings screens a step, seen by the vision loss only
    dark_screens: int = 2  # dark screens a step, seen by the vision loss only, for what is there but not where
    muon_lr: float = 0.02  # peak learning rate of Muon for matrices
    lr: float = 2e-3  # peak learning rate of AdamW for embeddings, norms and biases
    seed: int = 0  # of the data and the model's start
    out: str = "base.pt"  # file to write; train.py uses data/tiny_vlm.pt
    resume: bool = False  # go on from the checkpoint beside it

    def __post_init__(self):
        require(self, 1, "steps", "screens", "questions")
        require(self, 0, "refer", "by_colour", "settings_screens", "dark_screens", "muon_lr", "lr", "seed")


def lens_targets(screen: screens.Screen, patch: int, where: bool) -> np.ndarray:
    """[4, P] indices into the lists of LENS, -100 where a patch shows no element; where=False leaves out x and y.

    A patch shows an element when it overlaps half of the patch or half of the element."""
    side = screens.SIZE // patch
    targets = np.full((4, side, side), -100)
    for element in screen.elements:
        left, top, right, bottom = element.bbox
        x, y = screens.centre_bins(element.bbox)
        for row in range(top // patch, (bottom - 1) // patch + 1):
            for column in range(left // patch, (right - 1) // patch + 1):
                width = min(right, (column + 1) * patch) - max(left, column * patch)
                height = min(bottom, (row + 1) * patch) - max(top, row * patch)
                if 2 * width * height >= min((right - left) * (bottom - top), patch * patch):
                    colour = LENS[1].index(element.colour) if element.colour else -100
                    place = (x, y) if where else (-100, -100)
                    targets[:, row, column] = LENS[0].index(element.name), colour, *place
    return targets.reshape(4, -1)


def lens_loss(model: TinyVLM, features: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of visual tokens [N, P, D] read through the tied token embeddings, summed over the four lists."""
    loss = torch.zeros(())
    for i, words in enumerate(LENS):
        shown = targets[:, i] >= 0  # [N, P]
        embeddings = model.language_model.embed_tokens.weight[[ID[w] for w in words]]
        if shown.any():
            loss = loss + F.cross_entropy(scale * features[shown] @ embeddings.T, targets[:, i][shown])
    return loss


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices: momentum, of which each step takes the nearest orthogonal matrix.

    As torch.optim.Muon, but in float32: that one's bfloat16 is ten times slower on CPUs without such instructions.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:
                matrices = [p for p in group["params"] if p.shape == shape]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in matrices]
                for p, momentum in zip(matrices, momenta):
                    momentum.lerp_(p.grad, 0.05)
                x = torch.stack([p.grad.lerp(m, 0.95) for p, m in zip(matrices, momenta)])  # Nesterov's [M, n, m]
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                tall = shape[0] > shape[1]
                x = x.mT if tall else x  # so that the Gram matrices are the smaller ones
                for _ in range(5):  # Newton-Schulz: singular values towards 1
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                for p, update in zip(matrices, x.mT if tall else x):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5)


def pretrain(cfg: PretrainConfig) -> None:
    """Make the base model from nothing, test it and write it to cfg.out with its metrics beside it (.json)."""
    start = time.time()
    torch.manual_seed(cfg.seed)
    model = TinyVLM(TinyVLMConfig(vocab_size=len(VOCABULARY), image_size=screens.SIZE))
    model.log_lens_scale = nn.Parameter(torch.tensor(0.3).log())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, {"lr": cfg.muon_lr, "weight_decay": 0.05}),
        torch.optim.AdamW(others, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    patch, patches = model.config.patch_size, model.config.num_patches

    def loss_of(step):
        rng = np.random.default_rng([cfg.seed, step])
        first = step * cfg.screens
        shown = [screens.draw_screen("source", "train", first + i, cfg.seed) for i in range(cfg.screens)]
        history = int(rng.choice((0, 1, 2, 3, 12), p=(0.4, 0.2, 0.15, 0.15, 0.1)))
        batch, _ = packed_batch(shown, cfg.questions, history, rng, patches, first, cfg.refer, cfg.by_colour, True)
        targets = [lens_targets(screen, patch, where=True) for screen in shown]
        for domain, count in (("settings", cfg.settings_screens), ("dark", cfg.dark_screens)):
            seen = range(step * count, (step + 1) * count)
            extra = [screens.draw_screen(domain, "train", i, cfg.seed) for i in seen]
            shown, targets = shown + extra, targets + [lens_targets(e, patch, domain != "dark") for e in extra]
        features = model.get_image_features(pixels([screen.image for screen in shown]))
        answers = model(batch["input_ids"], labels=batch["labels"], image_features=features[: cfg.screens]).loss
        lens = lens_loss(model, features, torch.from_numpy(np.stack(targets)), model.log_lens_scale.exp())
        return answers + lens, f"answers {answers.item():.3f}  lens {lens.item():.3f}"

    def schedule(done):  # warm-up over 100 steps, linear decay over the last 60 %
        return min(1.0, (done * cfg.steps + 1) / 100, (1 - done) / 0.6)

    out = Path(cfg.out)
    tempfile.TemporaryFile(dir=out.parent).close()  # fails now, rather than after training
    checkpoint = out.with_suffix(".checkpoint.pt")
    signature = json.dumps({k: v for k, v in asdict(cfg).items() if k not in ("out", "resume")})
    with progress(cfg.steps, "pretrain") as bar:
        train_loop(model, optimizers, cfg.steps, schedule, loss_of, bar, checkpoint, signature, cfg.resume, every=250)
    del model.log_lens_scale
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    imagelora.safe_save({"config": model.config.to_dict(), "state": state}, out)
    model = load_base(out)  # as it is used: rounded to 16 bits
    metrics = {domain: evaluate(model, domain, "test", 400)[0] for domain in screens.DOMAINS}
    metrics |= {"word_problem_acc": evaluate_word_problems(model, "test"), "seconds": round(time.time() - start)}
    given = (f"--{name.replace('_', '-')} {value}" for name, value in json.loads(signature).items())
    command = " ".join(["python train.py --pretrain", *given])
    write_json(out.with_suffix(".json"), {"command": command, "torch": torch.__version__, **metrics})
    checkpoint.unlink(missing_ok=True)
    for domain in screens.DOMAINS:
        print(f"{domain:<9} {accuracy_line(metrics[domain])}")
    print(f"text      word problems {metrics['word_problem_acc']:.1%}\nsaved     {out} after {metrics['seconds']} s")


# ---------------------------------------------------------------------------------------------------------------------
# The comparison: a row of compare.json is one fine-tuning run

REGIMES = {"image-heavy": 0, "balanced": 3, "text-heavy": 15}  # word problems before the image
VARIANTS = {  # name in the table -> (method, which heads, normalize)
    "frozen": ("none", None, True),
    "LoRA q k v o, all tokens": ("lora", None, True),
    "LoRA v, all tokens": ("lora_value", None, True),
    "visual tokens, all heads": ("image_lora", None, True),
    "Image-LoRA": ("image_lora", "top", True),
    "random heads": ("image_lora", "random", True),
    "least influential heads": ("image_lora", "least", True),
    "without normalization": ("image_lora", "top", False),
}
COMPARED = ("settings", "dark", "blueprint")
BANK = 2048  # training screens of a domain
GRID = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)  # learning rates; the best on validation screens is taken, of equals the last
QUICK_LR = 1e-2  # of --compare --quick
LONGER = 1000  # steps, of the runs that show what training longer brings
BRIEF = 200  # steps, of the runs of single heads and at many learning rates
NORMALIZATION_LR = (0.01, 0.08, 0.64)  # from good to too high


@dataclass(frozen=True)
class CompareConfig:
    """The comparison's settings; each field is a command-line option of the same name (after --compare)."""

    quick: bool = False  # one seed, one learning rate, the tables of settings and dark only
    seeds: int = 5  # runs of each kind
    steps: int = 400  # training steps
    screens: int = 8  # screens a step, two questions each
    num_heads: int = 10  # value heads to adapt
    r: int = 8  # rank; alpha is twice it
    tau: float = 4.0  # layer budget ~ influence^tau
    workers: int = 2  # processes, one thread each
    out: str = "runs/compare"  # output directory; with --quick, -quick is added

    def __post_init__(self):
        require(self, 1, "seeds", "steps", "screens", "num_heads", "r", "workers")
        require(self, 0, "tau")


def choose_heads(which: str, scores: Tensor, num_heads: int, tau: float, seed: int) -> dict:
    """Heads by select_heads ("top"), or at random or the least influential of all, without a budget of layers."""
    if which == "top":
        return imagelora.select_heads(scores, num_heads, tau)
    heads_a_layer = scores.shape[1]
    order = scores.flatten().argsort().tolist()
    if which == "random":
        order = np.random.default_rng(seed).permutation(scores.numel()).tolist()
    chosen = sorted(divmod(i, heads_a_layer) for i in order[:num_heads])
    return {layer: [h for other, h in chosen if other == layer] for layer, _ in chosen}


@cache
def feature_bank(domain: str) -> tuple[list[screens.Screen], Tensor]:
    """Training screens and what the frozen vision encoder makes of them [BANK, P, D], computed once a process."""
    drawn, model = [screens.draw_screen(domain, "train", i) for i in range(BANK)], load_base(BASE)
    with torch.no_grad():
        parts = [model.get_image_features(pixels([s.image for s in drawn[i : i + 64]])) for i in range(0, BANK, 64)]
    return drawn, torch.cat(parts)


def bank_batch(domain: str, picks, rng, history: int = 0, first: int = 0) -> dict:
    """These screens of the bank, two questions about each."""
    drawn, features = feature_bank(domain)
    batch, _ = packed_batch([drawn[i] for i in picks], 2, history, rng, features.shape[1], first)
    return batch | {"image_features": features[torch.as_tensor(picks)]}


def finetune(job: dict) -> dict:
    """One run of the comparison: the job's fields and what was measured."""
    torch.set_num_threads(1)
    start, model = time.time(), load_base(BASE)
    method, which, normalize = VARIANTS[job["method"]]
    history, seed, probe = REGIMES[job["regime"]], job["seed"], 2 * PROBE_BATCHES  # batches, half the main job's size

    def batch_of(step: int) -> dict:
        rng = np.random.default_rng([seed, step])
        picks = rng.choice(BANK, job["screens"], replace=False)
        return bank_batch(job["domain"], picks, rng, history, step * job["screens"])

    heads = None
    if job["only"]:
        heads = {int(layer): h for layer, h in job["only"].items()}
    elif which:
        scores = imagelora.score_heads(model, map(batch_of, range(probe)), seed=seed)
        heads = choose_heads(which, scores, job["num_heads"], job["tau"], seed)
    torch.manual_seed(seed)
    base_text, batch = text_logits(model, 128), batch_of(probe)
    adapter = make_adapter(model, method, job["r"], 2.0 * job["r"], heads, normalize)  # alpha / r = 2
    measured, norms = (0, 0, 0), {}
    if adapter is not None:
        with progress(job["steps"], "run", quiet=True) as bar:
            tune(adapter, job["lr"], job["steps"], lambda step: (model(**batch_of(step + probe)).loss, ""), bar)
        measured = costs(model, adapter, batch)
    if method == "image_lora":  # root mean square over visual tokens of ||Delta V_l||
        updates = watch(model, batch, **adapter.layers)
        norms = {layer: updates[layer].square().sum(1).mean().sqrt().item() for layer in adapter.layers}
    names = ("trainable_parameters", "adapter_flops_per_step", "counted_flops_per_step")
    result = {"heads": heads, "update_norms": norms, **dict(zip(names, measured))}
    result |= evaluate(model, job["domain"], job["split"], 100, history)[0]
    if job["part"] != "tuning":
        result["source_acc"] = evaluate(model, "source", "test", 50, history)[0]["action_acc"]
        result["word_problem_acc"] = evaluate_word_problems(model, "test", 256)
        result["text_logits_max_abs_diff"] = (text_logits(model, 128) - base_text).abs().max().item()
    visual = int((batch["input_ids"] == ID[IMAGE]).sum())
    result["visual_fraction"] = visual / batch["input_ids"].numel()
    return job | result | {"seconds": round(time.time() - start, 1)}


JOB = ("part", "method", "domain", "regime", "seed", "lr", "num_heads", "only", "split", "steps", "screens", "r", "tau")


def job_key(row: dict) -> str:
    return json.dumps([row[name] for name in JOB])


def run_jobs(jobs: list[dict], rows: list[dict], pool, path: Path, bar) -> list[dict]:
    """The rows of these jobs, run where `rows` does not hold them yet; every finished row is written at once."""
    done = {job_key(row): row for row in rows}
    missing = [job for job in jobs if job_key(job) not in done]
    bar.update(len(jobs) - len(missing))
    for row in pool.imap_unordered(finetune, missing):
        rows.append(json.loads(json.dumps(row)))
        write_json(path, rows)
        done[job_key(row)] = rows[-1]
        text = f"{row['part']}, {row['domain']}, {row['method']}: click {row['action_acc']:.0%}"
        bar.set_postfix_str(text, refresh=False)
        bar.update()
    return [done[job_key(job)] for job in jobs]


def read_rows(path: Path) -> list[dict]:
    """The finished rows of a comparison. Raises ValueError where the file is not one."""
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            job_key(row)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a comparison of this project; move it away to start anew") from None
    return rows


def make_job(cfg: CompareConfig, part: str, method: str, domain: str, seed: int, lr, **options) -> dict:
    job = {"part": part, "method": method, "domain": domain, "regime": "image-heavy", "seed": seed, "lr": lr}
    job |= {"num_heads": cfg.num_heads, "only": None, "split": "test", "steps": cfg.steps, "screens": cfg.screens}
    return job | {"r": cfg.r, "tau": cfg.tau} | options


def jobs_of(cfg: CompareConfig) -> list[dict]:
    """Every run but those that choose learning rates; lr is None where it is to be chosen."""
    lora, value, every = "LoRA q k v o, all tokens", "LoRA v, all tokens", "visual tokens, all heads"
    layers, heads = TinyVLMConfig().num_hidden_layers, TinyVLMConfig().num_key_value_heads
    jobs = []

    def add(part, methods, domain="settings", seeds=cfg.seeds, lr=None, **options):
        for method in methods:
            rate = 0.0 if method == "frozen" else lr
            jobs.extend(make_job(cfg, part, method, domain, seed, rate, **options) for seed in range(seeds))

    for domain in COMPARED[:2]:
        add("methods", VARIANTS, domain, seeds=1 if cfg.quick else cfg.seeds)
    if cfg.quick:
        return jobs
    add("longer", (lora, "Image-LoRA"), steps=LONGER)
    add("limit", ("frozen", lora, value, every, "Image-LoRA"), "blueprint")
    for regime in ("balanced", "text-heavy"):  # long prompts take long: two seeds
        add("regimes", ("frozen", lora, value, "Image-LoRA"), seeds=min(cfg.seeds, 2), regime=regime)
    for k in sorted({1, 4} - {cfg.num_heads}):  # those of cfg.num_heads and of all heads are among the methods
        add("budget", ("Image-LoRA", "random heads", "least influential heads"), num_heads=k)
    for tau in (0.0, 0.5, 1.0, 4.0):
        add("tau", ["Image-LoRA"], seeds=min(cfg.seeds, 3), tau=tau, split="validation")
    brief = {"seeds": 1, "steps": BRIEF}
    for layer, head in product(range(layers), range(heads)):
        add("single", ["Image-LoRA"], only={str(layer): [head]}, **brief)
    for lr in NORMALIZATION_LR:
        add("normalization", ("Image-LoRA", "without normalization"), lr=lr, num_heads=layers * heads, **brief)
    return jobs


def compare(cfg: CompareConfig) -> None:
    """Run (or go on with) the comparison, print its tables, draw its figures. Ctrl-C loses only the runs under way."""
    shape = TinyVLMConfig()
    heads, size = shape.num_hidden_layers * shape.num_key_value_heads, shape.hidden_size
    if cfg.num_heads > heads or cfg.r > size:
        raise ValueError(f"num_heads must be at most {heads} and r at most {size}, got {cfg.num_heads} and {cfg.r}")
    out = Path(cfg.out + ("-quick" if cfg.quick else ""))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "compare.json"
    rows = read_rows(path) if path.exists() else []

    def tuned_as(job):  # runs of BRIEF steps take the rate of cfg.steps
        return job["method"], job["domain"], max(job["steps"], cfg.steps)

    jobs = jobs_of(cfg)
    rates = {tuned_as(job): QUICK_LR for job in jobs if job["lr"] is None}
    tuning = [
        make_job(cfg, "tuning", method, domain, 0, lr, split="validation", steps=steps)
        for method, domain, steps in rates
        for lr in GRID
        if not cfg.quick
    ]
    workers = torch.multiprocessing.get_context("spawn").Pool(  # Ctrl-C is for the main process, which ends them
        cfg.workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    with workers as pool, progress(len(jobs) + len(tuning), "compare") as bar:
        for row in sorted(run_jobs(tuning, rows, pool, path, bar), key=lambda row: row["action_acc"]):
            rates[tuned_as(row)] = row["lr"]  # the best comes last
        jobs = [job | {"lr": rates[tuned_as(job)]} if job["lr"] is None else job for job in jobs]
        finished = run_jobs(jobs, rows, pool, path, bar)
    report(finished, cfg)
    print(f"\nsaved {path}")


def mean(rows: list[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def spread(rows: list[dict], name: str = "action_acc") -> str:
    """Mean and standard deviation over seeds, in %."""
    values = 100 * np.array([row[name] for row in rows])
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def flops_cell(rows: list[dict]) -> str:
    """Computed adapter MFLOP a training step; marked where PyTorch counted another number."""
    equal = all(row["adapter_flops_per_step"] == row["counted_flops_per_step"] for row in rows)
    return f"{mean(rows, 'adapter_flops_per_step') / 1e6:.1f}{'' if equal else ' (COUNTED DIFFERENTLY)'}"


def grouped(rows: list[dict], *names: str) -> dict:
    """Rows by the value of this field, or by the values of these, in order of appearance."""
    groups, key = {}, itemgetter(*names)
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def table(title: str, columns: list, lines: list[list]) -> str:
    """A Markdown table with its title above the first column."""
    header = [f"**{title}**", *columns]
    return "\n".join("| " + " | ".join(map(str, x)) + " |" for x in (header, ["---"] * len(header), *lines))


def pivot(title: str, rows: list[dict], index: str, column: str, cell=spread) -> str:
    """A line for each value of the field `index`, a column for each of `column`; cell(rows of both) -> text."""
    groups = grouped(rows, index, column)
    lines, columns = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    body = [[line, *(cell(groups[line, c]) if (line, c) in groups else "" for c in columns)] for line in lines]
    return table(title, columns, body)


def tables(rows: list[dict]) -> list[str]:
    """What the rows of a comparison say, as Markdown tables."""
    order = {"domain": COMPARED, "method": VARIANTS, "regime": REGIMES}

    def place(row):  # rows stand in the order in which their runs ended
        ranks = [list(known).index(row[name]) for name, known in order.items()]
        return *ranks, row["num_heads"], row["tau"], row["lr"], str(row["only"]), row["seed"]

    part = grouped(sorted(rows, key=place), "part")
    cells = {
        "click %": spread,
        "text %": partial(spread, name="text_acc"),
        "icon %": partial(spread, name="icon_acc"),
        "source screens %": partial(spread, name="source_acc"),
        "word problems %": partial(spread, name="word_problem_acc"),
        "text logits, max change": lambda group: f"{max(row['text_logits_max_abs_diff'] for row in group):.2g}",
        "parameters": lambda group: f"{mean(group, 'trainable_parameters'):,.0f}",
        "adapter MFLOP": flops_cell,
        "lr": lambda group: f"{group[0]['lr']:g}",
    }
    found = []
    for domain, of_domain in grouped(part["methods"] + part.get("limit", []), "domain").items():
        lines = [[m, *(cell(group) for cell in cells.values())] for m, group in grouped(of_domain, "method").items()]
        found.append(table(domain, list(cells), lines))
    settings = [row for row in part["methods"] if row["domain"] == "settings"]
    if longer := part.get("longer"):
        rows = [row for row in settings if row["method"] in grouped(longer, "method")] + longer
        rows = [row | {"column": f"{row['steps']} steps"} for row in rows]
        found.append(pivot("settings, click %", rows, "method", "column"))
    if regimes := part.get("regimes"):
        rows = [row for row in settings if row["method"] in grouped(regimes, "method")] + regimes
        shares = {regime: mean(group, "visual_fraction") for regime, group in grouped(rows, "regime").items()}
        rows = [row | {"column": f"{row['regime']} ({shares[row['regime']]:.0%} visual)"} for row in rows]
        found.append(pivot("settings, click % · adapter MFLOP", rows, "method", "column", with_flops))
    if budget := part.get("budget"):
        rows = budget + [row for row in settings if row["method"] in grouped(budget, "method")]
        every = [row for row in settings if row["method"] == "visual tokens, all heads"]
        rows += [row | {"method": "Image-LoRA", "num_heads": "all"} for row in every]
        found.append(pivot("settings, click % by number of heads", rows, "num_heads", "method"))
    if taus := part.get("tau"):
        rows = [row | {"column": f"τ = {row['tau']:g}"} for row in taus]
        found.append(pivot("settings, validation click %", rows, "method", "column"))
    if singles := part.get("single"):
        places = [(layer, heads[0]) for row in singles for layer, heads in row["heads"].items()]
        rows = [row | {"layer": f"layer {i}", "head": f"head {h}"} for row, (i, h) in zip(singles, places)]
        found.append(pivot("settings, click % of one head alone", rows, "layer", "head"))
    if normalized := part.get("normalization"):
        rows = [row | {"column": f"lr {row['lr']:g}"} for row in normalized]
        title = "settings, all heads, click % · largest norm of a layer's update"
        found.append(pivot(title, rows, "method", "column", with_norm))
    return found


def with_flops(rows: list[dict]) -> str:
    return f"{spread(rows)} · {flops_cell(rows)}"


def with_norm(rows: list[dict]) -> str:
    return f"{spread(rows)} · {np.mean([max(row['update_norms'].values()) for row in rows]):.2f}"


def rank_correlation(a, b) -> float:
    """Spearman's rho of two sequences without ties to speak of."""
    ranks = [np.argsort(np.argsort(np.asarray(v, dtype=float), kind="stable"), kind="stable") for v in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def step_time_ratios(cfg: CompareConfig, repetitions: int = 25) -> list[list[str]]:
    """Median time of a method's training step over that of the same backbone with a constant added to its values."""
    torch.set_num_threads(1)
    times = {name: [] for name in VARIANTS}
    batch = bank_batch("settings", range(cfg.screens), np.random.default_rng(0))
    scores = probe_scores("rank1", batches=1)
    for _ in range(repetitions):
        for name, (method, which, normalize) in VARIANTS.items():
            model = load_base(BASE)
            heads = choose_heads(which, scores, cfg.num_heads, cfg.tau, 0) if which else None
            make_adapter(model, method, cfg.r, 2.0 * cfg.r, heads, normalize)
            values = [layer.self_attn.v_proj for layer in model.language_model.layers]
            with constant_added(values) if name == "frozen" else nullcontext():
                start = time.perf_counter()
                model(**batch).loss.backward()
            times[name].append(time.perf_counter() - start)
    return [[name, f"{np.median(np.array(times[name]) / np.array(times['frozen'])):.2f}"] for name in VARIANTS]


def report(rows: list[dict], cfg: CompareConfig) -> None:
    """Print the tables of a comparison; unless it was --quick, step times and rank correlations too; draw figures."""
    print("\n" + "\n\n".join(tables(rows)))
    if cfg.quick:
        return
    print("\n" + table("time of a training step over the backbone's alone", ["ratio"], step_time_ratios(cfg)))
    scores = {probe: probe_scores(probe) for probe in ("rank1", "exact")}
    singles = [row for row in rows if row["part"] == "single"]
    places = [(int(layer), heads[0]) for row in singles for layer, heads in row["heads"].items()]
    ranked = {name: [s[place].item() for place in places] for name, s in scores.items()}
    ranked["gain"] = [row["action_acc"] for row in singles]
    pairs = (("rank1", "exact"), ("rank1", "gain"), ("exact", "gain"))
    lines = [[f"{a} and {b}", f"{rank_correlation(ranked[a], ranked[b]):.2f}"] for a, b in pairs]
    print("\n" + table("settings, a head's scores and the click accuracy it gains alone", ["Spearman's rho"], lines))
    panels = {domain: {} for domain in COMPARED[:2]}
    for (domain, method), group in grouped(rows, "domain", "method").items():
        group = [row for row in group if row["part"] == "methods"]
        if group and method != "frozen":
            accuracies = 100 * np.array([row["action_acc"] for row in group])
            flops = mean(group, "adapter_flops_per_step") / 1e6
            panels[domain][method] = (flops, accuracies.mean(), accuracies.std(ddof=min(1, len(group) - 1)))
    FIGURES.mkdir(exist_ok=True)
    save_png(figures.accuracy_against_cost(panels), FIGURES / "accuracy.png")
    heads = imagelora.select_heads(scores["rank1"], cfg.num_heads, cfg.tau)
    save_png(figures.influence_map(scores["rank1"].tolist(), heads), FIGURES / "influence.png")


def probe_scores(probe: str, batches: int = 2 * PROBE_BATCHES) -> Tensor:
    """Head scores [L, H] on `settings` screens."""
    given = (bank_batch("settings", range(16 * i, 16 * i + 16), np.random.default_rng(i)) for i in range(batches))
    return imagelora.score_heads(load_base(BASE), given, probe=probe)


# ---------------------------------------------------------------------------------------------------------------------
# Files, devices and the command line


def load_base(path: str | os.PathLike) -> TinyVLM:
    """The tiny VLM in a base file, float32, in evaluation mode. ValueError on a missing, damaged or foreign file."""
    content = imagelora.safe_load(path)
    try:
        config = TinyVLMConfig(**content["config"])
        if config.vocab_size != len(VOCABULARY) or config.image_size != screens.SIZE:
            raise ValueError(f"made for {config.vocab_size} words and {config.image_size} px screens")
        with torch.device("meta"):  # shapes are compared before any memory is taken
            TinyVLM(config).load_state_dict(content["state"], assign=True)
        model = TinyVLM(config)
        model.load_state_dict(content["state"])
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("it holds values that are not finite")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path} is not a base model of this project ({reason}); make one: --pretrain") from None
    return model.eval()


def write_json(path: Path, content) -> None:
    with imagelora.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def save_png(image: Image.Image, path: Path) -> None:
    with imagelora.atomic_write(path) as temporary:
        image.save(temporary, "PNG", optimize=True)


def pick_device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    elif not available[name]:
        raise ValueError(
            f"device {name} is not available here; expected one of {', '.join(k for k in available if available[k])}"
        )
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def parse(config_class, arguments: list[str], mode: str = ""):
    """The config from arguments: an option per field, its comment in the class as the help text."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(
        prog=f"train.py {mode}".strip(),
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    for f in fields(config_class):
        name = f"--{f.name.replace('_', '-')}"
        if f.type is bool or f.type == "bool":
            parser.add_argument(name, action="store_true", help=comments.get(f.name))
        else:
            text = f"{comments.get(f.name, '')} (default {f.default!r})".replace("%", "%%")
            parser.add_argument(name, type=type(f.default), default=f.default, help=text)
    return config_class(**vars(parser.parse_args(arguments)))


MODES = {  # option -> (its settings, the job)
    "--explain": (ExplainConfig, explain),
    "--pretrain": (PretrainConfig, pretrain),
    "--compare": (CompareConfig, compare),
}


def main(arguments: list[str]) -> int:
    """Runs a job; returns the exit status: 0, 1 diverged, 2 bad input, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        mode = next((argument for argument in arguments if argument in MODES), "")
        config, job = MODES.get(mode, (Config, main_job))
        job(parse(config, [argument for argument in arguments if argument != mode], mode))
    except (Interrupted, KeyboardInterrupt) as stopped:
        resume = [] if "--compare" in arguments else ["--resume"]  # a comparison always keeps its finished rows
        again = shlex.join([a for a in arguments if a != "--resume"] + resume)
        processes = os.environ.get("LOCAL_WORLD_SIZE")
        launcher = f"torchrun --nproc-per-node {processes}" if processes else "python"
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{str(stopped) or 'stopped'}; go on with: {launcher} train.py {again}")
        return 130
    except Diverged as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
