"""Make the base model from nothing: it sees nearly everything, and is asked about one kind of screen alone.

    python train.py --pretrain             makes base.pt, and base.json with its accuracies

What it is told, and what not:
    vision     patches are taught to show names, colours and kinds on source, settings, row and night screens, and
               places on `source` alone; dark and blueprint are never seen
    questions  about `source` screens alone, and word problems. First stage: where a name is, what is at a place.
               Second stage, the vision encoder frozen: these, and what is right of a name (never where)
    screens    are those of the split "pretrain", which neither fine-tuning nor any test draws from

After the first stage the model is kept in base.first.pt: a run that was stopped later goes on from there, with
--steps 0 --start base.first.pt. data/tiny_vlm.pt was made with --out data/tiny_vlm.pt.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Settings, option, progress, screens
from data.prompts import evaluate, evaluate_word_problems, image_features, pixels, score_line, training_batch, turn
from data.tokenizer import ID, VOCABULARY
from data.word_problems import word_problem
from imagelora import safe_save, safe_write
from tiny_vlm import TinyVLM, TinyVLMConfig

TEST_SCREENS = 400  # of each domain
SHOWN = {"source": 16, "settings": 2, "row": 2, "night": 1}  # screens a step of the first stage; asked about: source
SECOND = 24  # source screens a step of the second stage
POOLS = 12000, 8000  # screens of the second stage: any, and those with many neighbours
QUESTIONS = 12, 6  # about a screen, in the first stage and the second; there about different things
REFER = 0.5  # share of these that give the point and ask for the name
BY_COLOUR = 0.3  # share of the others that name an icon by its colour alone, where that is enough
# what a patch should decode to: what it shows, its colour, and the x and y of the element's centre
LENS = [(*screens.LABELS, *screens.ICONS, "switch"), screens.COLOURS]
LENS += [tuple(f"<{axis}{i}>" for i in range(screens.BINS)) for axis in "xy"]


@dataclass(frozen=True)
class PretrainConfig(Settings):
    """How the base model is made."""

    steps: int = option(3200, "steps of the first stage", least=0)
    second_steps: int = option(1800, "steps of the second stage", least=0)
    relations: int = option(12, f"screens per step, of {SECOND}, that the second stage asks relations about", least=0)
    start: str = option("", "a base model to go on from; then give --steps 0")
    muon_lr: float = option(0.01, "peak learning rate of Muon, for matrices", least=0)
    lr: float = option(2e-3, "peak learning rate of AdamW, for embeddings, norms and biases", least=0)
    seed: int = option(1, "of the data and the model's start", least=0)
    out: str = option("base.pt", "file to write; its accuracies go beside it as .json")

    def __post_init__(self):
        super().__post_init__()
        if self.relations > SECOND:
            raise ValueError(f"relations must be at most {SECOND}, got {self.relations}")
        if bool(self.start) == bool(self.steps):
            raise ValueError("a model to go on from has no first stage: give --start or --steps, got both or neither")


def vision_loss(features, targets, embeddings: Tensor, edges: nn.Linear, log_scale: Tensor) -> Tensor:
    """The loss of the patches' features [N, P, D], what they should show given as targets [N, P, 8].

    The features are read through the tied token embeddings as words (a 'logit lens'): what is shown, its colour, its x
    and y; and by a linear layer as the edges of the element's box, in bins."""
    loss = 0
    for words, target in zip(LENS, targets.unbind(-1)):
        told = target >= 0  # [N, P]
        if told.any():
            logits = log_scale.exp() * features[told] @ embeddings[[ID[word] for word in words]].T
            loss = loss + F.cross_entropy(logits, target[told].long())
    told = targets[..., 4] >= 0
    return loss + F.l1_loss(edges(features[told]), targets[..., 4:][told])


