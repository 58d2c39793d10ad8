"""The picture of a run's clicks, drawn with Pillow; and a bar chart of the probe in text."""

import torch
from PIL import Image, ImageDraw, ImageFont

from data.screens import SIZE, is_hit

BLUE, ORANGE, INK = "#0072b2", "#d55e00", "#222222"  # Okabe and Ito's
ZOOM = 4  # pixels of a panel for each of a screen
SIDE = ZOOM * SIZE
GAP = 24
CAPTION = 40  # height of the text below a panel
FONT = ImageFont.load_default(24)


def predictions(base_answers: list, answers: list) -> Image.Image:
    """Twelve of the answers (screen, sample, click) before and after: as large a share of them is wrong as of all, but
    at least one. A frame is the target, a cross the base's click, a ring the tuned model's."""
    hits = [is_hit(click, sample["bbox"]) for _, sample, click in answers]
    order = sorted(range(len(hits)), key=lambda i: hits[i])  # wrong ones first
    chosen = [order[0]] + [order[(2 * twelfth + 1) * len(hits) // 24] for twelfth in range(1, 12)]
    page = Image.new("RGB", (4 * (SIDE + GAP) + GAP, 3 * (SIDE + CAPTION + GAP) + GAP), "white")
    draw = ImageDraw.Draw(page)
    for panel, i in enumerate(chosen):
        row, column = divmod(panel, 4)
        x, y = GAP + column * (SIDE + GAP), GAP + row * (SIDE + CAPTION + GAP)
        screen, sample, click = answers[i]
        _, _, base_click = base_answers[i]
        page.paste(Image.fromarray(screen.image).resize((SIDE, SIDE)), (x, y))
        left, top, right, bottom = (ZOOM * edge for edge in sample["bbox"])
        draw.rectangle((x + left, y + top, x + right, y + bottom), outline="black", width=3)
        if base_click:
            a, b = x + ZOOM * base_click[0], y + ZOOM * base_click[1]
            draw.line((a - 9, b - 9, a + 9, b + 9), ORANGE, 5)
            draw.line((a - 9, b + 9, a + 9, b - 9), ORANGE, 5)
        if click:
            draw.circle((x + ZOOM * click[0], y + ZOOM * click[1]), 11, outline=BLUE, width=5)
        verdict = "correct" if hits[i] else "WRONG"
        draw.text((x, y + SIDE + 4), f"{sample['instruction']}: {verdict}", INK, FONT)
    return page


def bars(scores: torch.Tensor, heads: dict) -> str:
    """A bar for each head, layer by layer, scaled to the largest score; selected heads are bracketed."""
    heights = 8 * scores / scores.max().clamp(min=1e-30)
    layers = []
    for layer, row in enumerate(heights.ceil().int().tolist()):
        marks = ["▁▁▂▃▄▅▆▇█"[height] for height in row]
        for head in heads.get(layer, []):
            marks[head] = f"[{marks[head]}]"
        layers.append("".join(marks))
    return " · ".join(layers)
