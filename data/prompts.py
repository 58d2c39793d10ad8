"""A screen and its questions as token ids; answers decoded and scored; the data of a fine-tuning run, and its measures.

    <bos> [word problems] <image> x P, then questions with their answers; the loss is on answers only

Shapes:  B sequences · T tokens · N screens · P visual tokens a screen · D hidden size
"""

from collections import defaultdict
from functools import cache
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import screens
from data.screens import BIN, BINS, PAIRED, SIZE, Screen, draw_screen, fits_prior, is_hit
from data.tokenizer import BOS, EOS, ID, IMAGE, PAD, decode, encode, parse_point
from data.word_problems import word_problem
from tiny_vlm import TinyVLM

BASE = "data/tiny_vlm.pt"
PROBE_BATCHES = 16  # of training data; each has its own random A, so the more, the less noise
TRAIN_SCREENS = 2048
Turn = list[tuple[int, int]]  # (id, label) of each word of an instruction and its answer; -100: not to be predicted
CHUNK = 256  # prompts or screens at a time in evaluation


def turn(sample: dict, learn: bool = True) -> Turn:
    question, answer = encode(sample["instruction"]), encode(f"{sample['answer']} {EOS}")
    return [(word, -100) for word in question] + [(word, word if learn else -100) for word in answer]


def pad(rows: list, value: int, side: str = "right") -> Tensor:
    """Rows of different lengths -> [B, T]."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


def pixels(drawn: list[Screen]) -> Tensor:
    """pixel_values [N, 3, side, side] in 0..1."""
    return torch.from_numpy(np.stack([screen.image for screen in drawn])).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def image_features(encode, drawn: list[Screen], device=None) -> Tensor:
    """What a vision encoder makes of screens, [N, P, D]. It is frozen in fine-tuning, so once is enough."""
    chunks = [drawn[i : i + CHUNK] for i in range(0, len(drawn), CHUNK)]
    return torch.cat([encode(pixels(chunk).to(device)) for chunk in chunks])


def training_batch(asked: list[list[dict]], patches: int, before: list[list[Turn]]) -> dict[str, Tensor]:
    """{input_ids, labels} [B, T] of a sequence a screen: the turns `before` it, its image, what is asked about it."""
    rows = []
    for samples, told in zip(asked, before):
        row = [(ID[BOS], -100), *chain(*told)]
        row += [(ID[IMAGE], -100)] * patches
        rows.append(row + [word for sample in samples for word in turn(sample)])
    ids, labels = pad(rows, -100).unbind(-1)
    return {"input_ids": ids.where(ids >= 0, ID[PAD]), "labels": labels}


def exam(drawn: list[Screen], task: str = "grounding") -> list[tuple[int, dict]]:
    """Every target of every screen asked once, or what is right of it: (number of the screen, sample)."""
    rng, asked = np.random.default_rng(0), []
    for i, screen in enumerate(drawn):
        if task == "relations":
            samples = screens.relations(screen)
        elif task == "referring":
            samples = [screens.referring(screen, target) for target in screen.targets()]
        else:
            samples = [screens.grounding(screen, target, rng) for target in screen.targets()]
        asked += [(i, sample) for sample in samples]
    return asked


def questions(samples: list[dict], features: Tensor, history: int = 0) -> dict[str, Tensor]:
    """The model's arguments for samples, each after `history` word problems and its image: features [B, P or 0, D]."""
    before = [ID[BOS], *(word for i in range(history) for word, _ in turn(word_problem("validation", i)))]
    before += [ID[IMAGE]] * features.shape[1]
    ids = pad([before + encode(sample["instruction"]) for sample in samples], ID[PAD], "left").to(features.device)
    return {"input_ids": ids, "attention_mask": (ids != ID[PAD]).long(), "image_features": features}


@torch.no_grad()
def answer(model, samples: list[dict], features: Tensor, history: int = 0) -> list[str]:
    """Greedy answers to `questions`."""
    answers = []
    for start in range(0, len(samples), CHUNK):
        part = slice(start, start + CHUNK)
        batch = questions(samples[part], features[part], history)
        out = model.generate(**batch, max_new_tokens=3)
        answers += [decode(row) for row in out[:, batch["input_ids"].shape[1] :].tolist()]
    return answers


