"""Fine-tune the tiny VLM by Image-LoRA on a new kind of screen, and watch every claim of the paper happen.

    python train.py                        before -> probe -> select -> train -> after -> cost; ~1 minute on a laptop CPU
    python train.py --method lora          the same with standard LoRA (q, k, v, o of every layer, all tokens)
    python train.py --pretrain             make the base model, data/tiny_vlm.pt, from nothing
    python train.py --compare              all methods, prompts, budgets and seeds: the tables and figures of README

Shapes:  B sequences · T tokens · N screens · P visual tokens a screen · D hidden size · L layers · H value heads
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
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
    num_heads: int = 12  # value heads to adapt (image_lora)
    r: int = 8  # rank
    lora_alpha: float = 16.0  # the update is scaled by lora_alpha / r
    tau: float = 0.5  # layer budget ~ influence^tau: 0 even, 1 proportional
    lr: float = 5e-3  # peak learning rate of AdamW
    steps: int = 400  # training steps
    screens: int = 16  # screens a step
    questions: int = 4  # questions a screen, packed into one sequence
    history: int = 0  # word problems told before each screen: longer text, same image
    seed: int = 0  # of the data, the adapter's start and the probe
    device: str = "auto"  # auto | cpu | cuda | mps
    out: str = ""  # output directory; default runs/DOMAIN
    resume: bool = False  # go on from OUT/checkpoint.pt

    def __post_init__(self):
        choices = {"method": METHODS, "domain": S.DOMAINS, "device": ("auto", "cpu", "cuda", "mps")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("num_heads", "r", "steps", "screens", "questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lora_alpha", "tau", "lr", "history", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
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


def packed_batch(screens: list[S.Screen], questions: int, history: int, refer: float, rng, patches: int, first: int):
    """One sequence a screen: `history` word problems (numbered from `first`), the image, `questions` about it.

    Returns (model inputs, boxes [B, questions] of the clicks, None for referring questions, a share `refer` of them).
    """
    ids, labels, boxes = [], [], []
    for i, screen in enumerate(screens):
        turns = [turn(word_problem("train", (first + i) * max(history, 1) + j)) for j in range(history)]
        turns.append(([ID[IMAGE]] * patches, [-100] * patches))
        targets = screen.targets()
        boxes.append([])
        for _ in range(questions):
            element = targets[rng.integers(len(targets))]
            click = rng.random() >= refer
            turns.append(turn(S.grounding(screen, element, rng) if click else S.referring(screen, element)))
            boxes[-1].append(element.click if click else None)
        ids.append([ID[BOS]] + [t for tokens, _ in turns for t in tokens])
        labels.append([-100] + [t for _, tokens in turns for t in tokens])
    batch = {"input_ids": pad(ids, ID[PAD]), "labels": pad(labels, -100)}
    return batch | {"pixel_values": pixels([s.image for s in screens])}, boxes


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
        with imagelora.atomic_write(path) as temporary:
            torch.save({"r": self.r, "scaling": self.scaling, "lora": self.state_dict()}, temporary)


def attach(model: TinyVLM, method: str, r: int, lora_alpha: float, heads: dict | None) -> nn.Module | None:
    """The adapter of a method of METHODS on the model."""
    if method == "image_lora":
        return imagelora.attach(model, r, lora_alpha, heads)
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


class Stop:
    """Turns Ctrl-C and SIGTERM into a flag that the training loop reads after each step."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
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
    if resume and checkpoint.exists():
        saved = imagelora.safe_load(checkpoint)
        if saved.get("signature") != signature:
            raise ValueError(f"{checkpoint} is of a run with other settings: {saved.get('signature')}")
        module.load_state_dict(saved["module"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        start = saved["step"]
        bar.update(start)

    def save(step):
        if checkpoint and rank0:
            content = {"signature": signature, "step": step, "module": module.state_dict()}
            with imagelora.atomic_write(checkpoint) as temporary:
                torch.save(content | {"optimizers": [o.state_dict() for o in optimizers]}, temporary)

    with Stop() as stop:
        for step in range(start, steps):
            for group in (group for o in optimizers for group in o.param_groups):
                group["lr"] = group["initial_lr"] * schedule(step / steps)
            loss, text = loss_of(step)
            if not loss.isfinite():
                raise Diverged(
                    f"the loss is {loss.item()} at step {step}; try a smaller --lr than {group['initial_lr']}"
                )
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            bar.set_postfix_str(text, refresh=False)
            bar.update()
            if stop.requested or (step + 1) % every == 0:
                save(step + 1)
            if stop.requested:
                raise Interrupted(f"stopped after step {step + 1} of {steps}")


def progress(total: int, name: str, quiet: bool = False) -> tqdm:
    layout = "{desc:<9}|{bar:24}| {n_fmt}/{total_fmt}  {postfix}  {elapsed} < {remaining}"
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
    settings_screens: int = 4  # a step, seen by the vision loss only
    dark_screens: int = 1  # likewise, and without the elements' places
    muon_lr: float = 0.03  # peak learning rate of Muon for matrices
    lr: float = 2e-3  # peak learning rate of AdamW for embeddings, norms and biases
    seed: int = 0
    out: str = str(BASE)
    resume: bool = False


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
        batch, _ = packed_batch(shown, cfg.questions, history, cfg.refer, rng, patches, first)
        targets = [lens_targets(screen, patch, where=True) for screen in shown]
        for domain, count in (("settings", cfg.settings_screens), ("dark", cfg.dark_screens)):
            seen = range(step * count, (step + 1) * count)
            extra = [S.draw_screen(domain, "train", i, cfg.seed) for i in seen]
            shown, targets = shown + extra, targets + [lens_targets(e, patch, domain != "dark") for e in extra]
        features = model.get_image_features(pixels([screen.image for screen in shown]))
        answers = model(batch["input_ids"], labels=batch["labels"], image_features=features[: cfg.screens]).loss
        lens = lens_loss(model, features, torch.from_numpy(np.stack(targets)), model.log_lens_scale.exp())
        return answers + lens, f"answers {answers.item():.3f}  lens {lens.item():.3f}"

    def schedule(done):  # warm-up over 100 steps, linear decay over the last two thirds
        return min(1.0, (done * cfg.steps + 1) / 100, (1 - done) * 1.5)

    out = Path(cfg.out)
    checkpoint, settings = out.with_suffix(".checkpoint.pt"), {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    signature = json.dumps({k: v for k, v in settings.items() if k not in ("out", "resume")})
    with progress(cfg.steps, "pretrain") as bar:
        train_loop(model, optimizers, cfg.steps, schedule, loss_of, bar, checkpoint, signature, cfg.resume, every=250)
    del model.log_lens_scale
    with imagelora.atomic_write(out) as temporary:
        state = {name: tensor.half() for name, tensor in model.state_dict().items()}
        torch.save({"config": model.config.to_dict(), "state": state}, temporary)
    model = load_base(out)  # as it is used: rounded to 16 bits
    metrics = {domain: evaluate(model, domain, "test", 400)[0] for domain in S.DOMAINS}
    metrics |= {"word_problem_acc": evaluate_word_problems(model, "test"), "seconds": round(time.time() - start)}
    command = " ".join(["python train.py --pretrain", *(f"--{k} {v}" for k, v in json.loads(signature).items())])
    write_json(out.with_suffix(".json"), {"command": command, "torch": torch.__version__, **metrics})
    checkpoint.unlink(missing_ok=True)
    for domain in S.DOMAINS:
        print(f"{domain:<9} {accuracy_line(metrics[domain])}")
    print(f"text      word problems {metrics['word_problem_acc']:.1%}\nsaved     {out} after {metrics['seconds']} s")


def load_base(path: str | os.PathLike) -> TinyVLM:
    """The tiny VLM in a base file, float32, in evaluation mode. Raises ValueError on a missing, damaged or foreign file."""
    content = imagelora.safe_load(path)
    try:
        config = TinyVLMConfig(**content["config"])
        if config.vocab_size != len(VOCABULARY) or config.image_size != S.SIZE:
            raise ValueError(f"made for {config.vocab_size} words and {config.image_size} px screens")
        model = TinyVLM(config)
        model.load_state_dict(content["state"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path} is not a base model of this project ({reason}); make one: --pretrain") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"{path} holds values that are not finite; make a new one: --pretrain")
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The main job


def write_json(path: Path, content) -> None:
    with imagelora.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def accuracy_line(m: dict) -> str:
    return f"{m['action_acc']:6.1%}  (text {m['text_acc']:.1%}  icon {m['icon_acc']:.1%})"


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
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        with imagelora.atomic_write(out / "metrics.json") as temporary:  # fails now, rather than after training
            temporary.write_text("{}")
        (out / "metrics.json").unlink()
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    patches = model.config.num_patches
    size = sum(p.numel() for p in model.parameters())
    say(f"base     {BASE.name} · {size / 1e6:.2f} M parameters · {patches} visual tokens a screen · {device}")
    before, base_points = evaluate(model, cfg.domain, "test", 200, cfg.history)
    before["word_problem_acc"] = evaluate_word_problems(model, "test")
    base_text = text_logits(model)
    say(
        f"before   click accuracy on {cfg.domain} screens {accuracy_line(before)}    word problems {before['word_problem_acc']:.1%}"
    )

    def batch_of(step: int) -> tuple[dict, list]:
        """This process's share of the screens of a step; steps below 0 are for the probe."""
        mine = range(rank * cfg.screens // world, (rank + 1) * cfg.screens // world)
        drawn = [S.draw_screen(cfg.domain, "train", (step + 2) * cfg.screens + i, cfg.seed) for i in mine]
        rng = np.random.default_rng([cfg.seed, step + 2, rank])
        batch, boxes = packed_batch(drawn, cfg.questions, cfg.history, 0.0, rng, patches, (step + 2) * cfg.screens)
        return {name: tensor.to(device) for name, tensor in batch.items()}, boxes

    heads = None
    if cfg.method == "image_lora":
        scores = imagelora.score_heads(model, [batch_of(-2)[0], batch_of(-1)[0]], seed=cfg.seed)
        heads = imagelora.select_heads(scores, cfg.num_heads, cfg.tau)
        say(
            f"probe    rank-1 influence of {scores.numel()} value heads, {2 * cfg.screens} screens   {bars(scores, heads)}"
        )
        chosen = " · ".join(f"layer {layer}: {' '.join(map(str, h))}" for layer, h in heads.items())
        say(f"select   {cfg.num_heads} of {scores.numel()} heads: {chosen}")

    torch.manual_seed(cfg.seed)
    adapter = attach(model, cfg.method, cfg.r, cfg.lora_alpha, heads)
    after, tuned_points, difference, cost = before, base_points, 0.0, {}
    if adapter is not None:
        cost = train_adapter(cfg, model, adapter, batch_of, out, world, quiet=rank > 0)
        after, tuned_points = evaluate(model, cfg.domain, "test", 200, cfg.history)
        after["word_problem_acc"] = evaluate_word_problems(model, "test")
        difference = (text_logits(model) - base_text).abs().max().item()
    say(
        f"after    click accuracy on {cfg.domain} screens {accuracy_line(after)}    word problems {after['word_problem_acc']:.1%}"
    )
    verdict = "identical" if difference == 0 else "changed"
    say(f"text     logits of {len(base_text)} text-only prompts: {verdict} (max |difference| = {difference:.3g})")
    if cost:
        parameters, flops = cost["trainable_parameters"], cost["adapter_flops_per_screen"]
        say(
            f"cost     {parameters:,} trainable parameters ({parameters / cost['lora_trainable_parameters']:.0%} of LoRA's)"
            f" · adapter {flops / 1e6:.2f} MFLOP a screen ({flops / cost['lora_flops_per_screen']:.0%} of LoRA's),"
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

    def schedule(done):  # warm-up over 20 steps, then linear decay
        return min(1.0, (done * cfg.steps + 1) / 20, 1 - done)

    settings = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in ("device", "out", "resume")}
    with progress(cfg.steps, "train", quiet) as bar:
        train_loop(
            adapter,
            [optimizer],
            cfg.steps,
            schedule,
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
    try:
        if "--pretrain" in arguments:
            pretrain(parse(PretrainConfig, [a for a in arguments if a != "--pretrain"]))
        else:
            main_job(parse(Config, arguments))
    except Interrupted as stopped:
        print(f"{stopped}; go on with: python train.py {' '.join(a for a in arguments if a != '--resume')} --resume")
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
