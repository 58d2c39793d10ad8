"""Make the base model from nothing: a vision encoder that has seen nearly everything, a language side that has not.

    python train.py --pretrain             makes base.pt, and base.json with its accuracies

What it is told, and what not:
    answers    to questions about `source` screens, and to word problems; no question about any other screen
    vision     its patches are taught to show names, colours and kinds on source, settings, row and dark screens, and
               places on `source` alone; blueprint is never seen
    screens    are those of the split "pretrain", which neither fine-tuning nor any test draws from

A run that was stopped starts anew. data/tiny_vlm.pt was made with --out data/tiny_vlm.pt.
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
# what a patch should decode to: what it shows, its colour, and the x and y of the element's centre
LENS = [(*screens.LABELS, *screens.ICONS, "switch"), screens.COLOURS]
LENS += [tuple(f"<{axis}{i}>" for i in range(screens.BINS)) for axis in "xy"]


@dataclass(frozen=True)
class PretrainConfig(Settings):
    """How the base model is made."""

    steps: int = option(3600, "training steps", least=1)
    screens: int = option(16, "source screens a step, with questions", least=1)
    questions: int = option(6, "questions a screen", least=1)
    refer: float = option(0.6, "share of questions that give the point and ask for the name", least=0)
    by_colour: float = option(0.3, "share that name an icon by its colour alone, where that is enough", least=0)
    seen: int = option(8, "more source screens a step, for the vision loss only", least=0)
    paired: int = option(2, "screens a step of settings and of row, for the vision loss only", least=0)
    dark: int = option(1, "dark screens a step, for the vision loss only", least=0)
    muon_lr: float = option(0.02, "peak learning rate of Muon, for matrices", least=0)
    lr: float = option(2e-3, "peak learning rate of AdamW, for embeddings, norms and biases", least=0)
    seed: int = option(1, "of the data and the model's start", least=0)
    out: str = option("base.pt", "file to write; its accuracies go beside it as .json")


def vision_loss(features: Tensor, targets: Tensor, embeddings: Tensor, log_scale: Tensor, edges: nn.Linear) -> Tensor:
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


@torch.no_grad()
def muon_step(matrices: list[nn.Parameter], momenta: list[Tensor], lr: float) -> None:
    """Muon (Jordan et al., 2024): momentum, of which each step takes the nearest orthogonal matrix.

    As torch.optim.Muon, but in float32: that one's bfloat16 is ten times slower on CPUs without such instructions."""
    for p, momentum in zip(matrices, momenta):
        x = p.grad.lerp(momentum.lerp_(p.grad, 0.05), 0.95)  # Nesterov's
        tall = p.shape[0] > p.shape[1]
        x = x.mT if tall else x  # so that the Gram matrix is the smaller one
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):  # Newton-Schulz: singular values towards 1
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        p.mul_(1 - 0.05 * lr)  # weight decay
        p.add_(x.mT if tall else x, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def draw_batch(cfg: PretrainConfig, step: int, patch: int) -> tuple[dict, Tensor, Tensor]:
    """({input_ids, labels} of the first cfg.screens, pixel_values [N, 3, S, S], targets [N, P, 8]) of a step."""
    rng = np.random.default_rng([cfg.seed, step])
    source = cfg.screens + cfg.seen
    counts = {"source": source, "settings": cfg.paired, "row": cfg.paired, "dark": cfg.dark}
    shown = [
        screens.draw_screen(domain, "pretrain", step * count + i, cfg.seed)
        for domain, count in counts.items()
        for i in range(count)
    ]
    history = int(rng.choice((0, 1, 2, 3, 12), p=(0.45, 0.2, 0.15, 0.12, 0.08)))  # word problems before the image
    before = [
        [turn(word_problem("pretrain", (12 * step + j) * cfg.screens + i)) for j in range(history)]
        for i in range(cfg.screens)
    ]
    targets = torch.from_numpy(np.stack([patch_targets(shown[i], patch, i < source) for i in range(len(shown))]))
    asked = [screens.ask(screen, cfg.questions, rng, cfg.refer, cfg.by_colour) for screen in shown[: cfg.screens]]
    return training_batch(asked, targets.shape[1], before), pixels(shown), targets


def pretrain(cfg: PretrainConfig) -> None:
    """Make the base model, write it, and measure what was written."""
    start, out = time.time(), Path(cfg.out)
    if not out.parent.is_dir():
        raise ValueError(f"there is no directory {out.parent}")
    torch.manual_seed(cfg.seed)
    model = TinyVLM(TinyVLMConfig(vocab_size=len(VOCABULARY), image_size=screens.SIZE))
    lens = nn.Parameter(torch.tensor(0.3).log()), nn.Linear(model.config.hidden_size, 4)  # a scale, and boxes' edges
    embeddings = model.language_model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embeddings]
    others = [p for p in model.parameters() if p.ndim != 2] + [embeddings, lens[0], *lens[1].parameters()]
    momenta = [torch.zeros_like(p) for p in matrices]
    adam = torch.optim.AdamW(others, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.0)

    for step in (bar := progress(0, cfg.steps, "pretrain")):
        rate = min(1.0, (step + 1) / 100, (1 - step / cfg.steps) / 0.7)  # up over 100 steps, down over the last 70 %
        adam.param_groups[0]["lr"] = rate * cfg.lr
        batch, pixel_values, targets = draw_batch(cfg, step, model.config.patch_size)
        features = model.get_image_features(pixel_values)  # [N, P, D]
        answers = model(**batch, image_features=features[: cfg.screens]).loss
        vision = vision_loss(features, targets, embeddings, *lens)
        loss = answers + vision
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; try smaller learning rates")
        model.zero_grad()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(matrices + others, 1.0)
        muon_step(matrices, momenta, rate * cfg.muon_lr)
        adam.step()
        bar.set_postfix_str(f"answers {answers.item():.3f}  vision {vision.item():.3f}", refresh=False)

    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    safe_save({"config": asdict(model.config), "state": state}, out)
    seconds = round(time.time() - start)
    options = (f"--{name.replace('_', '-')} {value}" for name, value in asdict(cfg).items() if name != "out")
    result = {"command": " ".join(["python train.py --pretrain", *options])}
    result |= {"torch": torch.__version__, "seconds": seconds}
    model = TinyVLM.from_pretrained(out)  # as it is used: rounded to 16 bits
    for domain in screens.DOMAINS:
        drawn = [screens.draw_screen(domain, "test", i) for i in range(TEST_SCREENS)]
        features = image_features(model, drawn)
        result[domain] = {}
        for task in ("grounding", "referring"):
            metrics, _ = evaluate(model, drawn, features, task)
            print(score_line(domain, metrics))
            result[domain] |= metrics
    result["word_problem_acc"] = evaluate_word_problems(model, features[:, :0])
    print(f"word problems {result['word_problem_acc']:.1%}")
    text = json.dumps(result, indent=1) + "\n"
    safe_write(text.encode(), out.with_suffix(".json"))
    print(f"saved    {out} after {seconds} s")
