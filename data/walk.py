"""A guided walk: fine-tunes as train.py does, then follows one question through every step, tensor by tensor.

python -m data.walk          with the options of train.py; writes OUT/look.png
"""

import inspect
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

import train
from data import command, figures
from data.evaluate import all_samples, generate_answers
from data.prompts import (
    find_device,
    load_base,
    prompt_batch,
    screens_and_features,
    training_batch,
    training_data,
)
from data.screens import SIZE, is_hit
from imagelora import Heads, ImageLoRA, ValueAdapter, attach, visual_rows


def station(title: str, text: str, ran=None) -> None:
    """A line of the walk; `ran` is the function of imagelora.py that has just run."""
    where = f"   [imagelora.py:{inspect.getsourcelines(ran)[1]}]" if ran else ""
    print(f"{title:13}{text}{where}")


def walk(cfg: train.Config) -> None:
    """Print, station by station, the tensors of the method, their shapes and the numbers that matter."""
    if (cfg.method, cfg.task, cfg.history) != ("image_lora", "grounding", 0):
        raise ValueError("the walk is one of image_lora and grounding, without word problems before the screens")
    out = Path(cfg.out or f"runs/{cfg.domain}")
    out.mkdir(parents=True, exist_ok=True)
    done = train.finetune(cfg)
    model, adapter = done.model, done.adapter
    _, sample, point = done.base_answers[0]
    screens, features = screens_and_features(cfg.base, cfg.domain, "test", cfg.test_screens, model.device)
    print()
    station("1 prompt", f"<bos>, {model.config.num_patches} x <image>, {sample['instruction']}")
    station("", f"a click in the box {sample['bbox']} is correct; the base model clicks {point}")
    show_start(cfg, adapter.heads)
    show_update(model, adapter, prompt_batch([sample], features[:1]))
    show_decoding(model, adapter, sample, features[:1])
    station("7 answer", f"{point} before, {done.answers[0][2]} after; a click in {sample['bbox']} is correct")
    show_looking(done, screens, features, out / "look.png")


def show_start(cfg: train.Config, heads: Heads) -> None:
    """The first backward pass, on a fresh base."""
    model = load_base(cfg.base, find_device(cfg.device))
    torch.manual_seed(cfg.seed)
    adapter = attach(model, cfg.r, 2 * cfg.r, heads)
    lowest = min(heads)
    values = adapter.layers[str(lowest)]
    station("2 attach", f"layer {lowest}: A {list(values.A.shape)}, B {list(values.B.shape)} = 0", attach)
    batch, _ = training_batch(cfg, training_data(cfg, model.device), 0)
    model(**batch).loss.backward()
    norms = ", ".join(f"{name} {p.grad.norm():.2g}" for name, p in values.named_parameters())
    station("", f"first step, norms of the gradients: {norms}; while B = 0, A and gamma have none")


def show_update(model, adapter: ImageLoRA, prompt: dict) -> None:
    """What the adapter adds to the values of a prompt in its lowest layer, and how far queries move above it."""
    lowest = min(adapter.heads)
    tuned = attended(model, prompt)
    with adapter.disabled():
        base = attended(model, prompt)
    values = base[lowest][2]  # X W_V [H, T, d_h]: the lowest adapted layer reads what it read before
    update = tuned[lowest][2] - values
    rows = update.abs().sum((0, 2)).nonzero().squeeze(1)
    station("3 M X", f"after training, rows adapted: {rows[0]} .. {rows[-1]}, the image's", ValueAdapter.add_update)
    station("4 update", f"layer {lowest}, norms over these rows by head:", ValueAdapter.forward)
    for name, tensor in (("X W_V(h)", values), ("update", update)):
        shown = "  ".join(f"{norm:6.2f}" for norm in tensor[:, rows].norm(dim=(1, 2)).tolist())
        station("", f"{name:9}{shown}")
    moved = []
    for layer, ((query, *_), (base_query, *_)) in enumerate(zip(tuned, base)):
        change = (query - base_query).norm() / base_query.norm()
        moved.append(f"{change:.0%} in layer {layer}")
    station("5 looking", f"queries moved by {', '.join(moved)}: the lowest adapted layer looks where it looked")