def evaluate(model, drawn: list[Screen], features: Tensor, task: str = "grounding", history: int = 0):
    """All targets of these screens -> (ScreenSpot's metrics or name_acc, [(screen, sample, point or name)])."""
    order, samples = zip(*exam(drawn, task))
    answers = answer(model, samples, features[list(order)], history)
    if task != "grounding":
        right = [given == sample["answer"] for given, sample in zip(answers, samples)]
        metrics = {"name_acc" if task == "referring" else "relation_acc": float(np.mean(right))}
    else:
        answers = [parse_point(given) for given in answers]
        hits = np.array([is_hit(point, sample["bbox"]) for point, sample in zip(answers, samples)])
        words = np.array([sample["data_type"] == "text" for sample in samples])
        kinds = {"action_acc": hits, "text_acc": hits[words], "icon_acc": hits[~words]}
        metrics = {name: float(of_kind.mean()) for name, of_kind in kinds.items()}
        metrics["wrong_format_num"] = answers.count(None)  # no points
    return metrics | {"num_total": len(samples)}, [*zip((drawn[i] for i in order), samples, answers)]


def best_move(clicks: list, boxes: list) -> tuple[int, int]:
    """The move (dx, dy), in whole bins and one for all, after which the most of these clicks are in their boxes."""
    steps = np.arange(1 - BINS, BINS) * BIN
    x, y = np.array(clicks)[..., None].transpose(1, 0, 2)  # each [N, 1]
    left, top, right, bottom = np.array(boxes)[..., None].transpose(1, 0, 2)
    columns = (left <= x + steps) & (x + steps < right)  # [N, moves]
    rows = (top <= y + steps) & (y + steps < bottom)
    hits = columns.T.astype(float) @ rows  # [moves in x, moves in y]
    dx, dy = np.unravel_index(hits.argmax(), hits.shape)
    return int(steps[dx]), int(steps[dy])


def rule(learn: list, given: list, kind: str = "", start=lambda point: point) -> float:
    """Click accuracy of a rule: from start(the base model's click), move as was best on the answers `learn`.

    One move for all, or with `kind` (a field of the samples) one for each of these. No point is a miss."""
    clicks, boxes = defaultdict(list), defaultdict(list)
    for _, sample, point in learn:
        if point:
            clicks[sample.get(kind)].append(start(point))
            boxes[sample.get(kind)].append(sample["bbox"])
    moves = {which: best_move(clicks[which], boxes[which]) for which in clicks}
    hits = 0
    for _, sample, point in given:
        if point:
            (x, y), (dx, dy) = start(point), moves.get(sample.get(kind), (0, 0))
            hits += is_hit((x + dx, y + dy), sample["bbox"])
    return hits / len(given)


def evaluate_word_problems(model, features: Tensor, count: int = 256) -> float:
    """Share of test word problems whose final number is right, each asked after one of the images of `questions`."""
    problems = [word_problem("test", i) for i in range(count)]
    answers = answer(model, problems, features[torch.arange(count) % len(features)])
    finals = [(given.split()[-1:], problem["answer"].split()[-1:]) for given, problem in zip(answers, problems)]
    return float(np.mean([given == right for given, right in finals]))


@torch.no_grad()
def text_logits(model) -> Tensor:
    """Logits of text-only prompts (test word problems with their answers) [256, T, V]."""
    told = [[turn(word_problem("test", i))] for i in range(256)]
    ids = training_batch([[]] * len(told), 0, told)["input_ids"]
    return model(ids.to(model.device)).logits


def hit_rate(logits: Tensor, labels: Tensor, boxes: list) -> float:
    """Share of a batch's clicks, given teacher-forced, that hit their targets."""
    answers = logits[:, :-1][labels[:, 1:] >= 0].argmax(-1).view(-1, 3)  # each is x, y, <eos>
    points = [parse_point(decode(words)) for words in answers[:, :2].tolist()]
    return float(np.mean([is_hit(point, box) for point, box in zip(points, boxes)]))


def score_line(domain: str, metrics: dict) -> str:
    """The metrics of `evaluate` in words, and the word problems where they were measured too."""
    line = "click accuracy on {domain} screens {action_acc:6.1%}  (words {text_acc:.1%}  icons {icon_acc:.1%})"
    if "name_acc" in metrics:
        line = "names right on {domain} screens {name_acc:6.1%}"
    if "relation_acc" in metrics:
        line = "what is right of a name, on {domain} screens {relation_acc:6.1%}"
    if "word_problem_acc" in metrics:
        line += "    word problems {word_problem_acc:.1%}"
    return line.format(domain=domain, **metrics)