def patch_targets(screen: screens.Screen, patch: int, places: bool) -> np.ndarray:
    """[P, 8]: what each patch shows, as numbers in the four lists of LENS and its box; -1 where that is not told.

    A patch shows an element when it overlaps half of the patch or half of the element."""
    starts = np.arange(0, screens.SIZE, patch)
    targets = np.full((len(starts), len(starts), 8), -1.0, dtype=np.float32)
    for element in screen.elements:
        left, top, right, bottom = element.bbox
        what = [LENS[0].index(element.name), LENS[1].index(element.colour) if element.colour else -1]
        if places:
            what += [*screens.centre_bins(element.bbox), *(edge / screens.BIN for edge in element.bbox)]
        width = (np.minimum(right, starts + patch) - np.maximum(left, starts)).clip(0)  # of its part in each column
        height = (np.minimum(bottom, starts + patch) - np.maximum(top, starts)).clip(0)
        shown = 2 * np.outer(height, width) >= min((right - left) * (bottom - top), patch**2)
        targets[shown, : len(what)] = what
    return targets.reshape(-1, 8)


class MuonAndAdamW:
    """Muon (Jordan et al., 2024) for matrices, AdamW for the rest. Rates warm up over 100 steps, and fall to zero
    over the last 70 % of them."""

    def __init__(self, cfg: PretrainConfig, named: list[tuple[str, nn.Parameter]], steps: int):
        self.muon_lr, self.lr, self.steps = cfg.muon_lr, cfg.lr, steps
        self.matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        self.others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.AdamW(self.others, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, loss: Tensor, step: int) -> None:
        """Follows the gradient of the loss in step number `step`."""
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; try smaller learning rates")
        for p in self.matrices + self.others:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.matrices + self.others, 1.0)
        rate = min(1.0, (step + 1) / 100, (1 - step / self.steps) / 0.7)
        self.adam.param_groups[0]["lr"] = rate * self.lr
        self.adam.step()
        for p, momentum in zip(self.matrices, self.momenta):
            muon(p, momentum, rate * self.muon_lr)


