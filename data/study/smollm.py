"""A real language model, SmolLM2-135M-Instruct, learns to click on screens. What becomes of its English?

python -m data.study.smollm                              print the tables; the runs stand in smollm.csv, one per line
python -m data.study.smollm --method LoRA --seed 4       make one more run: 15 to 25 minutes on one core
python -m data.study.smollm --make-base --base my.pt     make the base model anew: about an hour on two cores

see        The vision tower of data/tiny_vlm.pt stays as it is. A projector learns to show the name, the colour and the
           place of what is in each patch, read through SmolLM2's own word embeddings. SmolLM2 itself does not run.
learn      The projector and LoRA on all linear layers of SmolLM2 learn to answer about source screens. A second loss
           keeps its English close: the divergence from the original SmolLM2 on texts that the original has written.
           LoRA is merged afterwards.
fine-tune  The base learns to click switches, by one of the methods. Unlike in train.py it computes in bfloat16 (or
           float32, where that is faster), gamma stays 1, and replay takes turns between source screens and texts that
           the base has written.

Shapes:  B sequences · T tokens · N screens · P patches, the visual tokens of a screen · D hidden size · V words
"""

import io
import json
import math
import platform
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.base import base_path, image_features
from data.command import command, make_directory, option, write_file
from data.costs import run_costs
from data.evaluate import click_metrics, divergence
from data.methods import (
    ALL,
    HALF,
    LORA,
    METHODS,
    NOTHING,
    SPREAD,
    VALUES,
    VISUAL,
    WITH_REPLAY,
    LoRA,
    Method,
    attach_adapter,
    choose_heads,
)
from data.questions import all_samples, click_right_of, neighbour_samples, random_samples
from data.screens import COLOURS, ICONS, LABELS, Screen, draw_screen
from data.study.lens import lens_loss, patch_targets
from data.study.smollm_vlm import (
    BASE_ALPHA,
    BASE_RANK,
    COLUMNS,
    ROWS,
    SeeingLlama,
    SmolVLM,
    fastest_type,
    parse_letters,
)
from data.study.tables import markdown, mean, read_runs, table, write_runs
from imagelora import score_heads

# The learning rates of LoRA, LoRA at visual tokens and Image-LoRA were chosen with seed 1, by choose_rate in
# data/study/tables.py; those tried are four-fold apart. The others keep the rate of the method that they vary.
RATES = {
    NOTHING: 0.0,
    LORA: 1e-3,
    LORA + WITH_REPLAY: 1e-3,
    VISUAL: 4e-3,
    VALUES: 1.6e-2,
    ALL: 1.6e-2,
    ALL + WITH_REPLAY: 1.6e-2,
    HALF: 1.6e-2,
    SPREAD: 1.6e-2,
}
SETTINGS = ("method", "lr", "seed")  # what tells one run from another
STEPS = 300  # of fine-tuning
TRAIN_SCREENS = 2048
PROBE_BATCHES = 8
TIMED_STEPS = 5  # of which the median counts
REPLAY_TEXTS = 128
TEST_SCREENS = 100  # of each kind, on which clicks are measured
TEXTS = 16  # of 256 tokens, on which English is measured


@dataclass(frozen=True)
class SmolConfig:
    method: str = option("", "a method of the tables: make this run, unless it is in the file already", ("", *RATES))
    lr: float | None = option(None, "AdamW's peak rate; None: the chosen one", least=0)
    seed: int = option(1, "seed for the order of the data, A and the heads; with --make-base for all of it", least=0)
    runs: str = option("data/study/smollm.csv", "the file of runs")
    base: str = option("data/study/smollm.pt", "the base model: a projector, and the LoRA that made SmolLM2 answer")
    make_base: bool = option(False, "make the base model and write it to --base")


# ---- See -------------------------------------------------------------------------------------------------------------


