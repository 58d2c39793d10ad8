"""A real language model, SmolLM2-135M-Instruct, learns to click on screens. What becomes of its English?

python -m data.study.smollm --method LoRA --seed 3       make one more run of smollm.csv: 40 to 60 minutes on one core
python -m data.study.smollm --make-base --base my.pt     make the base model anew: about two hours on one core

see        The projector learns to show the name, the colour and the place of what is in each patch, read through
           SmolLM2's own word embeddings. SmolLM2 itself does not run.
learn      The projector and a LoRA on all linear layers learn to answer about old screens. From some step on, a second
           loss keeps English, with and without a screen before it: its KL divergence from what the original SmolLM2
           predicts without a screen. The LoRA is then merged into the weights.
fine-tune  This base model learns to click switches, by one of the methods, with one question about each of 16 screens.
           With own answers, two of the 16 are other questions about new screens, which the base model has answered.

Shapes:  B sequences · T tokens · N screens · P patches, the visual tokens of a screen · D hidden size · V words
"""

import json
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.base import file_path, image_features, screens_and_features
from data.command import command, make_directory, option, write_file
from data.evaluate import evaluate, measure_hints, measure_other_questions
from data.gamma import GAMMAS, smallest_gamma, turned_down
from data.prompts import training_samples
from data.questions import click_right_of, neighbours
from data.replay import make_replay_data
from data.rivals import LoRA
from data.screens import draw_screen
from data.study.lens import LENS, lens_loss, patch_targets
from data.study.plan import SMOLLM2, SMOLLM2_RATES, fields_of
from data.study.pretrain import old_samples
from data.study.runs import add_rows, read_rows
from data.study.smollm_vlm import COLUMNS, ROWS, SmolVLM
from imagelora import attach

KEY = ("base", "method", "lr", "seed", "gamma")  # what tells one row from another
SEE_STEPS = 500
BASE_SCREENS = 2000  # of each of two kinds, to learn to answer
BASE_RATE = 1e-3
BASE_STEPS = 600  # with 8 screens each, and in the last 240 of them 2 texts
FIRST_WITH_TEXT = 360
STEPS = 300  # of fine-tuning
HINT_STEPS = 40  # of fine-tuning with hints
TRAIN_SCREENS = 1024
TEST_SCREENS = 100  # with switches, on which clicks are measured; half as many for a run's other measures
TEXTS = 16  # of 256 tokens, on which English is measured


@dataclass(frozen=True)
class SmolConfig:
    method: str = option("Image-LoRA", "make a run of this method, unless the file holds it", tuple(SMOLLM2_RATES))
    lr: float | None = option(None, "AdamW's peak rate; None: the chosen one", minimum=0)
    seed: int = option(1, "seed for the order of the data and A; with --make-base for all of it", minimum=0)
    out: str = option("data/study/smollm.csv", "the file of runs")
    base: str = option("data/study/smollm_1.pt", "the base model: what makes SmolLM2 see and answer")
    make_base: bool = option(False, "make the base model and write it to --base")


# ---- The base model: see, then learn to answer -----------------------------------------------------------------------


def learn_to_see(vlm: SmolVLM, features: Tensor, targets: Tensor) -> None:
    """Trains the projector, so that a patch reads as what it shows. features [N, P, D]; targets as in patch_targets."""
    embeddings = vlm.model.model.embed_tokens.weight
    names, colours, *_ = LENS
    kinds = []  # the embeddings of all names, colours, columns and rows
    for words in (names, colours, COLUMNS, ROWS):
        kinds.append(torch.stack([embeddings[vlm.ids(f" {word}")].mean(0) for word in words]))
    log_scale = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.AdamW([*vlm.projector.parameters(), log_scale], weight_decay=0)
    for step in tqdm(range(SEE_STEPS), "see"):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / SEE_STEPS)
        picks = torch.randint(len(features), (16,))
        loss = lens_loss(vlm.projector(features[picks]), targets[picks][..., :4], kinds, log_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def optimize(name: str, trained: list[nn.Parameter], lr: float, steps: int, loss_of) -> None:
    """AdamW on loss_of(step). The rate warms up over a thirtieth of the steps, then decays to zero."""
    optimizer = torch.optim.AdamW(trained, weight_decay=0, betas=(0.9, 0.99))
    warm_up_steps = max(steps // 30, 1)
    bar = tqdm(range(steps), name)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm_up_steps, 1 - step / steps)
        loss = loss_of(step)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} in step {step}; choose a lower learning rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)


def text_logits(vlm: SmolVLM, texts: Tensor, features: Tensor | None = None) -> Tensor:
    """The predictions [B, T, V] after each token of texts [B, T]; with features [1 or B, P, D], after a screen."""
    if features is None:
        return vlm.model(texts).logits
    screen_ids = torch.tensor([vlm.screen_ids]).expand(len(texts), -1)
    ids = torch.cat([screen_ids, texts], dim=1)
    logits = vlm.model(ids, features.expand(len(texts), -1, -1)).logits
    return logits[:, screen_ids.shape[1] :]