def base_path(base: str) -> Path:
    """A base model's file: as it is called from here, or else from the project's directory."""
    path = Path(base)
    return path if path.exists() else Path(__file__).parent.parent / base


@cache
def seen(base: str, domain: str, split: str, count: int, device: torch.device, switches: str = "shown"):
    """The first screens of a split, and what the frozen vision encoder makes of them [N, P, D]: once a process."""
    drawn = [draw_screen(domain, split, i, switches=switches) for i in range(count)]
    model = TinyVLM.from_pretrained(base_path(base)).to(device)
    return drawn, image_features(model.get_image_features, drawn, device)


def training_data(cfg, device: torch.device):
    """((the screens to train on, their features), the batches of the probe)."""
    count = min((PROBE_BATCHES + cfg.steps) * cfg.screens, TRAIN_SCREENS)
    drawn, features = seen(cfg.base, cfg.domain, "train", count, device, cfg.switches)
    fitting = [i for i, screen in enumerate(drawn) if not cfg.prior or any(map(fits_prior, screen.targets()))]
    data = [drawn[i] for i in fitting], features[fitting]
    return data, [batch_of(cfg, data, i)[0] for i in range(PROBE_BATCHES)]


def batch_of(cfg, data: tuple[list[Screen], Tensor], i: int):
    """(The arguments of the model, the boxes asked for) of batch number i; the probe takes the first ones."""
    drawn, features = data
    rng = np.random.default_rng([cfg.seed, i])
    picks = rng.choice(len(drawn), cfg.screens, replace=len(drawn) < cfg.screens)
    told = cfg.history + cfg.replay
    before = [
        [turn(word_problem("train", (i * cfg.screens + j) * told + k), learn=k >= cfg.history) for k in range(told)]
        for j in range(cfg.screens)  # the replayed ones last
    ]
    how = {"refer": float(cfg.task == "referring"), "distinct": True, "prior": cfg.prior}
    asked = [screens.ask(drawn[pick], cfg.questions, rng, **how) for pick in picks]
    batch = training_batch(asked, features.shape[1], before)
    batch = {name: tensor.to(features.device) for name, tensor in batch.items()}
    return batch | {"image_features": features[picks]}, [sample.get("bbox") for sample in chain(*asked)]