def learn_to_see(vlm: SmolVLM, features: Tensor, targets: Tensor, steps=500) -> None:
    """Trains the projector until a patch reads as what it shows. features [N, P, D]; targets as in patch_targets."""
    embeddings = vlm.model.model.embed_tokens.weight
    kinds = []  # the embeddings of all names, colours, columns and rows
    for words in ((*LABELS, *ICONS, "switch"), COLOURS, COLUMNS, ROWS):
        kinds.append(torch.stack([embeddings[vlm.ids(f" {word}")].mean(0) for word in words]))
    log_scale = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.AdamW([*vlm.projector.parameters(), log_scale], weight_decay=0)
    for step in tqdm(range(steps), "see"):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        picks = torch.randint(len(features), (16,))
        loss = lens_loss(vlm.projector(features[picks]), targets[picks][..., :4], kinds, log_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---- Learn to answer -------------------------------------------------------------------------------------------------


def base_samples(screen: Screen, rng, count: int) -> list[dict]:
    """Questions about a source screen: where is a name, what is at a place; and up to half as many about what is right
    of a name."""
    samples = random_samples(screen, count, rng, refer=0.4, distinct=True)
    samples += neighbour_samples(screen, rng)[: count // 2]
    return rng.permutation(samples).tolist()


@torch.no_grad()
def write_texts(vlm: SmolVLM, count: int, length=96) -> Tensor:
    """Texts that SmolLM2 writes, [count, length]: half of them begin as documents do, half as conversations."""
    texts = []
    for start in ("<|endoftext|>", "<|im_start|>"):
        torch.manual_seed(0)
        first = torch.full((count // 2, 1), vlm.tokenizer.convert_tokens_to_ids(start))
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": None}
        texts.append(vlm.model.generate(first, min_new_tokens=length - 1, max_new_tokens=length - 1, **options))
    texts = torch.cat(texts)
    return texts.where(texts != vlm.model.config.image_token_id, vlm.tokenizer.eos_token_id)  # a text has no image


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


def make_base(cfg: SmolConfig) -> None:
    """See, then learn to answer. Writes the base, and beside it what it can do."""
    start = time.time()
    vlm = SmolVLM()
    torch.manual_seed(cfg.seed)
    vlm.add_projector()
    # These screens are far from those that the tiny model was pretrained on.
    screens = [draw_screen("source", "pretrain", 10**7 + i, 5) for i in range(4000)]
    others = [draw_screen("switches", "pretrain", 10**7 + i, 5) for i in range(500)]
    targets = [patch_targets(screen, vlm.patch_size, places=True) for screen in screens]
    targets += [patch_targets(screen, vlm.patch_size, places=False) for screen in others]
    features = image_features(vlm.tower, screens + others)
    learn_to_see(vlm, features, torch.from_numpy(np.stack(targets)))

    vlm.model.to(fastest_type())
    texts = write_texts(vlm, 256)
    torch.manual_seed(cfg.seed)
    lora = LoRA(vlm.model, BASE_RANK, BASE_ALPHA, ("q", "k", "v", "o", "gate", "up", "down"))
    rng = np.random.default_rng(cfg.seed)

    def loss_of(step: int) -> Tensor:
        picks = rng.choice(len(screens), 8, replace=False)
        batch = vlm.batch([vlm.sequence(base_samples(screens[pick], rng, 12)) for pick in picks])
        answer_loss = vlm.model(**batch, image_features=vlm.projector(features[picks])).loss
        text = texts[rng.choice(len(texts), 2, replace=False)]
        with torch.no_grad(), lora.disabled():
            original_logits = vlm.model(text).logits
        return answer_loss + divergence(original_logits.float(), vlm.model(text).logits.float()).mean()

    optimize("learn", [*vlm.projector.parameters(), *lora.parameters()], 1e-3, 600, loss_of)

    names = [name for name, _ in vlm.model.named_modules() if name.endswith("_proj")]
    content = {"projector": {name: tensor.half() for name, tensor in vlm.projector.state_dict().items()}, "lora": {}}
    for name, A, B in zip(names, lora.A, lora.B):
        content["lora"] |= {f"{name}.A": A.detach().half(), f"{name}.B": B.detach().half()}
    file = io.BytesIO()
    torch.save(content, file)
    write_file(Path(cfg.base), file.getbuffer())
    record = {"seconds": round(time.time() - start), "torch": torch.__version__, "python": platform.python_version()}
    record |= measure_english(vlm, lora.disabled)  # not yet merged, because then there is no original any more
    with lora.disabled():
        openings = [vlm.ids(opening) for opening in OPENINGS[:NUM_SHOWN]]
        record["original_continuations"] = vlm.generate(openings, None, max_new_tokens=16)
    vlm = SmolVLM()
    vlm.load(cfg.base)
    record |= measure_skill(vlm)
    write_file(Path(cfg.base).with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())


# ---- Fine-tune -------------------------------------------------------------------------------------------------------


def run(cfg: SmolConfig, lr: float) -> dict:
    """Fine-tune the base once, and measure: a row of the file."""
    start = time.time()
    vlm = SmolVLM()
    vlm.load(cfg.base)
    print(f"SmolLM2 computes in {vlm.model.dtype}, the fastest type on this processor")
    settings = Method(**METHODS[cfg.method])
    screens = [draw_screen("switches", "train", i) for i in range(TRAIN_SCREENS)]
    features = vlm.see(screens)
    source_screens = [draw_screen("source", "train", i) for i in range(settings.replay * 256)]
    texts = write_texts(vlm, REPLAY_TEXTS) if settings.replay else []

    def batch(index: int, replay: int) -> dict:
        """{input_ids, labels [B, T], image_features}: 8 screens with 5 questions each.

        With replay the first sequence is, by turns, a source screen with its old questions and a text of the base."""
        rng = np.random.default_rng([cfg.seed, index])
        picks = rng.choice(len(screens), 8, replace=False)
        seen = features[picks]
        sequences = []
        for pick in picks:
            sequences.append(vlm.sequence(random_samples(screens[pick], 5, rng, refer=0.0, distinct=True)))
        if replay and index % 2 == 0:
            screen = source_screens[rng.integers(len(source_screens))]
            sequences[0] = vlm.sequence(base_samples(screen, rng, 5))
            seen = torch.cat([vlm.see([screen]), seen[1:]])
        elif replay:
            text = texts[rng.integers(len(texts))].tolist()
            sequences[0] = text, text  # each token is a label, too
            seen = seen[1:]  # the text has no image
        return vlm.batch(sequences) | {"image_features": seen}

    probe_batches = [batch(STEPS + i, replay=0) for i in range(PROBE_BATCHES)]
    heads = None
    if settings.method == "image_lora" and settings.heads != "all":
        scores = score_heads(vlm.model, probe_batches, probe="exact")
        heads = choose_heads(settings.heads, scores, scores.numel() // 2, cfg.seed)
    adapter = attach_adapter(settings, vlm.model, heads, cfg.seed)
    disabled = nullcontext
    trained = []
    step_time = ""  # not measured
    if adapter:
        trained = [parameter for name, parameter in adapter.named_parameters() if not name.endswith("gamma")]
        optimize("train", trained, lr, STEPS, lambda step: vlm.model(**batch(step, settings.replay)).loss)
        disabled = adapter.disabled
        step_time = measure_step_time(vlm.model, disabled, probe_batches[0])
    row = {"method": cfg.method, "lr": lr, "seed": cfg.seed, "step_time": step_time}
    row["parameters"] = sum(parameter.numel() for parameter in trained)
    heads = adapter.heads if settings.method == "image_lora" else None
    costs = run_costs(settings, vlm.model, probe_batches[0]["input_ids"], heads)
    row["flops_of_lora"] = costs["adapter_flops_per_screen"] / costs["lora_flops_per_screen"]
    row |= measure_clicks(vlm) | measure_english(vlm, disabled)
    row |= {"selected": heads, "seconds": round(time.time() - start)}
    dtype = str(vlm.model.dtype).removeprefix("torch.")
    return row | {"dtype": dtype, "torch": torch.__version__, "python": platform.python_version()}


# ---- Measure ---------------------------------------------------------------------------------------------------------

OPENINGS = (
    "The capital of France is",
    "The opposite of hot is",
    "Once upon a time",
    "To make a cup of tea you",
    "Water freezes at",
    "My favourite food is",
    "The largest planet is",
    "In the morning I like to",
    "The sun rises in the",
    "A good friend is someone who",
    "Two plus two is",
    "The best way to learn a language is",
    "Dear Sir or Madam",
    "The recipe calls for",
    "Scientists have discovered that",
    "She opened the door and",
    "The most important thing in life is",
    "An apple a day",
    "Python is a programming language that",
    "Click the button to",
)
NUM_SHOWN = 4  # of these stand in a table, with what each model makes of them


def click_accuracy(vlm: SmolVLM, domain: str, split: str, count: int, erased=False, ask=all_samples) -> float:
    """Share of the targets on `count` screens that are clicked.

    ask: a function of the screens, whose questions it returns as pairs (number of the screen, sample)."""
    screens = [draw_screen(domain, split, i, erased=erased) for i in range(count)]
    numbers, samples = zip(*ask(screens))
    prompts = [vlm.screen_ids + vlm.prompt(sample) for sample in samples]
    answers = vlm.generate(prompts, vlm.see(screens)[list(numbers)], max_new_tokens=3)
    return click_metrics([parse_letters(answer) for answer in answers], samples)["task_acc"]


def measure_clicks(vlm: SmolVLM) -> dict:
    """Clicks on the switches of test and validation screens, and where the switches are erased; and the old task."""
    return {
        "task_acc": click_accuracy(vlm, "switches", "test", TEST_SCREENS),
        "validation_acc": click_accuracy(vlm, "switches", "validation", TEST_SCREENS),
        "erased_acc": click_accuracy(vlm, "switches", "test", TEST_SCREENS, erased=True),
        "source_acc": click_accuracy(vlm, "source", "test", TEST_SCREENS),
    }


def measure_skill(vlm: SmolVLM) -> dict:
    """The old task; and clicks right of a name, on source screens, where this was learned, and on switch screens."""

    def right_of_names(screens: list[Screen]) -> list[tuple[int, dict]]:
        pairs = []
        for i, screen in enumerate(screens):
            samples = neighbour_samples(screen, np.random.default_rng(i))
            pairs += [(i, sample) for sample in samples if "bbox" in sample]  # the others ask for names
        return pairs

    def reworded(screens: list[Screen]) -> list[tuple[int, dict]]:
        return [(i, click_right_of(sample)) for i, sample in all_samples(screens)]

    return {
        "source_acc": click_accuracy(vlm, "source", "test", TEST_SCREENS),
        "right_of_acc": click_accuracy(vlm, "source", "test", TEST_SCREENS, ask=right_of_names),
        "reworded_acc": click_accuracy(vlm, "switches", "test", TEST_SCREENS, ask=reworded),
    }


@torch.no_grad()
def measure_english(vlm: SmolVLM, disabled) -> dict:
    """What has become of English, alone and after a screen. In a context of disabled() the model is what it was.

    perplexity: of texts of Python's own documentation, and perplexity_before. divergence: in nats per token.
    same_next_tokens: the share of tokens after which the most probable next one is the same. same_continuations: how
    many of 20 continuations are the same for 16 tokens. identical: whether all logits are the same, bit for bit."""
    documentation = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    documents = torch.tensor(vlm.tokenizer(documentation[:50_000]).input_ids[: TEXTS * 256]).view(-1, 256)
    screen = vlm.see([draw_screen("switches", "test", 0)])  # [1, P, D]
    record = {}
    for suffix, prefix in (("", []), ("_after_screen", vlm.screen_ids)):
        identical = True
        measures = []
        for rows in documents.split(2):
            features = screen.expand(len(rows), -1, -1) if prefix else None
            ids = torch.cat([torch.tensor([prefix] * len(rows), dtype=torch.long), rows], dim=1)
            logits = vlm.model(ids, features).logits[:, len(prefix) : -1]
            with disabled():
                logits_before = vlm.model(ids, features).logits[:, len(prefix) : -1]
            targets = rows[:, 1:].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets).item()
            loss_before = F.cross_entropy(logits_before.flatten(0, 1).float(), targets).item()
            same_next_tokens = (logits.argmax(-1) == logits_before.argmax(-1)).float().mean().item()
            change = divergence(logits_before.float(), logits.float()).mean().item()
            measures.append([loss, loss_before, change, same_next_tokens])
            identical &= torch.equal(logits, logits_before)
        record[f"identical{suffix}"] = "yes" if identical else "no"
        loss, loss_before, change, same_next_tokens = np.mean(measures, axis=0).tolist()
        record |= {f"perplexity{suffix}": math.exp(loss), f"perplexity_before{suffix}": math.exp(loss_before)}
        record |= {f"divergence{suffix}": change, f"same_next_tokens{suffix}": same_next_tokens}

        prompts = [prefix + vlm.ids(opening) for opening in OPENINGS]
        features = screen.expand(len(prompts), -1, -1) if prefix else None
        texts = vlm.generate(prompts, features, max_new_tokens=16)
        with disabled():
            texts_before = vlm.generate(prompts, features, max_new_tokens=16)
        record[f"same_continuations{suffix}"] = sum(now == before for now, before in zip(texts, texts_before))
        record[f"continuations{suffix}"] = texts[:NUM_SHOWN]
    return record


def measure_step_time(model: SeeingLlama, disabled, batch: dict) -> float:
    """Time of a forward and a backward pass, as a multiple of the frozen model's: the ratio of medians."""
    batch["image_features"].requires_grad_()  # so that the frozen model has a backward pass, too
    seconds = {"adapted": [], "frozen": []}
    for _ in range(TIMED_STEPS):
        for name, context in (("adapted", nullcontext), ("frozen", disabled)):
            with context():
                start = time.perf_counter()
                model(**batch).loss.backward()
                seconds[name].append(time.perf_counter() - start)
    return float(np.median(seconds["adapted"]) / np.median(seconds["frozen"]))


# ---- Tables ----------------------------------------------------------------------------------------------------------

BASE = [  # title of a column, measure, and the layout of a number where it is no percentage
    ("old task, %", "source_acc"),
    ("asked to click right of a name, %", "right_of_acc"),
    ("the same on switch screens, %", "reworded_acc"),
    ("perplexity of the original", "perplexity_before", "{:.2f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("divergence", "divergence", "{:.3f}"),
    ("same continuations, of 20", "same_continuations", "{:.2g}"),
]
FRONT_PAGE = [
    ("parameters", "parameters", "{:,.0f}"),
    ("switches clicked, %", "task_acc"),
    ("divergence of English without an image", "divergence", "{:.2f}"),
    ("divergence of English after an image", "divergence_after_screen", "{:.2f}"),
    ("old task, %", "source_acc"),
]
CLICKS = [
    ("parameters", "parameters", "{:,.0f}"),
    ("adapter FLOPs, % of LoRA's", "flops_of_lora", "{:.0%}"),
    ("learning rate", "lr", "{:g}"),
    ("switches clicked, %", "task_acc"),
    ("where they are erased, %", "erased_acc"),
    ("old task, %", "source_acc"),
    ("time of a step", "step_time", "{:.2f}"),
]
ENGLISH = [
    ("perplexity", "perplexity", "{:.2f}"),
    ("divergence", "divergence", "{:.3f}"),
    ("same next token, %", "same_next_tokens"),
    ("same continuations, of 20", "same_continuations", "{:.2g}"),
    ("bit for bit", "identical", "{}"),
    ("after a screen: divergence", "divergence_after_screen", "{:.3f}"),
    ("same next token, %", "same_next_tokens_after_screen"),
    ("same continuations, of 20", "same_continuations_after_screen", "{:.2g}"),
]
SEARCH = [  # rows of the table of rates
    (LORA, "clicks on validation screens, %", "validation_acc"),
    (LORA, "perplexity of English", "perplexity", "{:.2f}"),
    (VISUAL, "clicks on validation screens, %", "validation_acc"),
    (ALL, "clicks on validation screens, %", "validation_acc"),
    (ALL + WITH_REPLAY, "clicks on validation screens, %", "validation_acc"),
]


def print_tables(runs: list[dict], base: dict) -> None:
    """base: what the base model can do, from the file beside it."""
    runs = sorted(runs, key=lambda run: run["seed"])
    rows = []
    for method, lr in RATES.items():
        of_method = [run for run in runs if (run["method"], run["lr"]) == (method, lr)]
        if of_method:
            rows.append((method, of_method))
    print(
        table(
            "SmolLM2, fine-tuned with", FRONT_PAGE, [row for row in rows if row[0] not in (NOTHING, HALF, SPREAD)], mean
        )
    )
    print(table("before fine-tuning", BASE, [("base model", [base])]))
    print(table("SmolLM2, fine-tuned with", CLICKS, rows))
    print(table("English", ENGLISH, rows))

    texts = [("original SmolLM2", base["original_continuations"])]
    for method, (first, *_) in rows:
        if method == NOTHING or first["identical"] == "no":  # the others go on as the base model does
            texts.append((method, first["continuations"]))
    lines = []
    for name, continuations in texts:
        lines.append((name, *(" ".join(text.replace("|", " ").split()) for text in continuations)))
    print(markdown(("the first seed goes on", *(f"{opening} …" for opening in OPENINGS[:NUM_SHOWN])), *lines))

    rates = sorted({run["lr"] for run in runs if run["lr"]})
    searched = []
    for method, title, *measure in SEARCH:
        cells = []
        for lr in rates:
            of_rate = [run for run in runs if (run["method"], run["lr"], run["seed"]) == (method, lr, 1)]
            cell = mean(of_rate, *measure) if of_rate else ""
            cells.append(f"**{cell}**" if of_rate and lr == RATES[method] else cell)
        searched.append((f"{method}: {title}", *cells))
    print(markdown(("SmolLM2, learning rate", *(f"{lr:g}" for lr in rates)), *searched))


def main(cfg: SmolConfig) -> None:
    path = Path(cfg.runs)
    if cfg.make_base:
        make_directory(Path(cfg.base).parent)  # before an hour of work, because it may be impossible
        make_base(cfg)
    elif cfg.method:
        lr = RATES[cfg.method] if cfg.lr is None else cfg.lr
        known = [tuple(row[name] for name in SETTINGS) for row in read_runs(path, SETTINGS)]
        if (cfg.method, lr, cfg.seed) in known:
            print(f"{path} holds this run already")
        else:
            make_directory(path.parent)
            row = run(cfg, lr)
            write_runs(path, [*read_runs(path, SETTINGS), row])  # Another process may have added one meanwhile.
    else:
        record = base_path(cfg.base).with_suffix(".json")
        if not record.exists():
            raise ValueError(f"there is no {record}; --make-base writes it beside {cfg.base}")
        base = json.loads(record.read_text())
        print_tables(read_runs(base_path(cfg.runs), SETTINGS), base)


if __name__ == "__main__":
    sys.exit(command(SmolConfig, main, __doc__))