@torch.no_grad()
def muon(p: nn.Parameter, momentum: Tensor, lr: float) -> None:
    """Momentum, of which each step takes the nearest orthogonal matrix.

    As torch.optim.Muon, but in float32: that one's bfloat16 is ten times slower on CPUs without such instructions."""
    x = p.grad.lerp(momentum.lerp_(p.grad, 0.05), 0.95)  # Nesterov's
    tall = p.shape[0] > p.shape[1]
    x = x.mT if tall else x  # so that the Gram matrix is the smaller one
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):  # Newton-Schulz: singular values towards 1
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    p.mul_(1 - 0.05 * lr)  # weight decay
    p.add_(x.mT if tall else x, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def told_before(step: int, count: int, rng: np.random.Generator) -> list[list]:
    """Word problems before each of `count` images: none in 45 % of the steps, up to 12."""
    history = int(rng.choice((0, 1, 2, 3, 12), p=(0.45, 0.2, 0.15, 0.12, 0.08)))
    return [[turn(word_problem("pretrain", (12 * step + j) * count + i)) for j in range(history)] for i in range(count)]


def first_batch(seed: int, step: int, patch: int) -> tuple[dict, Tensor, Tensor]:
    """({input_ids, labels} of the first screens, pixel_values [N, 3, S, S], targets [N, P, 8]) of a step."""
    rng = np.random.default_rng([seed, step])
    shown = [
        screens.draw_screen(domain, "pretrain", step * count + i, seed)
        for domain, count in SHOWN.items()
        for i in range(count)
    ]
    targets = [patch_targets(screen, patch, places=i < SHOWN["source"]) for i, screen in enumerate(shown)]
    asked = [screens.ask(screen, QUESTIONS[0], rng, REFER, BY_COLOUR) for screen in shown[: SHOWN["source"]]]
    batch = training_batch(asked, targets[0].shape[0], told_before(step, SHOWN["source"], rng))
    return batch, pixels(shown), torch.from_numpy(np.stack(targets))


def first_stage(cfg: PretrainConfig, model: TinyVLM) -> None:
    """The whole model learns to see, to ground and to refer."""
    lens = nn.Linear(model.config.hidden_size, 4), nn.Parameter(torch.tensor(0.3).log())  # boxes' edges, and a scale
    named = [*model.named_parameters(), *lens[0].named_parameters(), ("scale", lens[1])]
    optimizer = MuonAndAdamW(cfg, named, cfg.steps)
    for step in (bar := progress(0, cfg.steps, "see")):
        batch, pixel_values, targets = first_batch(cfg.seed, step, model.config.patch_size)
        features = model.get_image_features(pixel_values)  # [N, P, D]
        answers = model(**batch, image_features=features[: SHOWN["source"]]).loss
        vision = vision_loss(features, targets, model.language_model.embed_tokens.weight, *lens)
        optimizer.step(answers + vision, step)
        bar.set_postfix_str(f"answers {answers.item():.3f}  vision {vision.item():.3f}", refresh=False)


def second_stage(cfg: PretrainConfig, model: TinyVLM) -> None:
    """The language model alone goes on, and learns what stands right of what, on cfg.relations of its screens."""
    drawn, many = [], []
    for i in range(10**6):
        screen = screens.draw_screen("source", "pretrain", SHOWN["source"] * 10**5 + i, cfg.seed)
        if len(drawn) < POOLS[0]:
            drawn.append(screen)
        elif len(screens.relations(screen)) >= 3:
            many.append(screen)
        if len(many) == POOLS[1]:
            break
    seen, seen_of_many = image_features(model.vision_tower, drawn), image_features(model.vision_tower, many)
    project = model.multi_modal_projector
    trained = [*project.named_parameters(), *model.language_model.named_parameters()]
    optimizer = MuonAndAdamW(cfg, trained, cfg.second_steps)
    for step in (bar := progress(0, cfg.second_steps, "relate")):
        rng = np.random.default_rng([cfg.seed, 1, step])
        picks = rng.choice(len(drawn), SECOND - cfg.relations, replace=False)
        asked = [screens.ask(drawn[i], QUESTIONS[1], rng, REFER, BY_COLOUR, distinct=True) for i in picks]
        before = told_before(step, len(picks), rng)
        batch = training_batch(asked, seen.shape[1], before)
        loss = model(**batch, image_features=project(seen[picks])).loss
        text = f"answers {loss.item():.3f}"
        if cfg.relations:
            picks = rng.choice(len(many), cfg.relations, replace=False)
            asked = [rng.permutation(screens.relations(many[i])).tolist() for i in picks]
            batch = training_batch(asked, seen.shape[1], [[]] * len(picks))
            related = model(**batch, image_features=project(seen_of_many[picks])).loss
            loss, text = loss + related, f"{text}  relations {related.item():.3f}"
        optimizer.step(loss, step)
        bar.set_postfix_str(text, refresh=False)


def save(model: TinyVLM, path: Path) -> None:
    """Writes {"config", "state"}, in 16 bits."""
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    safe_save({"config": asdict(model.config), "state": state}, path)


def pretrain(cfg: PretrainConfig) -> None:
    """Make the base model, write it, and measure what was written."""
    start, out = time.time(), Path(cfg.out)
    if not out.parent.is_dir():
        raise ValueError(f"there is no directory {out.parent}")
    first = Path(cfg.start) if cfg.start else out.with_suffix(".first.pt")
    if cfg.steps:
        torch.manual_seed(cfg.seed)
        model = TinyVLM(TinyVLMConfig(vocab_size=len(VOCABULARY), image_size=screens.SIZE))
        first_stage(cfg, model)
        save(model, first)
    model = TinyVLM.from_pretrained(first)  # rounded to 16 bits: a second stage that starts anew is the same
    if cfg.second_steps:
        second_stage(cfg, model)
    save(model, out)
    seconds = round(time.time() - start)
    given = {name: value for name, value in asdict(cfg).items() if name != "out" and value != ""}
    options = (f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    result = {"command": " ".join(["python train.py --pretrain", *options])}
    result |= {"torch": torch.__version__, "seconds": seconds}
    model = TinyVLM.from_pretrained(out)  # as it is used: rounded to 16 bits
    for domain in screens.DOMAINS:
        drawn = [screens.draw_screen(domain, "test", i) for i in range(TEST_SCREENS)]
        features = image_features(model.get_image_features, drawn)
        result[domain] = {}
        for task in ("grounding", "referring", "relations")[: 3 if domain == "source" else 2]:
            metrics, _ = evaluate(model, drawn, features, task)
            print(score_line(domain, metrics))
            result[domain] = metrics | result[domain]  # the numbers of clicks stay those of clicks
    result["word_problem_acc"] = evaluate_word_problems(model, features[:, :0])
    print(f"word problems {result['word_problem_acc']:.1%}")
    text = json.dumps(result, indent=1) + "\n"
    safe_write(text.encode(), out.with_suffix(".json"))
    print(f"saved    {out} after {seconds} s")