def measure(cfg, model) -> tuple[dict, list]:
    """(Metrics, answers [(screen, sample, answer)]): the task's accuracy and, with cfg.controls, what else the model
    can do: source screens, word problems, these after an image."""
    drawn, features = seen(cfg.base, cfg.domain, cfg.split, cfg.test_screens, model.device, cfg.switches)
    metrics, given = evaluate(model, drawn, features, cfg.task, cfg.history)
    if cfg.controls:
        source, _ = evaluate(model, *seen(cfg.base, "source", "test", cfg.test_screens // 2 + 1, model.device))
        metrics["source_acc"] = source["action_acc"]
        metrics["word_problem_acc"] = evaluate_word_problems(model, features[:, :0])
        metrics["word_problem_after_image_acc"] = evaluate_word_problems(model, features)
    return metrics, given


def rules(learn: list, given: list) -> dict:
    """Click accuracy of trivial answers: a constant, the base's height with the best column, the base's click moved by
    an offset for each kind of name, or for each name. Found on the base's answers `learn`, judged on its `given`."""
    return {
        "constant_acc": rule(learn, given, start=lambda point: (BIN / 2, BIN / 2)),
        "column_acc": rule(learn, given, start=lambda point: (BIN / 2, point[1])),
        "offset_acc": rule(learn, given, "data_type"),
        "name_offset_acc": rule(learn, given, "name"),
    }


def without_the_image(cfg, model) -> dict:
    """Click accuracy before blank pictures, and where there are switches before pictures without them, or with switch
    and name exchanged."""
    drawn, features = seen(cfg.base, cfg.domain, cfg.split, cfg.test_screens, model.device)
    blank = pixels(drawn[:1]).flatten(2).median(2).values[..., None, None].expand(1, 3, SIZE, SIZE)  # its background
    with torch.no_grad():
        blank = model.get_image_features(blank.to(model.device)).expand_as(features)
    found = {"blank_acc": evaluate(model, drawn, blank)[0]["action_acc"]}
    for switches in ("erased", "exchanged") if cfg.domain in PAIRED else ():
        pictures = seen(cfg.base, cfg.domain, cfg.split, cfg.test_screens, model.device, switches)
        found[f"{switches}_acc"] = evaluate(model, *pictures)[0]["action_acc"]
    return found


@torch.no_grad()
def attention_maps(model, batch: dict) -> Tensor:
    """Where every head looks from the last token of one sequence: its weights on visual tokens [L, H, P]."""
    with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attend:
        model(**batch)
    maps = []
    for (query, key, _), _ in attend.call_args_list:  # [1, heads, T, d], rotated
        scores = query[0, :, -1:] @ key[0].mT / query.shape[-1] ** 0.5
        maps.append(scores.softmax(-1)[:, 0])
    visual = batch["input_ids"][0] == model.config.image_token_id
    return torch.stack(maps)[..., visual]


def patches_of(box: screens.Box, count: int) -> Tensor:
    """Which of the patches of a screen [count] a box overlaps."""
    left, top, right, bottom = box
    size = SIZE // round(count**0.5)
    start = torch.arange(0, SIZE, size)
    columns = (start < right) & (left < start + size)
    rows = (start < bottom) & (top < start + size)
    return (rows[:, None] & columns).flatten()


def looks(cfg, model, count: int = 100) -> Tensor:
    """The share of its attention that each head gives to the right target, from the last token before the answer: the
    mean over so many questions [L, H]."""
    drawn, features = seen(cfg.base, cfg.domain, cfg.split, cfg.test_screens, model.device)
    shares = []
    for i, sample in exam(drawn)[:count]:
        maps = attention_maps(model, questions([sample], features[[i]]))
        shares.append(maps[..., patches_of(sample["bbox"], maps.shape[-1])].sum(-1))
    return torch.stack(shares).mean(0)


def turned_head(cfg, model, adapter, base: list, tuned: list) -> tuple:
    """The head that has turned to the right targets the most, as (layer, head); their share of its attention before and
    after; and to show it, (screen, sample, its weights [P] before and after, clicks before and after) of four answers.

    base, tuned: the answers of the model without and with the adapter."""
    drawn, features = seen(cfg.base, cfg.domain, "test", cfg.test_screens, model.device)
    after, shown = looks(cfg, model), []
    with adapter.disabled():
        before = looks(cfg, model)
    place = divmod(int((after - before).argmax()), after.shape[1])
    for i in four_of(tuned):
        screen, sample, click = tuned[i]
        asked = questions([sample], features[[drawn.index(screen)]])
        weights = attention_maps(model, asked)[place]
        with adapter.disabled():
            base_weights = attention_maps(model, asked)[place]
        shown.append((screen, sample, base_weights, weights, base[i][2], click))
    return place, before[place], after[place], shown


def few_answers(cfg, model) -> list:
    """The answer to one question about each of the first six screens."""
    drawn, features = seen(cfg.base, cfg.domain, cfg.split, cfg.test_screens, model.device, cfg.switches)
    given = evaluate(model, drawn[:6], features[:6], cfg.task, cfg.history)[1]
    by_screen = [[answer for answer in given if answer[0] is screen] for screen in drawn[:6]]
    return [answers[i % len(answers)] for i, answers in enumerate(by_screen)]  # words and icons


def four_of(given: list) -> list[int]:
    """Numbers of four answers of different screens to show: a word and two icons that are right, and what is wrong."""
    kinds = [(is_hit(point, sample["bbox"]), sample["data_type"]) for _, sample, point in given]
    shown, used = [], []
    for wanted in ((True, "text"), (True, "icon"), (True, "icon"), (False, "")):
        fits = [i for i, (hit, kind) in enumerate(kinds) if hit == wanted[0] and wanted[1] in ("", kind)]
        new = [i for i in fits if all(given[i][0] is not screen for screen in used)] or list(range(len(given)))
        shown.append(new[0])
        used.append(given[new[0]][0])
    return shown


def gate_scores(model, batches: list[dict]) -> Tensor:
    """The authors' release scores a head by the squared gradient of a gate g on its values [L, H]."""
    # dL/dg = sum V(h) * dL/dV(h) = sum W_V(h) * dL/dW_V(h)
    layers = model.language_model.layers
    weights = [layer.self_attn.v_proj.weight for layer in layers]  # of [H * d_h, D]
    scores = torch.zeros(len(layers), model.config.num_key_value_heads, device=model.device)
    for batch in batches:
        gradients = torch.autograd.grad(model(**batch).loss, weights)
        products = torch.stack([weight * gradient for weight, gradient in zip(weights, gradients)])
        scores += products.unflatten(1, (scores.shape[1], -1)).sum((2, 3)) ** 2 / len(batches)
    return scores.detach().cpu()
