"""README's pictures, drawn with Pillow: predictions on screens, accuracy against cost, the influence of heads."""

import math

from PIL import Image, ImageDraw, ImageFont

from data.screens import SIZE, is_hit

# Okabe and Ito's colours, which colour-blind readers can tell apart; marks differ in shape too.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999")
BLUE, ORANGE, INK, GRID = COLOURS[0], COLOURS[3], "#222222", "#dddddd"
K = 2  # pixels a unit of length, so that figures are sharp on dense displays


def _canvas(width: int, height: int):
    """An empty figure, and functions that draw on it in units of length."""
    image = Image.new("RGB", (width * K, height * K), "white")
    draw = ImageDraw.Draw(image)

    def text(x, y, words, size=16, anchor="lm", fill=INK):
        draw.text((x * K, y * K), words, fill, ImageFont.load_default(size * K), anchor=anchor)

    def line(x0, y0, x1, y1, fill=INK, width=1):
        draw.line([v * K for v in (x0, y0, x1, y1)], fill, round(width * K))

    return image, draw, text, line


def _mark(draw, x: float, y: float, i: int, size: float = 9) -> None:
    """Mark number i: its own colour, and a circle, square or diamond with a white rim."""
    x, y, size = x * K, y * K, size * K
    box, fill = (x - size, y - size, x + size, y + size), COLOURS[i]
    if i % 3 == 0:
        draw.ellipse(box, fill, "white", K)
    elif i % 3 == 1:
        draw.rectangle(box, fill, "white", K)
    else:
        d = 1.2 * size
        draw.polygon([(x, y - d), (x + d, y), (x, y + d), (x - d, y)], fill, "white")


