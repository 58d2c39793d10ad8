"""Fine-tune the tiny VLM by Image-LoRA on a new kind of screen, and watch what the paper says happen.

    python train.py                        before, probe, select, train, after, cost; a minute on a laptop CPU
    python train.py --method lora          the same with standard LoRA (q, k, v, o of every layer, all tokens)
    python train.py --pretrain             make the base model, data/tiny_vlm.pt, from nothing
    python train.py --compare              all methods, prompts, budgets and seeds: the tables and figures of README

Shapes:  B sequences · T tokens · N screens · P visual tokens a screen · D hidden size · L layers · H value heads
"""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import imagelora
from data import screens as S
from data.tokenizer import BOS, EOS, ID, IMAGE, PAD, VOCABULARY, decode, encode, parse_point
from data.word_problems import word_problem
from tiny_vlm import TinyVLM, TinyVLMConfig

METHODS = ("image_lora", "lora", "lora_value", "none")
BASE = Path(__file__).parent / "data" / "tiny_vlm.pt"


@dataclass(frozen=True)
class Config:
    """The main job's settings; each field is a command-line option of the same name."""

    method: str = "image_lora"  # image_lora | lora (q, k, v, o, all tokens) | lora_value (v, all tokens) | none
    domain: str = "settings"  # settings | dark | blueprint | source
    num_heads: int = 8  # value heads to adapt (image_lora)
    r: int = 8  # rank
    lora_alpha: float = 16.0  # the update is scaled by lora_alpha / r
    tau: float = 1.0  # layer budget ~ influence^tau: 0 even, 1 proportional
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
        choices = {"method": METHODS, "domain": S.DOMAINS, "device": ("auto", "cpu", "cuda", "mps")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("num_heads", "r", "steps", "screens", "questions", "test_screens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lora_alpha", "tau", "lr", "history", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")


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
    """uint8 images [S, S, 3] -> pixel_values [N, 3, S, S] in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def packed_batch(
    screens, questions: int, history: int, rng, patches: int, first: int, refer=0.0, by_colour=0.0, learn_history=False
):
    """One sequence a screen: `history` word problems (numbered from `first`), the image, `questions` about it.

    Returns ({input_ids, labels}, boxes [B, questions] of the clicks, None where a point is given).
    """
    ids, labels, boxes = [], [], []
    for i, screen in enumerate(screens):
        turns = [turn(word_problem("train", (first + i) * max(history, 1) + j)) for j in range(history)]
        if not learn_history:  # it is only read
            turns = [(tokens, [-100] * len(tokens)) for tokens, _ in turns]
        turns.append(([ID[IMAGE]] * patches, [-100] * patches))
        targets = screen.targets()
        boxes.append([])
        for _ in range(questions):
            element = targets[rng.integers(len(targets))]
            click, colour = rng.random() >= refer, rng.random() < by_colour
            turns.append(turn(S.grounding(screen, element, rng, colour) if click else S.referring(screen, element)))
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
        chunk, features = prompts[start : start + 256], None
        rows = [[ID[BOS]] + encode(prompt) for prompt in chunk]
        if images is not None:
            shown = images[start : start + 256]
            unique = {id(image): image for image in shown}  # the vision encoder sees each screen once
            order = {key: i for i, key in enumerate(unique)}
            seen = model.get_image_features(pixels(list(unique.values())).to(model.device))
            features = seen[[order[id(image)] for image in shown]]  # [B, P, D]
            visual = [ID[IMAGE]] * model.config.num_patches
            past = [t for j in range(history) for t in turn(word_problem("validation", j))[0]]
            rows = [[ID[BOS]] + past + visual + row[1:] for row in rows]
        ids = pad(rows, ID[PAD], left=True).to(model.device)
        mask = (ids != ID[PAD]).long()
        out = model.generate(ids, max_new_tokens=3, attention_mask=mask, image_features=features)
        answers += [decode(row) for row in out[:, ids.shape[1] :].tolist()]
    return answers


def evaluate(model: TinyVLM, domain: str, split: str, num_screens: int, history: int = 0) -> tuple[dict, list]:
    """Click accuracy by ScreenSpot's rule, every target of every screen asked once.

    Returns (action_acc, text_acc, icon_acc, wrong_format_num, num_total; [(screen, sample, point)])."""
    rng = np.random.default_rng(0)
    asked = [
        (screen, S.grounding(screen, element, rng))
        for screen in (S.draw_screen(domain, split, i) for i in range(num_screens))
        for element in screen.targets()
    ]
    answers = answer(model, [s["instruction"] for _, s in asked], [screen.image for screen, _ in asked], history)
    points = [parse_point(a) for a in answers]
    hits = np.array([S.is_hit(point, sample["bbox"]) for point, (_, sample) in zip(points, asked)])
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
# The baseline: standard LoRA on whole Linear layers and all tokens


class LoRA(nn.Module):
    """y + (alpha / r) x A B on the named projections of every language layer; the rest of the model is frozen."""

    def __init__(self, model: TinyVLM, r: int, lora_alpha: float, targets=("q_proj", "k_proj", "v_proj", "o_proj")):
        super().__init__()
        self.r, self.scaling, self.enabled = r, lora_alpha / r, True
        self.linears = [getattr(layer.self_attn, t) for layer in model.language_model.layers for t in targets]
        self.frozen_inputs = sum(t != "o_proj" for t in targets)  # in the first layer: these read the embeddings
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for i, linear in enumerate(self.linears):
            self.A.append(nn.Parameter(torch.empty(linear.in_features, r, device=model.device)))
            self.B.append(nn.Parameter(torch.zeros(r, linear.out_features, device=model.device)))
            nn.init.kaiming_uniform_(self.A[i].T, a=math.sqrt(5))
        self._handles = [m.register_forward_hook(partial(self._add, i)) for i, m in enumerate(self.linears)]
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
        return sum(
            imagelora.lora_flops(num_tokens, m.in_features, m.out_features, self.r, input_grad=i >= self.frozen_inputs)
            for i, m in enumerate(self.linears)
        )

    def save(self, path) -> None:
        imagelora.safe_save({"r": self.r, "scaling": self.scaling, "lora": self.state_dict()}, path)


def attach(model, method: str, r: int, lora_alpha: float, heads: dict | None, normalize=True) -> nn.Module | None:
    """The adapter of a method of METHODS on the model."""
    if method == "image_lora":
        return imagelora.attach(model, r, lora_alpha, heads, normalize)
    if method == "none":
        model.requires_grad_(False)
        return None
    return LoRA(model, r, lora_alpha, *([("v_proj",)] if method == "lora_value" else []))


def count_training_flops(model: TinyVLM, adapter: nn.Module, batch: dict) -> int:
    """The adapter's FLOPs in one training step as PyTorch counts them: with the adapter, less the same step with only
    a constant added to the adapted projections, which makes the backbone's backward pass the same."""
    if isinstance(adapter, LoRA):
        adapted = adapter.linears
    else:
        adapted = [model.language_model.layers[layer].self_attn.v_proj for layer in adapter.heads]

    def step() -> int:
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        return counter.get_total_flops()

    with_adapter = step()
    constant = torch.zeros((), device=model.device, requires_grad=True)
    handles = [m.register_forward_hook(lambda module, inputs, y: y + constant) for m in adapted]
    with adapter.disabled():
        floor = step()
    for handle in handles:
        handle.remove()
    adapter.zero_grad()
    return with_adapter - floor


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

    def save(step):
        if checkpoint and rank0:
            imagelora.safe_save(content(step), checkpoint)

    good = [p.detach().clone() for p in parameters]  # the last with which the loss was finite
    with Stop((signal.SIGINT, signal.SIGTERM) if checkpoint else ()) as stop:
        for step in range(start, steps):
            for group in (group for o in optimizers for group in o.param_groups):
                group["lr"] = group["initial_lr"] * schedule(step / steps)
            loss, text = loss_of(step)
            if not loss.isfinite():
                for parameter, last in zip(parameters, good):
                    parameter.data.copy_(last)
                raise Diverged(
                    f"the loss is {loss.item()} at step {step}; try a smaller --lr than {group['initial_lr']}"
                )
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


def progress(total: int, name: str, quiet: bool = False) -> tqdm:
    layout = "{desc:<9}|{bar:24}| {n_fmt}/{total_fmt}{postfix}  {elapsed} < {remaining}"
    return tqdm(total=total, desc=name, bar_format=layout, disable=quiet)


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining: a base whose vision encoder has seen every domain but blueprint, whose questions were all of `source`

LENS = [[*S.LABELS, *S.ICONS, "switch"], list(S.COLOURS)]  # what a visual token should decode to: what it shows, its
LENS += [[f"<{axis}{i}>" for i in range(S.BINS)] for axis in "xy"]  # colour, and the x and y of the element's centre


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining settings; each field is a command-line option of the same name (after --pretrain)."""

    steps: int = 4500
    screens: int = 16  # source screens with questions a step
    questions: int = 6  # a screen
    refer: float = 0.25  # share of questions that give the point and ask what is there
    by_colour: float = 0.3  # share of questions that name an icon by its colour alone, where that is enough
    settings_screens: int = 4  # a step, seen by the vision loss only
    dark_every: int = 2  # steps from one dark screen to the next, seen by the vision loss only, for what is there
    muon_lr: float = 0.02  # peak learning rate of Muon for matrices
    lr: float = 2e-3  # peak learning rate of AdamW for embeddings, norms and biases
    seed: int = 0
    out: str = str(BASE)
    resume: bool = False

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), f.name in ("steps", "screens", "questions")
            if not isinstance(value, str) and not least <= value < 2**63:
                raise ValueError(f"{f.name} must be finite and at least {int(least)}, got {value}")


def lens_targets(screen: S.Screen, patch: int, where: bool) -> np.ndarray:
    """[4, P] indices into the lists of LENS, -100 where a patch shows no element; where=False leaves out x and y.

    A patch shows an element when it overlaps half of the patch or half of the element."""
    side = S.SIZE // patch
    targets = np.full((4, side, side), -100)
    for element in screen.elements:
        left, top, right, bottom = element.bbox
        x, y = S.centre_bins(element.bbox)
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


def pretrain(cfg: PretrainConfig) -> None:
    """Make the base model from nothing, test it and write it to cfg.out with its metrics beside it (.json)."""
    start = time.time()
    torch.manual_seed(cfg.seed)
    model = TinyVLM(TinyVLMConfig(vocab_size=len(VOCABULARY), image_size=S.SIZE))
    model.log_lens_scale = nn.Parameter(torch.tensor(0.3).log())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon([{"params": matrices, "lr": cfg.muon_lr, "initial_lr": cfg.muon_lr}], weight_decay=0.05),
        torch.optim.AdamW([{"params": others, "lr": cfg.lr, "initial_lr": cfg.lr}], betas=(0.9, 0.98), weight_decay=0),
    ]
    patch, patches = model.config.patch_size, model.config.num_patches

    def loss_of(step):
        rng = np.random.default_rng([cfg.seed, step])
        first = step * cfg.screens
        shown = [S.draw_screen("source", "train", first + i, cfg.seed) for i in range(cfg.screens)]
        history = int(rng.choice((0, 1, 2, 3, 12), p=(0.4, 0.2, 0.15, 0.15, 0.1)))
        batch, _ = packed_batch(shown, cfg.questions, history, rng, patches, first, cfg.refer, cfg.by_colour, True)
        targets = [lens_targets(screen, patch, where=True) for screen in shown]
        for domain, count in (("settings", cfg.settings_screens), ("dark", int(step % cfg.dark_every == 0))):
            seen = range(step * count, (step + 1) * count)
            extra = [S.draw_screen(domain, "train", i, cfg.seed) for i in seen]
            shown, targets = shown + extra, targets + [lens_targets(e, patch, domain != "dark") for e in extra]
        features = model.get_image_features(pixels([screen.image for screen in shown]))
        answers = model(batch["input_ids"], labels=batch["labels"], image_features=features[: cfg.screens]).loss
        lens = lens_loss(model, features, torch.from_numpy(np.stack(targets)), model.log_lens_scale.exp())
        return answers + lens, f"answers {answers.item():.3f}  lens {lens.item():.3f}"

    def schedule(done):  # warm-up over 100 steps, linear decay over the last 60 %
        return min(1.0, (done * cfg.steps + 1) / 100, (1 - done) / 0.6)

    out = Path(cfg.out)
    tempfile.TemporaryFile(dir=out.parent).close()  # fails now, rather than after training
    checkpoint, settings = out.with_suffix(".checkpoint.pt"), {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    signature = json.dumps({k: v for k, v in settings.items() if k not in ("out", "resume")})
    with progress(cfg.steps, "pretrain") as bar:
        train_loop(model, optimizers, cfg.steps, schedule, loss_of, bar, checkpoint, signature, cfg.resume, every=250)
    del model.log_lens_scale
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    imagelora.safe_save({"config": model.config.to_dict(), "state": state}, out)
    model = load_base(out)  # as it is used: rounded to 16 bits
    metrics = {domain: evaluate(model, domain, "test", 400)[0] for domain in S.DOMAINS}
    metrics |= {"word_problem_acc": evaluate_word_problems(model, "test"), "seconds": round(time.time() - start)}
    given = (f"--{name.replace('_', '-')} {value}" for name, value in json.loads(signature).items())
    command = " ".join(["python train.py --pretrain", *given])
    write_json(out.with_suffix(".json"), {"command": command, "torch": torch.__version__, **metrics})
    checkpoint.unlink(missing_ok=True)
    for domain in S.DOMAINS:
        print(f"{domain:<9} {accuracy_line(metrics[domain])}")
    print(f"text      word problems {metrics['word_problem_acc']:.1%}\nsaved     {out} after {metrics['seconds']} s")


def load_base(path: str | os.PathLike) -> TinyVLM:
    """The tiny VLM in a base file, float32, in evaluation mode. ValueError on a missing, damaged or foreign file."""
    content = imagelora.safe_load(path)
    try:
        config = TinyVLMConfig(**content["config"])
        if config.vocab_size != len(VOCABULARY) or config.image_size != S.SIZE:
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


# ---------------------------------------------------------------------------------------------------------------------
# The main job


def write_json(path: Path, content) -> None:
    with imagelora.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


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


def draw_predictions(path: Path, base: list, tuned: list, columns: int = 4, rows: int = 3) -> None:
    """A grid of test screens: the target box, the base model's click and the tuned model's click."""
    zoom, gap, caption = 2, 12, 22
    width, height = S.SIZE * zoom + gap, S.SIZE * zoom + caption + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + 34), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)

    def marks(x, y, draw, point, colour, cross):
        if point is None:
            return
        u, v = x + point[0] * zoom, y + point[1] * zoom
        for line, w in (("white", 6), (colour, 3)):  # a white rim, to be seen on every screen
            if cross:
                draw.line((u - 6, v - 6, u + 6, v + 6), line, w)
                draw.line((u - 6, v + 6, u + 6, v - 6), line, w)
            else:
                draw.ellipse((u - 8 - w / 2, v - 8 - w / 2, u + 8 + w / 2, v + 8 + w / 2), outline=line, width=w)

    step = max(len(base) // (columns * rows), 1)
    for i, ((screen, sample, before), (_, _, after)) in enumerate(list(zip(base, tuned))[::step][: columns * rows]):
        x, y = gap + i % columns * width, 34 + i // columns * height
        picture = Image.fromarray(screen.image).resize((S.SIZE * zoom,) * 2, Image.Resampling.LANCZOS)
        sheet.paste(picture, (x, y))
        left, top, right, bottom = (v * zoom for v in sample["bbox"])
        draw.rectangle((x + left - 2, y + top - 2, x + right + 1, y + bottom + 1), outline="#000000", width=4)
        draw.rectangle((x + left - 1, y + top - 1, x + right, y + bottom), outline="#ffffff", width=2)
        marks(x, y, draw, before, "#d55e00", cross=True)
        marks(x, y, draw, after, "#0072b2", cross=False)
        verdict = "right" if S.is_hit(after, sample["bbox"]) else "wrong"
        draw.text((x, y + S.SIZE * zoom + 2), f"{sample['instruction']}: {verdict}", "black", font)
    draw.rectangle((gap, 10, gap + 16, 24), outline="black", width=3)
    draw.text((gap + 24, 8), "target", "black", font)
    marks(gap + 100, 16, draw, (0, 0), "#d55e00", cross=True)
    draw.text((gap + 114, 8), "base model's click", "black", font)
    marks(gap + 270, 16, draw, (0, 0), "#0072b2", cross=False)
    draw.text((gap + 286, 8), "after fine-tuning", "black", font)
    with imagelora.atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def pick_device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    elif not available[name]:
        raise ValueError(
            f"device {name} is not available here; expected one of {', '.join(k for k in available if available[k])}"
        )
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def lora_parameter_count(model: TinyVLM, r: int) -> int:
    """Trainable parameters of standard LoRA: q, k, v, o of every language layer."""
    attention = model.language_model.layers[0].self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return len(model.language_model.layers) * sum(r * (m.in_features + m.out_features) for m in linears)


def main_job(cfg: Config) -> None:
    """before -> probe -> select -> train -> after -> cost -> saved. Under torchrun, data-parallel."""
    start = time.time()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(cfg.device)
    if cfg.screens % world:
        raise ValueError(f"screens must be a multiple of the {world} processes, got {cfg.screens}")
    say = print if rank == 0 else lambda *args: None
    out = Path(cfg.out or f"runs/{cfg.domain}")
    model = load_base(BASE).to(device)
    heads_total = sum(
        layer.self_attn.v_proj.out_features // layer.self_attn.head_dim for layer in model.language_model.layers
    )
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

    patches = model.config.num_patches
    size = sum(p.numel() for p in model.parameters())
    say(f"base     {BASE.name} · {size / 1e6:.2f} M parameters · {patches} visual tokens a screen · {device}")
    before, base_points = evaluate(model, cfg.domain, "test", cfg.test_screens, cfg.history)
    before["word_problem_acc"] = evaluate_word_problems(model, "test")
    base_text = text_logits(model)
    say(f"before   click accuracy on {cfg.domain} screens {accuracy_line(before)}")

    def batch_of(step: int) -> tuple[dict, list]:
        """This process's share of the screens of a step, all of them for the probe's steps below 0."""
        first = (step + 2) * cfg.screens
        drawn = [S.draw_screen(cfg.domain, "train", first + i, cfg.seed) for i in range(cfg.screens)]
        rng = np.random.default_rng([cfg.seed, step + 2])
        batch, boxes = packed_batch(drawn, cfg.questions, cfg.history, rng, patches, first)
        batch["pixel_values"] = pixels([screen.image for screen in drawn])
        share = cfg.screens // world
        mine = slice(None) if step < 0 else slice(rank * share, (rank + 1) * share)
        return {name: tensor[mine].to(device) for name, tensor in batch.items()}, boxes[mine]

    heads = None
    if cfg.method == "image_lora":
        scores = imagelora.score_heads(model, [batch_of(-2)[0], batch_of(-1)[0]], seed=cfg.seed)
        heads = imagelora.select_heads(scores, cfg.num_heads, cfg.tau)
        say(f"probe    rank-1 influence of {scores.numel()} heads, {2 * cfg.screens} screens:  {bars(scores, heads)}")
        chosen = " · ".join(f"layer {layer}: {' '.join(map(str, h))}" for layer, h in heads.items())
        say(f"select   {cfg.num_heads} of {scores.numel()} heads: {chosen}")

    torch.manual_seed(cfg.seed)
    adapter = attach(model, cfg.method, cfg.r, cfg.lora_alpha, heads)
    after, tuned_points, difference, cost = before, base_points, 0.0, {}
    if adapter is not None:
        try:
            cost = train_adapter(cfg, model, adapter, batch_of, out, world, quiet=rank > 0)
        except Diverged as error:
            adapter.save(out / "adapter.pt")
            raise Diverged(f"{error}; {out / 'adapter.pt'} is the last good adapter") from None
        after, tuned_points = evaluate(model, cfg.domain, "test", cfg.test_screens, cfg.history)
        after["word_problem_acc"] = evaluate_word_problems(model, "test")
        difference = (text_logits(model) - base_text).abs().max().item()
    say(f"after    click accuracy on {cfg.domain} screens {accuracy_line(after)}")
    verdict = "identical" if difference == 0 else "changed"
    say(f"text     logits of {len(base_text)} text-only prompts: {verdict} (max |difference| = {difference:.3g})")
    if cost:
        parameters, flops = cost["trainable_parameters"], cost["adapter_flops_per_screen"]
        say(
            f"cost     {parameters:,} parameters ({parameters / cost['lora_trainable_parameters']:.0%} of LoRA)"
            f" · adapter {flops / 1e6:.2f} MFLOP a screen ({flops / cost['lora_flops_per_screen']:.0%} of LoRA),"
            f" {'counted = computed' if cost['counted'] else 'counted differs from computed'}"
        )
    if rank == 0:
        if adapter is not None:
            adapter.save(out / "adapter.pt")
        draw_predictions(out / "predictions.png", base_points, tuned_points)
        settings = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
        run = {"device": str(device), "torch": torch.__version__, "seconds": round(time.time() - start, 1)}
        result = {"before": before, "after": after, "text_logits_max_abs_diff": difference, "heads": heads}
        write_json(out / "metrics.json", settings | run | result | cost)
        (out / "checkpoint.pt").unlink(missing_ok=True)
        say(f"saved    {out}/ {'adapter.pt ' if adapter is not None else ''}metrics.json predictions.png")
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def train_adapter(cfg: Config, model, adapter, batch_of, out: Path, world: int, quiet: bool) -> dict:
    """Train the adapter by `train_loop`; returns its costs."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters, "lr": cfg.lr, "initial_lr": cfg.lr}], weight_decay=0.0)
    replica = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    precision = torch.autocast("cuda", torch.bfloat16) if model.device.type == "cuda" else nullcontext()
    clicks = deque(maxlen=16 * cfg.screens * cfg.questions)  # of the last 16 steps, the answers given teacher-forced

    def loss_of(step):
        batch, boxes = batch_of(step)
        with precision:
            result = replica(**batch)
        answers = batch["labels"][:, 1:] >= 0
        words = [
            VOCABULARY[i] for i in result.logits[:, :-1][answers].argmax(-1).tolist()
        ]  # x, y, <eos> of each answer
        given = [parse_point(f"{x} {y}") for x, y in zip(words[::3], words[1::3])]
        asked = [box for row in boxes for box in row]
        clicks.extend(S.is_hit(point, box) for point, box in zip(given, asked))
        return result.loss, f"loss {result.loss.item():.3f}  click {np.mean(clicks):.0%}"

    settings = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in ("device", "out", "resume")}
    with progress(cfg.steps, "train", quiet) as bar:
        train_loop(
            adapter,
            [optimizer],
            cfg.steps,
            warmup_and_decay(cfg.steps),
            loss_of,
            bar,
            out / "checkpoint.pt",
            json.dumps(settings),
            cfg.resume,
        )
    batch, _ = batch_of(0)
    patches, tokens = model.config.num_patches, batch["input_ids"].numel()
    screens = len(batch["input_ids"])
    computed = adapter.flops(tokens if isinstance(adapter, LoRA) else patches * screens)
    attention = model.language_model.layers[0].self_attn
    shapes = [(m.in_features, m.out_features) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
    shapes = [(*s, i > 0) for i in range(len(model.language_model.layers)) for s in shapes]
    shapes += [(attention.o_proj.in_features, attention.o_proj.out_features, True)] * len(model.language_model.layers)
    lora = sum(imagelora.lora_flops(tokens, n_in, n_out, cfg.r, grad) for n_in, n_out, grad in shapes)
    return {
        "trainable_parameters": sum(p.numel() for p in parameters),
        "lora_trainable_parameters": lora_parameter_count(model, cfg.r),
        "adapter_flops_per_screen": computed / screens,
        "lora_flops_per_screen": lora / screens,
        "counted": count_training_flops(model, adapter, batch) == computed,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The comparison: a row of compare.json is one fine-tuning run

REGIMES = {"image-heavy": 0, "balanced": 3, "text-heavy": 15}  # word problems before the image
ROWS = {  # name in the table -> (method, which heads, normalize)
    "frozen": ("none", None, True),
    "LoRA q k v o, all tokens": ("lora", None, True),
    "LoRA v, all tokens": ("lora_value", None, True),
    "visual tokens, all heads": ("image_lora", None, True),
    "Image-LoRA": ("image_lora", "top", True),
    "random heads": ("image_lora", "random", True),
    "least influential heads": ("image_lora", "least", True),
    "without 1/sqrt|S|": ("image_lora", "top", False),
}
COMPARED = ("settings", "dark", "blueprint")


@dataclass(frozen=True)
class CompareConfig:
    """The comparison's settings; each field is a command-line option of the same name (after --compare)."""

    quick: bool = False  # one seed, one learning rate, the main table only
    seeds: int = 5
    steps: int = 250
    screens: int = 16  # a step, two questions each
    num_heads: int = 8
    r: int = 8
    tau: float = 1.0
    workers: int = 2  # processes, one thread each
    out: str = "runs/compare"

    def __post_init__(self):
        for name in ("seeds", "steps", "screens", "num_heads", "r", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def spread_heads(which: str, scores: Tensor, num_heads: int, tau: float, seed: int) -> dict:
    """The budget's most influential, random or least influential heads of all."""
    if which == "top":
        return imagelora.select_heads(scores, num_heads, tau)
    heads_a_layer = scores.shape[1]
    order = scores.flatten().argsort().tolist()
    if which == "random":
        order = np.random.default_rng(seed).permutation(scores.numel()).tolist()
    chosen = sorted(divmod(i, heads_a_layer) for i in order[:num_heads])
    return {layer: [h for other, h in chosen if other == layer] for layer, _ in chosen}


@cache
def feature_bank(domain: str, count: int = 2048) -> tuple[list[S.Screen], Tensor]:
    """Training screens and what the frozen vision encoder makes of them [count, P, D], computed once a process."""
    drawn = [S.draw_screen(domain, "train", i) for i in range(count)]
    model = load_base(BASE)
    with torch.no_grad():
        parts = [model.get_image_features(pixels([s.image for s in drawn[i : i + 64]])) for i in range(0, count, 64)]
    return drawn, torch.cat(parts)


def finetune(job: dict) -> dict:
    """One run of the comparison: the job's fields and what was measured."""
    torch.set_num_threads(1)
    start, model = time.time(), load_base(BASE)
    method, which, normalize = ROWS[job["method"]]
    history, seed, patches = REGIMES[job["regime"]], job["seed"], model.config.num_patches
    shown, features = feature_bank(job["domain"])

    def batch_of(step: int) -> dict:
        rng = np.random.default_rng([seed, step])
        picks = rng.choice(len(shown), job["screens"], replace=False)
        batch, _ = packed_batch([shown[i] for i in picks], 2, history, rng, patches, step * job["screens"])
        return batch | {"image_features": features[torch.from_numpy(picks)]}

    heads = job.get("only")
    if heads is not None:
        heads = {int(layer): h for layer, h in heads.items()}
    elif which:
        scores = imagelora.score_heads(model, [batch_of(i) for i in range(2)], seed=seed)
        heads = spread_heads(which, scores, job["num_heads"], job["tau"], seed)
    torch.manual_seed(seed)
    base_text = text_logits(model, 128)
    adapter = attach(model, method, job["r"], 2.0 * job["r"], heads, normalize)
    result = {"heads": heads, "trainable_parameters": 0, "adapter_flops_per_step": 0, "counted_flops_per_step": 0}
    batch = batch_of(2)
    tokens, visual = batch["input_ids"].numel(), int((batch["input_ids"] == ID[IMAGE]).sum())
    if adapter is not None:
        parameters = list(adapter.parameters())
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": job["lr"], "initial_lr": job["lr"]}], weight_decay=0
        )
        with progress(job["steps"], "run", quiet=True) as bar:
            train_loop(
                adapter, [optimizer], job["steps"], warmup_and_decay(job["steps"]),
                lambda step: (model(**batch_of(step + 2)).loss, ""), bar,
            )  # fmt: skip
        result["trainable_parameters"] = sum(p.numel() for p in parameters)
        result["adapter_flops_per_step"] = adapter.flops(tokens if isinstance(adapter, LoRA) else visual)
        result["counted_flops_per_step"] = count_training_flops(model, adapter, batch)
        if method == "image_lora":
            result["update_norms"] = update_norms(model, adapter, batch)
    result |= evaluate(model, job["domain"], job["split"], 100, history)[0]
    if job["part"] != "tuning":
        result["source_acc"] = evaluate(model, "source", "test", 50, history)[0]["action_acc"]
        result["word_problem_acc"] = evaluate_word_problems(model, "test", 256)
        result["text_logits_max_abs_diff"] = (text_logits(model, 128) - base_text).abs().max().item()
    return job | result | {"visual_fraction": visual / tokens, "seconds": round(time.time() - start, 1)}


@torch.no_grad()
def update_norms(model: TinyVLM, adapter, batch: dict) -> dict[str, float]:
    """Root mean square over visual tokens of ||Delta V_l||, layer by layer."""
    norms = {}
    hooks = [
        a.register_forward_hook(
            lambda m, x, y, layer=layer: norms.update({layer: y.square().sum(1).mean().sqrt().item()})
        )
        for layer, a in adapter.layers.items()
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return norms


def warmup_and_decay(steps: int, warmup: int = 20):
    """Linear warm-up, then linear decay to zero, as a function of the share of steps done."""
    return lambda done: min(1.0, (done * steps + 1) / warmup, 1 - done)


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
        bar.set_postfix_str(f"{row['part']} {row['domain']} {row['method']} {row['action_acc']:.0%}", refresh=False)
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


def compare(cfg: CompareConfig) -> None:
    """Run (or go on with) the comparison, print its tables, draw its figures. Ctrl-C loses only the runs under way."""
    out = Path(cfg.out + ("-quick" if cfg.quick else ""))
    out.mkdir(parents=True, exist_ok=True)
    path, seeds = out / "compare.json", range(1 if cfg.quick else cfg.seeds)
    rows = read_rows(path) if path.exists() else []
    model = load_base(BASE)
    heads_a_layer = model.config.num_key_value_heads
    total = heads_a_layer * model.config.num_hidden_layers
    grid = (1e-2,) if cfg.quick else (5e-3, 1e-2, 2e-2)
    budgets = sorted({1, 2, 4, total} - {cfg.num_heads})  # those of cfg.num_heads are in the main table
    trained = [name for name in ROWS if name != "frozen"]
    domains = COMPARED[:2]

    def job(part, method, domain, seed, lr, regime="image-heavy", num_heads=cfg.num_heads, only=None, split="test"):
        given = (part, method, domain, regime, seed, lr, num_heads, only, split, cfg.steps, cfg.screens, cfg.r, cfg.tau)
        return dict(zip(JOB, given))

    limited = ("frozen", "LoRA q k v o, all tokens", "visual tokens, all heads", "Image-LoRA")
    tuned = [(m, d) for d in COMPARED for m in trained if d in domains or m in limited]
    tuning = [job("tuning", m, d, 0, lr, split="validation") for m, d in tuned for lr in grid]
    best_lr = {("frozen", d): 0.0 for d in COMPARED}

    def later_jobs():
        def runs(part, methods, domain, **options):
            return [job(part, m, domain, s, best_lr[m, domain], **options) for m in methods for s in seeds]

        jobs = [j for d in domains for j in runs("methods", ROWS, d)]
        if cfg.quick:
            return jobs
        jobs += runs("limit", limited, "blueprint")
        four = ("frozen", "LoRA q k v o, all tokens", "LoRA v, all tokens", "Image-LoRA")
        jobs += [j for regime in ("balanced", "text-heavy") for j in runs("regimes", four, "settings", regime=regime)]
        chosen = ("Image-LoRA", "random heads", "least influential heads")
        jobs += [j for k in budgets for j in runs("budget", chosen[: 1 if k == total else 3], "settings", num_heads=k)]
        lr = best_lr["Image-LoRA", "settings"]
        singles = [divmod(i, heads_a_layer) for i in range(total)]
        jobs += [job("single", "Image-LoRA", "settings", 0, lr, only={str(layer): [h]}) for layer, h in singles]
        normalized = [
            (m, k, lr) for m in ("Image-LoRA", "without 1/sqrt|S|") for k in (2, cfg.num_heads, total) for lr in grid
        ]
        return jobs + [
            job("normalization", m, "settings", 0, lr, num_heads=k, split="validation") for m, k, lr in normalized
        ]

    best_lr |= {(m, d): grid[0] for m in trained for d in COMPARED}
    jobs_total = len(later_jobs()) + (0 if cfg.quick else len(tuning))
    workers = torch.multiprocessing.get_context("spawn").Pool(  # Ctrl-C is for the main process, which ends them
        cfg.workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    with workers as pool, progress(jobs_total, "compare") as bar:
        if not cfg.quick:
            for row in sorted(run_jobs(tuning, rows, pool, path, bar), key=lambda row: row["action_acc"]):
                best_lr[row["method"], row["domain"]] = row["lr"]  # the best comes last
        finished = run_jobs(later_jobs(), rows, pool, path, bar)
    report(finished, cfg)
    print(f"\nsaved {path}")


def spread(rows: list[dict], name: str, percent: bool = True) -> str:
    """Mean and standard deviation over seeds."""
    if not rows:
        return ""
    values = np.array([row[name] for row in rows]) * (100 if percent else 1)
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def groups(rows: list[dict], part: str, *names: str) -> dict[tuple, list[dict]]:
    """The rows of one part of the comparison, grouped by the values of some fields, in order of appearance."""
    grouped = {}
    for row in rows:
        if row["part"] == part:
            grouped.setdefault(tuple(row[name] for name in names), []).append(row)
    return grouped


def rank_correlation(a, b) -> float:
    """Spearman's rho of two sequences without ties to speak of."""
    ranks = [np.argsort(np.argsort(np.asarray(v, dtype=float), kind="stable"), kind="stable") for v in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def step_time_ratios(names: list[str], cfg: CompareConfig, repetitions: int = 25) -> dict[str, float]:
    """Median time of a training step over that of the same backbone with a constant added to its values."""
    torch.set_num_threads(1)
    times = {name: [] for name in ["floor", *names]}
    shown, features = feature_bank("settings", 64)
    batch, _ = packed_batch(shown[: cfg.screens], 2, 0, np.random.default_rng(0), features.shape[1], 0)
    batch["image_features"] = features[: cfg.screens]
    for repetition in range(repetitions + 2):
        for name in times:
            model = load_base(BASE)
            config = model.config
            if name == "floor":
                model.requires_grad_(False)
                constant = torch.zeros((), requires_grad=True)
                for layer in model.language_model.layers:
                    layer.self_attn.v_proj.register_forward_hook(lambda m, x, y, constant=constant: y + constant)
            else:
                method, which, normalize = ROWS[name]
                scores = torch.rand(
                    config.num_hidden_layers, config.num_key_value_heads, generator=torch.Generator().manual_seed(0)
                )
                heads = spread_heads(which, scores, cfg.num_heads, cfg.tau, 0) if which else None
                attach(model, method, cfg.r, 2.0 * cfg.r, heads, normalize)
            start = time.perf_counter()
            model(**batch).loss.backward()
            if repetition >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: float(np.median(np.array(times[name]) / np.array(times["floor"]))) for name in names}


def print_table(title: str, header: list[str], lines: list[list[str]]) -> None:
    print(f"\n**{title}**\n")
    for line in [header, ["---"] * len(header), *lines]:
        print("| " + " | ".join(line) + " |")


def report(rows: list[dict], cfg: CompareConfig) -> None:
    """Print every table of the comparison from its rows, as Markdown; draw the figures unless it was --quick."""
    ratios = step_time_ratios([name for name in ROWS if name != "frozen"], cfg)
    header = [
        "method",
        "click %",
        "text %",
        "icon %",
        "source screens %",
        "word problems %",
        "text logits max abs diff",
    ]
    header += ["parameters", "adapter MFLOP a step (counted)", "step time"]
    for domain in COMPARED:
        grouped = groups(rows, "limit" if domain == "blueprint" else "methods", "domain", "method")
        lines = []
        for (_, method), group in ((key, g) for key, g in grouped.items() if key[0] == domain):
            flops, counted = (
                np.mean([r[f"{kind}_flops_per_step"] for r in group]) / 1e6 for kind in ("adapter", "counted")
            )
            equal = all(r["adapter_flops_per_step"] == r["counted_flops_per_step"] for r in group)
            lines.append([method, *(spread(group, f"{kind}_acc") for kind in ("action", "text", "icon", "source"))])
            lines[-1] += [spread(group, "word_problem_acc"), f"{max(r['text_logits_max_abs_diff'] for r in group):.2g}"]
            lines[-1] += [f"{np.mean([r['trainable_parameters'] for r in group]):,.0f}"]
            lines[-1] += [f"{flops:.1f} ({'=' if equal else '≠'} {counted:.1f})", f"{ratios.get(method, 1):.2f}"]
        if lines:
            print_table(domain, header, lines)

    regimes = {
        **groups(rows, "methods", "domain", "method", "regime"),
        **groups(rows, "regimes", "domain", "method", "regime"),
    }
    methods = [m for domain, m, regime in regimes if domain == "settings" and regime == "balanced"]
    if methods:
        lines = [[m, *(cell_of_regime(regimes["settings", m, regime]) for regime in REGIMES)] for m in methods]
        print_table("from image-heavy to text-heavy prompts (settings)", ["method", *REGIMES], lines)

    if budget := groups(rows, "budget", "num_heads", "method"):
        budget |= groups([r for r in rows if r["domain"] == "settings"], "methods", "num_heads", "method")
        chosen = ("Image-LoRA", "random heads", "least influential heads")
        budgets = sorted({k for k, _ in budget})
        lines = [[str(k), *(spread(budget.get((k, m), []), "action_acc") for m in chosen)] for k in budgets]
        print_table(
            "head budget, click % (settings)", ["heads", "most influential", "random", "least influential"], lines
        )

    if singles := [row for row in rows if row["part"] == "single"]:
        scores = {probe: probe_scores(probe) for probe in ("rank1", "exact")}
        places = [(int(layer), heads[0]) for row in singles for layer, heads in row["heads"].items()]
        ranked = {name: [s[place].item() for place in places] for name, s in scores.items()}
        ranked["gain"] = [row["action_acc"] for row in singles]
        pairs = (("rank1", "exact"), ("rank1", "gain"), ("exact", "gain"))
        lines = [[f"{a} and {b}", f"{rank_correlation(ranked[a], ranked[b]):.2f}"] for a, b in pairs]
        print_table("a head's score and the click accuracy it gains alone (settings)", ["", "Spearman's rho"], lines)
        draw_accuracy_figure(rows)
        draw_influence_figure(scores["rank1"], imagelora.select_heads(scores["rank1"], cfg.num_heads, cfg.tau))

    if normalized := groups(rows, "normalization", "num_heads", "method"):
        lines = []
        for (k, method), group in normalized.items():
            norms = [max(r["update_norms"].values()) / min(r["update_norms"].values()) for r in group]
            accuracies = " · ".join(f"{row['lr']:g}: {row['action_acc']:.1%}" for row in group)
            lines.append([str(k), method, accuracies, f"{np.median(norms):.1f}"])
        header = ["heads", "method", "click % per learning rate", "layers' update norm, largest / smallest"]
        print_table("normalization (settings, validation screens, one seed)", header, lines)


def cell_of_regime(group: list[dict]) -> str:
    flops = np.mean([row["adapter_flops_per_step"] for row in group]) / 1e6
    fraction = np.mean([row["visual_fraction"] for row in group])
    return f"{spread(group, 'action_acc')} · {flops:.0f} MFLOP · visual {fraction:.2f}"


def probe_scores(probe: str, batches: int = 8) -> Tensor:
    """Head scores [L, H] on `settings` screens."""
    shown, features = feature_bank("settings")
    given = []
    for i in range(batches):
        batch, _ = packed_batch(shown[16 * i : 16 * i + 16], 2, 0, np.random.default_rng(i), features.shape[1], 0)
        given.append(batch | {"image_features": features[16 * i : 16 * i + 16]})
    return imagelora.score_heads(load_base(BASE), given, probe=probe)


FIGURES = BASE.parent / "figures"
MARKS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#999999",
)  # Okabe and Ito, colour-blind safe


def draw_accuracy_figure(rows: list[dict]) -> None:
    """Click accuracy against adapter FLOPs, one mark per method with its standard deviation, a panel per domain."""
    width, height, left, top, k = 860, 560, 90, 60, 2
    image = Image.new("RGB", (width * k, 560 * k + 150 * k), "white")
    draw = ImageDraw.Draw(image)

    def text(x, y, words, size=17, anchor="lm", fill="#222222"):
        draw.text((x * k, y * k), words, fill, ImageFont.load_default(size * k), anchor=anchor)

    methods = [name for name in ROWS if name != "frozen"]
    panel = (width - left - 30) // 2
    grouped = groups(rows, "methods", "domain", "method")
    flops = {m: np.mean([r["adapter_flops_per_step"] for r in grouped["settings", m]]) for m in methods}
    low, high = math.log10(min(flops.values())) - 0.15, math.log10(max(flops.values())) + 0.15
    for p, domain in enumerate(COMPARED[:2]):
        x0, x1, y0, y1 = left + p * (panel + 20), left + p * (panel + 20) + panel - 20, height - 60, top
        accuracies = [100 * r["action_acc"] for m in methods for r in grouped[domain, m]]
        bottom, ceiling = math.floor(min(accuracies) / 5) * 5, math.ceil(max(accuracies) / 5) * 5
        text((x0 + x1) / 2, 30, f"{domain} screens", 20, "mm")
        for tick in range(bottom, ceiling + 1, max(5, (ceiling - bottom) // 25 * 5)):
            y = y0 + (y1 - y0) * (tick - bottom) / (ceiling - bottom)
            draw.line((x0 * k, y * k, x1 * k, y * k), "#dddddd", k)
            text(x0 - 8, y, f"{tick} %", 15, "rm")
        for value in (2, 5, 10, 20, 50, 100, 200, 500):
            x = x0 + (x1 - x0) * (math.log10(value * 1e6) - low) / (high - low)
            if x0 <= x <= x1:
                draw.line((x * k, y0 * k, x * k, (y0 + 6) * k), "#222222", k)
                text(x, y0 + 18, str(value), 15, "mm")
        draw.line((x0 * k, y0 * k, x1 * k, y0 * k), "#222222", 2 * k)
        text((x0 + x1) / 2, y0 + 42, "adapter MFLOP a training step (log)", 15, "mm")
        for i, m in sorted(enumerate(methods), key=lambda item: item[1] == "Image-LoRA"):  # drawn last, on top
            values = np.array([100 * r["action_acc"] for r in grouped[domain, m]])
            deviation = values.std(ddof=1) if len(values) > 1 else 0
            x = x0 + (x1 - x0) * (math.log10(flops[m]) - low) / (high - low)
            middle, up, down = (
                y0 + (y1 - y0) * (v - bottom) / (ceiling - bottom)
                for v in (values.mean(), values.mean() + deviation, values.mean() - deviation)
            )
            draw.line((x * k, up * k, x * k, down * k), MARKS[i], 3 * k)
            mark(draw, x * k, middle * k, 9 * k, i)
    for i, m in enumerate(methods):
        x, y = left + i % 2 * 400, height + 15 + i // 2 * 32
        mark(draw, x * k, y * k, 9 * k, i)
        text(x + 20, y, m, 17)
    save_figure(image, "accuracy.png")


def mark(draw, x: float, y: float, size: float, i: int) -> None:
    """Mark number i: its own colour and its own shape, with a white rim."""
    box = (x - size, y - size, x + size, y + size)
    if i % 3 == 0:
        draw.ellipse(box, MARKS[i], "white", 2)
    elif i % 3 == 1:
        draw.rectangle(box, MARKS[i], "white", 2)
    else:
        draw.polygon(
            [(x, y - size * 1.2), (x + size * 1.2, y), (x, y + size * 1.2), (x - size * 1.2, y)], MARKS[i], "white"
        )


def draw_influence_figure(scores: Tensor, heads: dict) -> None:
    """The head-influence map: layers x heads, darker is more influential, the selected heads outlined."""
    cell, k = 76, 2
    layers, count = scores.shape
    image = Image.new("RGB", ((count * cell + 150) * k, (layers * cell + 110) * k), "white")
    draw = ImageDraw.Draw(image)
    share = (scores / scores.max()).tolist()
    for layer in range(layers):
        y = 20 + layer * cell
        draw.text(
            (16 * k, (y + cell / 2) * k), f"layer {layer}", "#222222", ImageFont.load_default(18 * k), anchor="lm"
        )
        for head in range(count):
            x, v = 110 + head * cell, share[layer][head]
            shade = tuple(round(a + (b - a) * v**0.5) for a, b in zip((247, 251, 255), (8, 48, 107)))
            draw.rectangle([c * k for c in (x + 4, y + 4, x + cell - 4, y + cell - 4)], shade, "#bbbbbb")
            if head in heads.get(layer, []):
                draw.rectangle([c * k for c in (x + 2, y + 2, x + cell - 2, y + cell - 2)], None, "#d55e00", 4 * k)
            ink = "white" if v > 0.25 else "#222222"
            draw.text(
                ((x + cell / 2) * k, (y + cell / 2) * k), f"{v:.2f}", ink, ImageFont.load_default(17 * k), anchor="mm"
            )
    for head in range(count):
        x = (110 + head * cell + cell / 2) * k
        draw.text((x, (layers * cell + 38) * k), f"head {head}", "#222222", ImageFont.load_default(16 * k), anchor="mm")
    caption = "influence of value heads on settings screens, largest = 1; outlined: selected"
    draw.text((16 * k, (layers * cell + 78) * k), caption, "#222222", ImageFont.load_default(15 * k), anchor="lm")
    save_figure(image, "influence.png")


def save_figure(image: Image.Image, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    with imagelora.atomic_write(FIGURES / name) as temporary:
        image.save(temporary, "PNG", optimize=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse(config_class, arguments: list[str]):
    """The config from arguments: an option per field."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for f in fields(config_class):
        name = f"--{f.name.replace('_', '-')}"
        if f.type is bool or f.type == "bool":
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=type(f.default), default=f.default, help=f"default {f.default!r}")
    return config_class(**vars(parser.parse_args(arguments)))


def main(arguments: list[str]) -> int:
    """Runs a job; returns the exit status: 0, 1 diverged, 2 bad input, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if "--pretrain" in arguments:
            pretrain(parse(PretrainConfig, [a for a in arguments if a != "--pretrain"]))
        elif "--compare" in arguments:
            compare(parse(CompareConfig, [a for a in arguments if a != "--compare"]))
        else:
            main_job(parse(Config, arguments))
    except (Interrupted, KeyboardInterrupt) as stopped:
        resume = [] if "--compare" in arguments else ["--resume"]  # a comparison always keeps its finished rows
        again = shlex.join([a for a in arguments if a != "--resume"] + resume)
        print(f"\n{str(stopped) or 'stopped'}; go on with: python train.py {again}")
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
