"""Pictures, drawn with Pillow: clicks on screens, and where a head looks; and a bar chart in text."""

import io
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data.screens import SIZE, is_hit
from data.tokenizer import parse_point
from imagelora import safe_write

BLUE, ORANGE = "#0072b2", "#d55e00"  # colour-blind readers can tell them apart (Okabe and Ito)
K = 2  # a screen is enlarged, so that figures are sharp on dense displays
SIDE = K * SIZE


def _text(draw, x: float, y: float, words: str, size: int) -> None:
    draw.text((x, y), words, "#222222", ImageFont.load_default(size), anchor="lm")


def _frame(draw, left: float, top: float, right: float, bottom: float) -> None:
    """A black and white box, to be seen on every screen."""
    for margin, fill in ((2, "black"), (1, "white")):
        draw.rectangle((left - margin, top - margin, right + margin - 1, bottom + margin - 1), None, fill, 2)


def _click(draw, x: float, y: float, tuned: bool) -> None:
    """A click with a white rim: the base model's is a cross, the tuned model's a ring."""
    for fill, width in (("white", 6), (BLUE if tuned else ORANGE, 3)):
        if tuned:
            r = 8 + width / 2
            draw.ellipse((x - r, y - r, x + r, y + r), None, fill, width)
        else:
            draw.line((x - 6, y - 6, x + 6, y + 6), fill, width)
            draw.line((x - 6, y + 6, x + 6, y - 6), fill, width)


def _legend(draw) -> None:
    _frame(draw, 16, 12, 32, 28)
    _click(draw, 120, 20, tuned=False)
    _click(draw, 300, 20, tuned=True)
    for x, words in ((44, "target"), (136, "base model's click"), (318, "after fine-tuning")):
        _text(draw, x, 20, words, 16)


def _screen(image, x: int, y: int, screen, bbox=None, *clicks) -> None:
    """Puts a screen at x, y, with the target's box and the clicks before and after; None is no click."""
    image.paste(Image.fromarray(screen.image).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
    draw = ImageDraw.Draw(image)
    if bbox:
        _frame(draw, *(corner + K * edge for corner, edge in zip((x, y, x, y), bbox)))
    for point, tuned in zip(clicks, (False, True)):
        if bbox and point:
            _click(draw, x + K * point[0], y + K * point[1], tuned)


def predictions(base: list, tuned: list) -> Image.Image:
    """Three rows of four screens with the clicks, or names, of (screen, sample, answer) before and after."""
    image = Image.new("RGB", (4 * (SIDE + 12) + 12, 3 * (SIDE + 40) + 40), "white")
    draw = ImageDraw.Draw(image)
    step = max(len(base) // 12, 1)
    for i, ((screen, sample, before), (_, _, after)) in enumerate(list(zip(base, tuned))[::step][:12]):
        x, y = 12 + i % 4 * (SIDE + 12), 40 + i // 4 * (SIDE + 40)
        _screen(image, x, y, screen, sample.get("bbox"), before, after)
        if "bbox" in sample:
            verdict = "right" if is_hit(after, sample["bbox"]) else "wrong"
        else:
            verdict = after if after == sample["answer"] else f"{after} (wrong)"
        _text(draw, x, y + SIDE + 14, f"{sample['instruction']}: {verdict}", 16)
    if "bbox" in base[0][1]:  # where names are asked for there are no clicks
        _legend(draw)
    return image


@torch.no_grad()
def attention_maps(model, batch: dict) -> torch.Tensor:
    """Where every head looks from the last token of one sequence: its weights on visual tokens [L, H, P]."""
    seen, attend = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):  # [1, heads, T, d], rotated
        seen.append((q[0, :, -1:] @ k[0].mT / q.shape[-1] ** 0.5).softmax(-1))
        return attend(q, k, v, **options)

    with patch.object(F, "scaled_dot_product_attention", spy):
        model(**batch)
    return torch.stack(seen)[:, :, 0, batch["input_ids"][0] == model.config.image_token_id]


def where_it_looks(model, adapter, questions: list[dict]) -> tuple[tuple[int, int], list]:
    """(layer, head) of the most focused adapted head, and its maps [P] for each question, without and with adapter."""
    with adapter.disabled():
        before = [attention_maps(model, question) for question in questions]
    after = [attention_maps(model, question) for question in questions]
    places = [(layer, head) for layer, heads in adapter.heads.items() for head in heads]
    place = max(places, key=lambda place: sum(maps[place].max() for maps in before))
    return place, [(old[place], new[place]) for old, new in zip(before, after)]


def look(screens: list, samples: list, weights: list, base: list, tuned: list) -> Image.Image:
    """A row for each screen: where a head looks, by its weights [P], and the answers, each before and after."""
    image = Image.new("RGB", (4 * (SIDE + 24) + 24, len(screens) * (SIDE + 44) + 88), "white")
    draw = ImageDraw.Draw(image)
    _legend(draw)
    places = range(24, image.width, SIDE + 24)
    titles = ("the screen", "a head looks at the name", "after fine-tuning, too", "the click moves")
    for x, title in zip(places, titles):
        _text(draw, x, 60, title, 18)
    for i, (screen, sample, looks, before, after) in enumerate(zip(screens, samples, weights, base, tuned)):
        y = 80 + i * (SIDE + 44)
        for x in places[:3]:
            _screen(image, x, y, screen)
        for x, seen in zip(places[1:], looks):
            patches = round(len(seen) ** 0.5)
            shade = (230 - 230 * (seen / seen.max()).sqrt()).byte().reshape(patches, patches).numpy()
            image.paste("#101828", (x, y), Image.fromarray(shade).resize((SIDE, SIDE), Image.Resampling.NEAREST))
        _screen(image, places[3], y, screen, sample["bbox"], parse_point(before), parse_point(after))
        _text(draw, places[0], y + SIDE + 16, sample["instruction"], 18)
    return image


def save(picture: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    safe_write(buffer.getbuffer(), path)


def bars(scores: torch.Tensor, heads: dict) -> str:
    """A bar for each head, layer by layer, scaled to the largest score; selected heads are bracketed."""
    heights = (scores / scores.max().clamp(min=1e-30) * 8).ceil().int().tolist()
    layers = []
    for layer, row in enumerate(heights):
        marks = ["▁▁▂▃▄▅▆▇█"[height] for height in row]
        layers.append("".join(f"[{m}]" if head in heads.get(layer, []) else m for head, m in enumerate(marks)))
    return " · ".join(layers)