def predictions(base: list, tuned: list, columns: int = 4, rows: int = 3) -> Image.Image:
    """A grid of screens: the target box, the base model's click and the tuned model's, of (screen, sample, point)."""
    side, gap, caption = SIZE, 6, 14
    image, draw, text, line = _canvas(columns * (side + gap) + gap, rows * (side + gap + caption) + 20)

    def click(x, y, colour, cross):
        for fill, width in (("white", 3), (colour, 1.5)):  # a white rim, to be seen on every screen
            if cross:
                line(x - 3, y - 3, x + 3, y + 3, fill, width)
                line(x - 3, y + 3, x + 3, y - 3, fill, width)
            else:
                r = 4 + width / 2
                draw.ellipse([v * K for v in (x - r, y - r, x + r, y + r)], None, fill, int(width * K))

    def frame(left, top, right, bottom):
        for margin, fill in ((1, "black"), (0.5, "white")):
            box = (left - margin, top - margin, right + margin - 0.5, bottom + margin - 0.5)
            draw.rectangle([v * K for v in box], None, fill, K)

    step = max(len(base) // (columns * rows), 1)
    for i, ((screen, sample, before), (_, _, after)) in enumerate(list(zip(base, tuned))[::step][: columns * rows]):
        x, y = gap + i % columns * (side + gap), 20 + i // columns * (side + gap + caption)
        picture = Image.fromarray(screen.image).resize((side * K, side * K), Image.Resampling.LANCZOS)
        image.paste(picture, (x * K, y * K))
        left, top, right, bottom = sample["bbox"]
        frame(x + left, y + top, x + right, y + bottom)
        for point, colour in ((before, ORANGE), (after, BLUE)):
            if point is not None:
                click(x + point[0], y + point[1], colour, cross=colour == ORANGE)
        verdict = "right" if is_hit(after, sample["bbox"]) else "wrong"
        text(x, y + side + 7, f"{sample['instruction']}: {verdict}", 8)
    frame(8, 6, 16, 14)
    text(22, 10, "target", 8)
    click(60, 10, ORANGE, cross=True)
    text(68, 10, "base model's click", 8)
    click(150, 10, BLUE, cross=False)
    text(159, 10, "after fine-tuning", 8)
    return image


def accuracy_against_cost(panels: dict[str, dict[str, tuple[float, float, float]]]) -> Image.Image:
    """{domain: {method: (adapter MFLOP a step, mean click accuracy in %, its standard deviation)}}; a log cost axis."""
    methods = list(dict.fromkeys(method for results in panels.values() for method in results))
    width, height, left = 860, 560, 60
    image, draw, text, line = _canvas(width, height + 20 + 32 * math.ceil(len(methods) / 2))
    costs = [math.log10(cost) for results in panels.values() for cost, _, _ in results.values()]
    low, high = min(costs) - 0.15, max(costs) + 0.15
    panel_width = (width - 10) // len(panels)

    def panel(p: int, title: str, results: dict) -> None:
        x0, x1, y0, y1 = p * panel_width + left, (p + 1) * panel_width - 5, height - 60, 60
        means = [mean for _, mean, _ in results.values()]
        bottom, top = math.floor(min(means) / 5) * 5, math.ceil(max(means) / 5) * 5

        def at(cost, accuracy):
            x = x0 + (x1 - x0) * (math.log10(cost) - low) / (high - low)
            return x, y0 + (y1 - y0) * (accuracy - bottom) / (top - bottom)

        text((x0 + x1) / 2, 30, f"{title} screens: click accuracy", 19, "mm")
        for tick in range(bottom, top + 1, 1 if top - bottom <= 10 else 5):
            y = at(10, tick)[1]
            line(x0, y, x1, y, GRID)
            text(x0 - 8, y, f"{tick} %", 15, "rm")
        for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500):
            x = at(tick, bottom)[0]
            if x0 <= x <= x1:
                line(x, y0, x, y0 + 6)
                text(x, y0 + 18, str(tick), 15, "mm")
        line(x0, y0, x1, y0, INK, 2)
        text((x0 + x1) / 2, y0 + 42, "adapter MFLOP a training step (log axis)", 15, "mm")
        for method, (cost, mean, deviation) in reversed(results.items()):  # the first ones end on top
            i = methods.index(method)
            (x, above), (_, below) = at(cost, mean + deviation), at(cost, mean - deviation)
            line(x, above, x, below, COLOURS[i], 3)
            _mark(draw, *at(cost, mean), i)

    for p, (title, results) in enumerate(panels.items()):
        panel(p, title, results)
    for i, method in enumerate(methods):
        x, y = left + i % 2 * 400, height + 15 + i // 2 * 32
        _mark(draw, x, y, i)
        text(x + 20, y, method)
    return image


def influence_map(scores: list[list[float]], heads: dict[int, list[int]]) -> Image.Image:
    """Layers x heads, darker where more influential (the largest is 1), the selected heads outlined."""
    cell, left = 76, 110
    image, draw, text, _ = _canvas(left + len(scores[0]) * cell + 40, len(scores) * cell + 100)
    largest = max(map(max, scores))
    for layer, row in enumerate(scores):
        y = 12 + layer * cell
        text(16, y + cell / 2, f"layer {layer}", 18)
        for head, score in enumerate(row):
            x, share = left + head * cell, score / largest
            shade = tuple(round(a + (b - a) * share**0.5) for a, b in zip((247, 251, 255), (8, 48, 107)))
            draw.rectangle([v * K for v in (x + 4, y + 4, x + cell - 4, y + cell - 4)], shade, "#bbbbbb")
            if head in heads.get(layer, []):
                draw.rectangle([v * K for v in (x + 2, y + 2, x + cell - 2, y + cell - 2)], None, ORANGE, 4 * K)
            text(x + cell / 2, y + cell / 2, f"{share:.2f}", 17, "mm", "white" if share > 0.25 else INK)
    for head in range(len(scores[0])):
        text(left + (head + 0.5) * cell, 12 + len(scores) * cell + 16, f"head {head}", 16, "mm")
    caption = "influence of value heads on settings screens, largest = 1; outlined: selected"
    text(16, 12 + len(scores) * cell + 58, caption, 15)
    return image