@torch.no_grad()
def attended(model, prompt: dict) -> list:
    """Queries, keys and values [H, T, d_h] of one sequence in every layer, as attention reads them: q and k rotated."""
    with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attend:
        model(**prompt)
    return [[tensor[0] for tensor in call.args] for call in attend.call_args_list]


def show_decoding(model, adapter: ImageLoRA, sample: dict, features) -> None:
    """How many rows are adapted in each forward pass of an answer."""
    rows = []
    values = next(iter(adapter.layers.values()))
    counts = [
        model.register_forward_pre_hook(lambda module, inputs: rows.append(0)),
        values.register_forward_pre_hook(lambda module, inputs: rows.append(rows.pop() + len(inputs[0]))),
    ]
    generate_answers(model, [sample], features)
    for count in counts:
        count.remove()
    station("6 decoding", f"rows adapted, by forward pass: {rows}", visual_rows)


def show_looking(done: train.Finetuned, screens: list, features, path: Path) -> None:
    """The head that has turned to the targets the most, and a picture of four answers of it."""
    model, disabled = done.model, done.adapter.disabled
    shares = attention_shares(model, screens, features)
    with disabled():
        base_shares = attention_shares(model, screens, features)
    layer, head = divmod(int((shares - base_shares).argmax()), shares.shape[1])
    wrong = [i for i, (_, sample, click) in enumerate(done.answers) if not is_hit(click, sample["bbox"])]
    icons = [i for i, (_, sample, _) in enumerate(done.answers) if sample["data_type"] == "icon"]
    examples = []
    for i in (0, icons[len(icons) // 3], icons[len(icons) // 2], (wrong or icons)[-1]):
        screen, sample, _ = done.answers[i]
        prompt = prompt_batch([sample], features[[screens.index(screen)]])
        weights = attention_maps(model, prompt)[layer, head]
        with disabled():
            base_weights = attention_maps(model, prompt)[layer, head]
        examples.append((done.base_answers[i], done.answers[i], base_weights, weights))
    figures.save([figures.attention_picture(examples, layer, head)], path)
    station("8 picture", f"{path}: how head {head} of layer {layer} has turned to the targets;")
    share, base_share = shares[layer, head], base_shares[layer, head]
    station("", f"they had {base_share:.0%} of its attention before, {share:.0%} after")


def attention_maps(model, prompt: dict) -> torch.Tensor:
    """Where every head looks from the last token of one sequence: its weights on visual tokens [L, H, P]."""
    maps = []
    for query, key, _ in attended(model, prompt):
        scores = query[:, -1:] @ key.mT / query.shape[-1] ** 0.5
        maps.append(scores.softmax(-1)[:, 0])
    visual = prompt["input_ids"][0] == model.config.image_token_id
    return torch.stack(maps)[..., visual]


def attention_shares(model, screens: list, features) -> torch.Tensor:
    """The share of its attention that each head gives to the patches of the target, from the last token before the
    answer: the mean over a hundred questions [L, H]."""
    side = round(model.config.num_patches**0.5)
    size = SIZE // side
    shares = []
    for i, sample in all_samples(screens)[:100]:
        left, top, right, bottom = sample["bbox"]
        maps = attention_maps(model, prompt_batch([sample], features[[i]])).unflatten(-1, (side, side))
        of_target = maps[..., top // size : (bottom - 1) // size + 1, left // size : (right - 1) // size + 1]
        shares.append(of_target.sum((-2, -1)))
    return torch.stack(shares).mean(0)


if __name__ == "__main__":
    sys.exit(command(train.Config, walk, __doc__))
