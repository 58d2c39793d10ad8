"""A guided walk: follows one question through every step of Image-LoRA, tensor by tensor.

python -m data.walk          with the options of train.py; writes OUT/look.png

It walks with the adapter that `python train.py` has saved. If there is none of the same configuration, it trains one.
"""

import inspect
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

import train
from data import command, figures, prompts
from data.baselines import choose_heads
from data.evaluate import Answer, all_samples, evaluate, generate_answers
from data.prompts import find_device, load_base, prompt_batch, screens_and_features, training_batch, training_data
from data.screens import SIZE, Box, Screen, is_hit
from imagelora import Heads, ImageLoRA, ValueAdapter, attach, load, visual_rows
from tiny_vlm import TinyVLM, rotate

IRRELEVANT = ("out", "film", "test_screens", "device")  # options that do not change what is trained
NUM_QUESTIONS = 100  # that attention is averaged over


def station(title: str, text: str, code=None) -> None:
    """Prints a line of the walk; `code` is the function of imagelora.py that has just run."""
    where = f"   [imagelora.py:{inspect.getsourcelines(code)[1]}]" if code else ""
    print(f"{title:13}{text}{where}")


def walk(cfg: train.Config) -> None:
    """Print, station by station, the tensors of the method, their shapes and the numbers that matter."""
    if (cfg.method, cfg.task, cfg.history) != ("image_lora", "grounding", 0):
        raise ValueError("the walk needs method image_lora, task grounding and history 0")
    out = cfg.directory()
    out.mkdir(parents=True, exist_ok=True)
    model = load_base(cfg.base, find_device(cfg.device))
    adapter = saved_adapter(cfg, model) or trained_adapter(cfg, model)
    screens, features = screens_and_features(cfg.base, cfg.domain, "test", cfg.test_screens, model.device)
    _, answers = evaluate(model, screens, features)
    with adapter.disabled():
        _, base_answers = evaluate(model, screens, features)

    _, sample, base_click = base_answers[0]
    station("1 prompt", f"<bos>, {model.config.num_patches} x <image>, {sample['instruction']}")
    station("", f"a click in the box {sample['bbox']} is correct; the base model clicks {base_click}")
    show_start(cfg, adapter.heads)
    show_update(model, adapter, prompt_batch([sample], features[:1]))
    show_decoding(model, adapter, sample, features[:1])
    station("7 answer", f"{base_click} before, {answers[0].output} after; a click in {sample['bbox']} is correct")
    show_attention(model, adapter, base_answers, answers, features, out / "look.png")


def saved_adapter(cfg: train.Config, model: TinyVLM) -> ImageLoRA | None:
    """The adapter that train.py has saved for this configuration, attached to the model; None if there is none."""
    adapter_path = cfg.directory() / "adapter.pt"
    metrics_path = cfg.directory() / "metrics.json"
    if not (adapter_path.exists() and metrics_path.exists()):
        return None
    result = json.loads(metrics_path.read_text())
    for name, value in asdict(cfg).items():
        if name not in IRRELEVANT and result.get(name) != value:
            print(f"{metrics_path} has {name} = {result.get(name)}, not {value}: training anew")
            return None
    print(f"walking with {adapter_path}\n")
    return load(model, adapter_path)


def trained_adapter(cfg: train.Config, model: TinyVLM) -> ImageLoRA:
    """An adapter that is selected, attached to the model and trained as in train.py."""
    data = training_data(cfg, model.device)
    batches = [training_batch(cfg, data, i).inputs for i in range(prompts.PROBE_BATCHES)]
    scores = train.score_value_heads(cfg, model, batches)
    heads = choose_heads(cfg.heads, scores, cfg.num_heads, cfg.tau, cfg.seed)
    adapter = train.attach_adapter(cfg, model, heads)
    for _ in train.with_bar(train.train(cfg, model, adapter, data), cfg.steps, quiet=False):
        pass
    print()
    return adapter


def show_start(cfg: train.Config, heads: Heads) -> None:
    """The first backward pass, on a fresh base."""
    model = load_base(cfg.base, find_device(cfg.device))
    torch.manual_seed(cfg.seed)
    adapter = attach(model, cfg.r, 2 * cfg.r, heads)
    lowest = min(heads)
    values = adapter.layers[str(lowest)]
    station("2 attach", f"layer {lowest}: A {list(values.A.shape)}, B {list(values.B.shape)} = 0", attach)
    data = training_data(replace(cfg, steps=1), model.device)  # few screens are enough for one batch
    model(**training_batch(cfg, data, 0).inputs).loss.backward()
    norms = ", ".join(f"{name} {parameter.grad.norm():.2g}" for name, parameter in values.named_parameters())
    station("", f"first step, norms of the gradients: {norms}; while B = 0, those of A and gamma are zero")


