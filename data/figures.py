"""Pictures, drawn with Pillow: clicks on screens, and where a head looks; and a bar chart in text."""

from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import replacing
from data.screens import SIZE, is_hit
from data.tokenizer import parse_point

BLUE, ORANGE, INK = "#0072b2", "#d55e00", "#222222"  # colour-blind readers can tell them apart (Okabe and Ito)
K = 2  # pixels a unit of length, so that figures are sharp on dense displays


def _canvas(width: int, height: int):
    """An empty figure, what draws on it in pixels, and a function that writes on it in units of length."""
    image = Image.new("RGB", (width * K, height * K), "white")
    draw = ImageDraw.Draw(image)

    def text(x, y, words, size=16, anchor="lm", fill=INK):
        draw.text((x * K, y * K), words, fill, ImageFont.load_default(size * K), anchor=anchor)

    return image, draw, text


def _frame(draw, left: float, top: float, right: float, bottom: float) -> None:
    """A black and white box, to be seen on every screen."""
    for margin, fill in ((1, "black"), (0.5, "white")):
        box = (left - margin, top - margin, right + margin - 0.5, bottom + margin - 0.5)
        draw.rectangle([v * K for v in box], None, fill, K)


def _click(draw, x: float, y: float, tuned: bool) -> None:
    """A click with a white rim: the base model's is a cross, the tuned model's a ring."""
    for fill, width in (("white", 3), (BLUE if tuned else ORANGE, 1.5)):
        if tuned:
            r = 4 + width / 2
            draw.ellipse([v * K for v in (x - r, y - r, x + r, y + r)], None, fill, int(width * K))
        else:
            for slope in (3, -3):
                draw.line([v * K for v in (x - 3, y - slope, x + 3, y + slope)], fill, int(width * K))


def _legend(draw, text) -> None:
    _frame(draw, 8, 6, 16, 14)
    text(22, 10, "target", 8)
    _click(draw, 60, 10, tuned=False)
    text(68, 10, "base model's click", 8)
    _click(draw, 150, 10, tuned=True)
    text(159, 10, "after fine-tuning", 8)


def _picture(screen) -> Image.Image:
    return Image.fromarray(screen.image).resize((SIZE * K, SIZE * K), Image.Resampling.LANCZOS)


def _target(draw, x: float, y: float, bbox: tuple, before: tuple | None, after: tuple | None) -> None:
    """On the screen whose corner is at x, y: the target's box and the clicks, None where an answer is no point."""
    left, top, right, bottom = bbox
    _frame(draw, x + left, y + top, x + right, y + bottom)
    for point, tuned in ((before, False), (after, True)):
        if point is not None:
            _click(draw, x + point[0], y + point[1], tuned)


def predictions(base: list, tuned: list, columns: int = 4, rows: int = 3) -> Image.Image:
    """A grid of screens with the clicks, or names, of (screen, sample, answer) before and after."""
    side, gap, caption = SIZE, 6, 14
    image, draw, text = _canvas(columns * (side + gap) + gap, rows * (side + gap + caption) + 20)
    step = max(len(base) // (columns * rows), 1)
    for i, ((screen, sample, before), (_, _, after)) in enumerate(list(zip(base, tuned))[::step][: columns * rows]):
        x, y = gap + i % columns * (side + gap), 20 + i // columns * (side + gap + caption)
        image.paste(_picture(screen), (x * K, y * K))
        if "bbox" in sample:
            _target(draw, x, y, sample["bbox"], before, after)
            verdict = "right" if is_hit(after, sample["bbox"]) else "wrong"
        else:
            verdict = after if after == sample["answer"] else f"{after} (wrong)"
        text(x, y + side + 7, f"{sample['instruction']}: {verdict}", 8)
    if "bbox" in base[0][1]:  # where names are asked for there are no clicks
        _legend(draw, text)
    return image


@torch.no_grad()
def attention_map(model, batch: dict, layer: int, head: int) -> torch.Tensor:
    """Where a head looks from the last token of one sequence: its attention weights on the visual tokens [P]."""
    seen, attend = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):  # [1, heads, T, d], rotated
        seen.append((q[0], k[0]))
        return attend(q, k, v, **options)

    with patch.object(F, "scaled_dot_product_attention", spy):
        model(**batch)
    q, k = seen[layer]
    weights = (q[head, -1] @ k[head].T / q.shape[-1] ** 0.5).softmax(-1)  # [T]
    return weights[batch["input_ids"][0] == model.config.image_token_id]


def where_it_looks(model, adapter, questions: list[dict]) -> tuple[tuple[int, int], list]:
    """(layer, head) of the most focused adapted head, and its maps [P] for each question, without and with adapter."""

    def maps(place: tuple[int, int]) -> list[torch.Tensor]:
        return [attention_map(model, question, *place) for question in questions]

    with adapter.disabled():
        places = [(layer, head) for layer, heads in adapter.heads.items() for head in heads]
        place = max(places, key=lambda place: sum(weights.max() for weights in maps(place)))
        before = maps(place)
    return place, list(zip(before, maps(place)))


def look(screens: list, samples: list, weights: list, base: list, tuned: list) -> Image.Image:
    """A row for each screen: where a head looks, by its weights [P], and the answers, each before and after."""
    side, gap = SIZE, 12
    image, draw, text = _canvas(4 * (side + gap) + gap, len(screens) * (side + 22) + 44)
    _legend(draw, text)
    places = [gap + column * (side + gap) for column in range(4)]
    titles = ("the screen", "a head looks at the name", "after fine-tuning, too", "the click moves")
    for x, title in zip(places, titles):
        text(x, 30, title, 9)
    for i, (screen, sample, looks, before, after) in enumerate(zip(screens, samples, weights, base, tuned)):
        y = 40 + i * (side + 22)
        for x in places:
            image.paste(_picture(screen), (x * K, y * K))
        for x, seen in zip(places[1:], looks):
            patches = round(len(seen) ** 0.5)
            shade = (230 - 230 * (seen / seen.max()).sqrt()).byte().reshape(patches, patches).numpy()
            shade = Image.fromarray(shade).resize((side * K, side * K), Image.Resampling.NEAREST)
            image.paste("#101828", (x * K, y * K), shade)
        _target(draw, places[3], y, sample["bbox"], parse_point(before), parse_point(after))
        text(places[0], y + side + 8, sample["instruction"], 9)
    return image


def save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def bars(scores: torch.Tensor, heads: dict) -> str:
    """A bar for each head, layer by layer, scaled to the largest score; selected heads are bracketed."""
    heights = (scores / scores.max().clamp(min=1e-30) * 8).ceil().int().tolist()
    layers = []
    for layer, row in enumerate(heights):
        marks = ["▁▁▂▃▄▅▆▇█"[height] for height in row]
        layers.append("".join(f"[{m}]" if head in heads.get(layer, []) else m for head, m in enumerate(marks)))
    return " · ".join(layers)