def divergence(base_logits: Tensor, logits: Tensor) -> Tensor:
    """How far predictions [B, T, V] of the next token are from the base's: KL(base || model) in nats, 0 if they are the
    same. A mean over all tokens."""
    base_log_probs = base_logits.float().log_softmax(-1)
    log_probs = logits.float().log_softmax(-1)
    return (base_log_probs.exp() * (base_log_probs - log_probs)).sum(-1).mean()


def make_base(cfg: SmolConfig) -> None:
    """See, then learn to answer. Writes the base model, and beside it what it can do."""
    start = time.time()
    vlm = SmolVLM()
    torch.manual_seed(cfg.seed)
    vlm.add_projector()
    # Other screens than those that the tiny model was pretrained on. On half of those without switches, two names or
    # more have something to their right.
    candidates = [draw_screen("old", "pretrain", 10**7 + i, 5) for i in range(4 * BASE_SCREENS)]
    screens, more = candidates[:BASE_SCREENS], candidates[BASE_SCREENS:]
    screens += [screen for screen in more if len(neighbours(screen)) > 1][:BASE_SCREENS]
    switch_screens = [draw_screen("new", "pretrain", 10**7 + i, 5) for i in range(BASE_SCREENS // 4)]
    targets = [patch_targets(screen, vlm.patch_size, places=True) for screen in screens]
    targets += [patch_targets(screen, vlm.patch_size, places=False) for screen in switch_screens]
    features = image_features(vlm.tower, screens + switch_screens)
    learn_to_see(vlm, features, torch.from_numpy(np.stack(targets)))

    all_texts = vlm.write_texts()
    torch.manual_seed(cfg.seed)
    vlm.add_lora()
    rng = np.random.default_rng(cfg.seed)

    def loss_of(step: int) -> Tensor:
        picks = rng.choice(len(screens), 8, replace=False)
        batch = vlm.batch([old_samples(screens[pick], 14, rng) for pick in picks])
        answer_loss = vlm.model(**batch, image_features=vlm.projector(features[picks])).loss
        if step < FIRST_WITH_TEXT:
            return answer_loss
        texts = all_texts[rng.choice(len(all_texts), 2, replace=False)]
        with torch.no_grad(), vlm.lora.disabled():
            original_logits = text_logits(vlm, texts)[:, 1:]
        shown = vlm.projector(features[rng.choice(len(features), 2)])  # a screen before each text
        after_screen = divergence(original_logits, text_logits(vlm, texts[:, 1:], shown))
        without_screen = divergence(original_logits, text_logits(vlm, texts)[:, 1:])
        return answer_loss + after_screen + without_screen

    optimize("learn", [*vlm.projector.parameters(), *vlm.lora.parameters()], BASE_RATE, BASE_STEPS, loss_of)
    path = file_path(cfg.base)
    vlm.save(path)
    vlm = SmolVLM()
    vlm.load(cfg.base, merge=False)  # what was written, because it is in 16 bits
    record = {"seconds": round(time.time() - start), "torch": torch.__version__}
    record["source_acc"] = share_clicked(vlm, "old", "test", TEST_SCREENS)
    record["reworded_acc"] = share_clicked(vlm, "new", "test", TEST_SCREENS, click_right_of)
    record |= measure_english(vlm, vlm.lora.disabled)
    write_file(path.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())


# ---- Fine-tune -------------------------------------------------------------------------------------------------------


def run(cfg: SmolConfig, lr: float, gammas: tuple[float, ...]) -> list[dict]:
    """Fine-tune the base model once, and measure it at each gamma: rows of the file. English is measured at 1 and where
    the run counts as turned down."""
    vlm = SmolVLM()
    vlm.load(cfg.base)
    new_data = screens_and_features(vlm, "new", "train", TRAIN_SCREENS)  # (screens, features [N, P, D])
    replay_data = None
    if "replay" in fields_of(cfg.method):
        replay_data = make_replay_data(vlm, new_data, cfg.seed, answer=SmolVLM.answers, num_problems=0)
    hint = fields_of(cfg.method).get("hint", "none")

    def loss_of(step: int) -> Tensor:
        samples, features = training_samples(cfg.seed, step, new_data, replay_data, hint=hint)
        return vlm.model(**vlm.batch(samples), image_features=features).loss

    adapter = attach_adapter(cfg, vlm)
    trained = []
    if adapter:
        trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        optimize("train", trained, lr, STEPS if hint == "none" else HINT_STEPS, loss_of)
    rows = []
    for gamma in gammas:
        row = {"base": Path(cfg.base).stem, "method": cfg.method, "lr": lr, "seed": cfg.seed, "gamma": gamma}
        row["parameters"] = sum(parameter.numel() for parameter in trained)
        with turned_down(adapter or nn.Module(), gamma):
            row |= measure_questions(vlm)
            if hint != "none":
                new_test = screens_and_features(vlm, "new", "test", TEST_SCREENS)
                row |= measure_hints(vlm, new_test, SmolVLM.answers)
        rows.append(row)
    for row in rows:
        if row["gamma"] in (1, smallest_gamma(rows)):
            with turned_down(adapter or nn.Module(), row["gamma"]):
                row |= measure_english(vlm, adapter.disabled if adapter else nullcontext)
    return rows


def attach_adapter(cfg: SmolConfig, vlm: SmolVLM) -> nn.Module | None:
    """Freeze SmolLM2 and add the adapter of the method; None for the base model."""
    torch.manual_seed(cfg.seed)  # so that A does not depend on the random numbers that were drawn before
    fields = fields_of(cfg.method)
    method = fields.get("method", "image_lora")
    r = fields.get("r", 8)
    if method == "none":
        return None
    if method == "image_lora":
        return attach(vlm.model, r, 2 * r)
    return LoRA(vlm.model, r, 2 * r, tokens="visual" if method == "partial_lora" else "all")


# ---- Measure ---------------------------------------------------------------------------------------------------------

OPENINGS = (
    "The capital of France is … The opposite of hot is … Once upon a time … To make a cup of tea you … Water freezes at"
    " … My favourite food is … The largest planet is … In the morning I like to … The sun rises in the … A good friend"
    " is someone who … Two plus two is … The best way to learn a language is … Dear Sir or Madam … The recipe calls for"
    " … Scientists have discovered that … She opened the door and … The most important thing in life is … An apple a"
    " day … Python is a programming language that … Click the button to"
).split(" … ")


def share_clicked(vlm: SmolVLM, domain: str, split: str, count: int, reword=None) -> float:
    """The share of correct clicks on these screens, see data.evaluate.evaluate."""
    test = screens_and_features(vlm, domain, split, count)
    share, _ = evaluate(vlm, *test, reword=reword, generate=SmolVLM.answers)
    return share


def measure_questions(vlm: SmolVLM) -> dict:
    """The other questions of data/evaluate.py, and the new task on test and on validation screens."""
    half = TEST_SCREENS // 2
    metrics = measure_other_questions(vlm, screens_and_features(vlm, "old", "test", half), generate=SmolVLM.answers)
    metrics["task_acc"] = share_clicked(vlm, "new", "test", TEST_SCREENS)
    metrics["validation_acc"] = share_clicked(vlm, "new", "validation", half)
    return metrics


@torch.no_grad()
def measure_english(vlm: SmolVLM, disabled) -> dict:
    """What has become of English, alone and after a screen, compared with what the model without its LoRA or adapter
    predicts without a screen.

    disabled: a context in which the adapter is off.
    divergence_after_screen: the KL divergence of the next-token distributions in nats per token, on Python's language
    reference. identical: whether all logits without a screen are the same, bit for bit. same_continuations: how many of
    20 continuations without a screen are the same for 16 tokens."""
    reference = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    texts = torch.tensor(vlm.tokenizer(reference[:50_000]).input_ids[: TEXTS * 256]).view(-1, 256)
    _, screen = screens_and_features(vlm, "new", "test", 1)  # [1, P, D]
    divergences, identical = [], True
    for part in texts.split(2):
        with disabled():
            original_logits = text_logits(vlm, part)[:, :-1]
        logits = text_logits(vlm, part)[:, :-1]
        logits_after_screen = text_logits(vlm, part, screen)[:, :-1]
        identical &= torch.equal(logits, original_logits)
        divergences.append(divergence(original_logits, logits_after_screen).item())
    openings = [vlm.ids(opening) for opening in OPENINGS]
    with disabled():
        original_continuations = vlm.generate(openings, max_new_tokens=16)
    continuations = vlm.generate(openings, max_new_tokens=16)
    return {
        "divergence_after_screen": float(np.mean(divergences)),
        "identical": "yes" if identical else "no",
        "same_continuations": sum(a == b for a, b in zip(continuations, original_continuations)),
    }


def main(cfg: SmolConfig) -> None:
    path = file_path(cfg.out)
    if cfg.make_base:
        base_path = file_path(cfg.base)  # checked now, because it is better to fail before hours of work
        if base_path.exists():
            raise ValueError(f"{base_path} is there already; name another --base to write to")
        make_directory(base_path.parent)
        make_base(cfg)
        return
    chosen = SMOLLM2_RATES[cfg.method]
    lr = chosen if cfg.lr is None else cfg.lr
    has_curve = cfg.method in SMOLLM2 and cfg.method != "base model" and lr == chosen
    keys_in_file = {tuple(row[name] for name in KEY) for row in read_rows(path, KEY)}
    if (Path(cfg.base).stem, cfg.method, str(lr), str(cfg.seed), "1.0") in keys_in_file:
        print(f"{path} holds this run already; python -m data.study.compare prints the tables")
        return
    make_directory(path.parent)
    add_rows(path, run(cfg, lr, GAMMAS if has_curve else (1.0,)), KEY)


if __name__ == "__main__":
    sys.exit(command(SmolConfig, main, __doc__))