def show_update(model: TinyVLM, adapter: ImageLoRA, prompt: dict) -> None:
    """What the adapter adds to the values of a prompt in its lowest layer, and how far queries move above it."""
    lowest = min(adapter.heads)
    tuned = queries_keys_values(model, prompt)
    with adapter.disabled():
        base = queries_keys_values(model, prompt)
    _, _, base_values = base[lowest]  # X W_V [H, T, d_h]; X is the base's, because no layer below is adapted
    _, _, tuned_values = tuned[lowest]
    update = tuned_values - base_values
    rows = update.abs().sum((0, 2)).nonzero().squeeze(1)
    station("3 M X", f"after training, rows adapted: {rows[0]} .. {rows[-1]}, the image's", ValueAdapter.add_update)

    base_norms = base_values[:, rows].norm(dim=(1, 2)).tolist()
    update_norms = update[:, rows].norm(dim=(1, 2)).tolist()
    station("4 update", f"layer {lowest}, norms over these rows by head:", ValueAdapter.forward)
    station("", "X W_V(h) " + "  ".join(f"{norm:6.2f}" for norm in base_norms))
    station("", "update   " + "  ".join(f"{norm:6.2f}" for norm in update_norms))
    larger = [str(head) for head, norm in enumerate(update_norms) if norm > base_norms[head]]
    if larger:
        heads = f"head {larger[0]}" if len(larger) == 1 else f"heads {', '.join(larger)}"
        station("", f"in {heads} the update is larger than the value that it is added to")

    moves = []
    for layer, ((query, _, _), (base_query, _, _)) in enumerate(zip(tuned, base)):
        move = (query - base_query).norm() / base_query.norm()
        moves.append(f"{move:.0%} in layer {layer}")
    station("5 looking", f"queries moved by {', '.join(moves)}:")
    station("", "the lowest adapted layer looks where it looked before")


@torch.no_grad()
def queries_keys_values(model: TinyVLM, prompt: dict) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries [H_q, T, d_h], keys and values [H, T, d_h] of one sequence in every layer, queries and keys rotated."""
    layers = []

    def keep(attention, arguments, output):
        x, angles, *_ = arguments
        _, (keys, values) = output
        queries = attention.q_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        layers.append((rotate(queries, angles)[0], keys[0], values[0]))

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in model.language_model.layers]
    model(**prompt)
    for hook in hooks:
        hook.remove()
    return layers


def show_decoding(model: TinyVLM, adapter: ImageLoRA, sample: dict, features: Tensor) -> None:
    """How many rows are adapted in each forward pass of an answer."""
    counts = []

    def begin_pass(module, inputs):
        counts.append(0)

    def count_rows(values, inputs):
        (x_vis,) = inputs  # [N, D]
        counts[-1] += len(x_vis)

    lowest = adapter.layers[str(min(adapter.heads))]
    hooks = [model.register_forward_pre_hook(begin_pass), lowest.register_forward_pre_hook(count_rows)]
    generate_answers(model, [sample], features)
    for hook in hooks:
        hook.remove()
    station("6 decoding", f"rows adapted, by forward pass: {counts}", visual_rows)


# ---- Where a head looks ----------------------------------------------------------------------------------------------


def show_attention(
    model: TinyVLM, adapter: ImageLoRA, base_answers: list[Answer], answers: list[Answer], features: Tensor, path: Path
) -> None:
    """Find the head that has turned to the targets the most, and draw where it looks for four of the answers."""
    screens = list(dict.fromkeys(answer.screen for answer in answers))  # in the order of features
    shares = attention_shares(model, screens, features)
    with adapter.disabled():
        base_shares = attention_shares(model, screens, features)
    layer, head = divmod(int((shares - base_shares).argmax()), shares.shape[1])

    examples = []
    for i in chosen_answers(answers):
        screen, sample, _ = answers[i]
        prompt = prompt_batch([sample], features[[screens.index(screen)]])
        weights = attention_maps(model, prompt)[layer, head]
        with adapter.disabled():
            base_weights = attention_maps(model, prompt)[layer, head]
        notes = [most_watched(screen, each)[0] for each in (base_weights, weights)]
        examples.append(figures.Example(base_answers[i], answers[i], base_weights, weights, *notes))

    growth = f"from {base_shares[layer, head]:.0%} to {shares[layer, head]:.0%}"
    text = [
        f"Of all {shares.numel()} heads this one was chosen because its attention to the targets grew most on these "
        f"questions, {growth}.",
        *rows_that_look_elsewhere(examples),
    ]
    picture = figures.attention_picture(examples, f"head {head} of layer {layer}", text)
    figures.save([picture], path)
    station("8 picture", f"{path}: where head {head} of layer {layer} looks, which has turned to the targets the most;")
    station("", f"their share of its attention went {growth}, the mean over {NUM_QUESTIONS} questions")


def chosen_answers(answers: list[Answer]) -> list[int]:
    """The first answer, two about icons, and the last that is wrong (or, if none is, the last about an icon)."""
    wrong = [i for i, (_, sample, click) in enumerate(answers) if not is_hit(click, sample["bbox"])]
    icons = [i for i, (_, sample, _) in enumerate(answers) if sample["data_type"] == "icon"]
    return [0, icons[len(icons) // 3], icons[len(icons) // 2], (wrong or icons)[-1]]


def attention_maps(model: TinyVLM, prompt: dict) -> Tensor:
    """Where every head looks from the last token of one sequence: its weights on visual tokens [L, H_q, P]."""
    maps = []
    for queries, keys, _ in queries_keys_values(model, prompt):
        keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)  # [H_q, T, d_h]
        scores = queries[:, -1:] @ keys.mT / queries.shape[-1] ** 0.5  # [H_q, 1, T]
        maps.append(scores.softmax(-1)[:, 0])
    is_visual = prompt["input_ids"][0] == model.config.image_token_id  # [T]
    return torch.stack(maps)[..., is_visual]


def attention_shares(model: TinyVLM, screens: list[Screen], features: Tensor) -> Tensor:
    """The share of its attention that each head gives to the target: the mean over the first questions [L, H_q]."""
    shares = []
    for i, sample in all_samples(screens)[:NUM_QUESTIONS]:
        maps = attention_maps(model, prompt_batch([sample], features[[i]]))
        shares.append(share_on(sample["bbox"], maps))
    return torch.stack(shares).mean(0)


def patches_of(box: Box, grid: Tensor) -> Tensor:
    """The part of a grid [..., side, side] of patches that this box touches, [..., rows, columns]."""
    size = SIZE // grid.shape[-1]  # pixels
    left, top, right, bottom = box
    return grid[..., top // size : (bottom - 1) // size + 1, left // size : (right - 1) // size + 1]


def share_on(box: Box, weights: Tensor) -> Tensor:
    """How much of attention weights [..., P] is on the patches that this box touches, [...]."""
    side = round(weights.shape[-1] ** 0.5)  # patches in a row
    return patches_of(box, weights.unflatten(-1, (side, side))).sum((-2, -1))


def most_watched(screen: Screen, weights: Tensor) -> tuple[str, Box]:
    """A note on what gets the most of these weights [P], a name or the switch of a name; and its box."""
    shares = {}
    for element in screen.targets():
        shares[element.full_name(), element.bbox] = share_on(element.bbox, weights).item()
        if element.click != element.bbox:
            shares[f"{element.full_name()} switch", element.click] = share_on(element.click, weights).item()
    name, box = max(shares, key=shares.get)
    return f"{shares[name, box]:.0%} on {name}", box


def rows_that_look_elsewhere(examples: list[figures.Example]) -> list[str]:
    """A sentence for each row in which the tuned model looks most at something other than the target."""
    sentences = []
    for row, example in enumerate(examples, 1):
        screen, sample, click = example.answer
        _, box = most_watched(screen, example.weights)
        if box == sample["bbox"]:
            continue
        other = "another switch" if box in [element.click for element in screen.targets()] else "a name"
        which = "the last row" if row == len(examples) else f"row {row}"
        verdict = "correct" if is_hit(click, sample["bbox"]) else "wrong"
        sentences.append(f"In {which} it looks most at {other}; the click is {verdict}.")
    return sentences


if __name__ == "__main__":
    sys.exit(command(train.Config, walk, __doc__))
