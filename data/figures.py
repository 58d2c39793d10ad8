"""Every picture, drawn with Pillow: plain data in, images out; and a bar chart in text.

Places are in quarters of a pixel of a page that shows a picture 830 wide; halved at the end, it is smooth and sharp."""

import io
import math
from itertools import accumulate, product
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data.screens import SIZE, is_hit
from imagelora import safe_write

BLUE, ORANGE, GREEN, INK, GREY, PALE = "#0072b2 #d55e00 #009e73 #222222 #667085 #e4e7ec".split()  # Okabe and Ito
WIDTH, MARGIN, FONT = 3320, 52, ImageFont.load_default(56)
ROUND = [step * 10.0**e for e, step in product(range(-6, 10), (1, 2, 5))]  # what the ticks of axes are


class Page(ImageDraw.ImageDraw):
    def __init__(self, height: int):
        self.image = Image.new("RGB", (WIDTH, height), "white")
        super().__init__(self.image)

    def write(self, x: float, y: float, words: str, fill=INK, anchor="lm") -> None:
        self.text((x, y), words, fill, FONT, anchor)

    def target(self, left, top, right, bottom) -> None:
        for margin, fill, width in ((12, "white", 15), (9, "black", 6)):  # to be seen on every screen
            self.rounded_rectangle((left - margin, top - margin, right + margin, bottom + margin), 8, None, fill, width)

    def click(self, x: float, y: float, tuned: bool) -> None:
        """A click with a white rim: the base model's is a cross, the tuned model's a ring."""
        for r, fill, width in ((22, "white", 18), (18, BLUE if tuned else ORANGE, 9)):
            if tuned:
                self.ellipse((x - r - 8, y - r - 8, x + r + 8, y + r + 8), None, fill, width)
            else:
                self.line((x - r, y - r, x + r, y + r, x, y, x - r, y + r, x + r, y - r), fill, width)

    def axes(self, left, top, right, bottom, lines, x_title: str, y_title: str, log="", dots=True, ends=()) -> tuple:
        """Plots lines (name, colour, [(x, y, spread), ...]), y over `ends` at least; returns x's and y's places."""

        def scale(values: list, start: float, end: float, log: bool) -> tuple:  # round ticks, and values' places
            low, high, ticks, bend = 0.7 * min(values), 1.4 * max(values), ROUND, math.log
            if not log:
                unit = next(unit for unit in ROUND if unit >= 1 and max(values) - min(values) <= 6 * unit)
                low, bend = math.floor(min(values) / unit) * unit, float
                high = max(math.ceil(max(values) / unit) * unit, low + unit)
                ticks = [low + i * unit for i in range(8)]
            ticks = [tick for tick in ticks if low <= tick <= high]
            return ticks, lambda value: start + (end - start) * (bend(value) - bend(low)) / (bend(high) - bend(low))

        points = [point for *_, line in lines for point in line]
        ys = [*ends, *(y - spread for _, y, spread in points), *(min(y + spread, 100) for _, y, spread in points)]
        x_ticks, at_x = scale([x for x, _, _ in points], left, right, "x" in log)
        y_ticks, at_y = scale(ys, bottom, top, "y" in log)
        for y in y_ticks:
            self.line((left, at_y(y), right, at_y(y)), PALE, 4)
            self.write(left - 32, at_y(y), f"{y:,g}", GREY, "rm")
        for x in x_ticks:
            self.line((at_x(x), bottom, at_x(x), bottom + 20), GREY, 4)
            self.write(at_x(x), bottom + 64, f"{x:,g}", GREY, "mm")
        self.line((left, bottom, right, bottom), GREY, 4)
        self.write((left + right) / 2, bottom + 152, x_title, anchor="mm")
        self.write(left, top - 80, y_title)
        free = top - 60  # no name stands above it, nor on another
        for name, fill, line in sorted(lines, key=lambda line: (line[0] > "", -line[2][-1][1])):
            places = [(at_x(x), at_y(y)) for x, y, _ in line]
            self.line(places, fill, 6, "curve")
            for (x, y), (_, middle, spread) in zip(places, line if dots else ()):
                self.line((x, at_y(middle - spread), x, at_y(min(middle + spread, 100))), fill, 6)
                self.ellipse((x - 22, y - 22, x + 22, y + 22), fill)
            if name:
                free = max(places[-1][1], free) + 80
                self.line((*places[-1], right + 28, free - 80), fill, 3)
                self.write(right + 40, free - 80, name, fill)
        return at_x, at_y


def _sheet(cells: list, columns: int, said: str = "", now: str = "after fine-tuning", top: int = 184) -> Page:
    """Pictures of screens in columns; a cell is (picture, target, clicks before and after, words, right or wrong)."""
    side = (WIDTH - 2 * MARGIN + 48) // columns - 48
    page = Page(top + math.ceil(len(cells) / columns) * (side + 152))
    page.write(WIDTH - MARGIN, 72, said, anchor="rm")
    page.target(68, 48, 132, 96)
    clicked, named = ("target", "base model's click", now), ("what is it? The answers after fine-tuning:",)
    for i, (x, words) in enumerate(zip((172, 492, 1124), clicked if cells[-1][2] else named)):
        page.write(x, 72, words)
        if i:
            page.click(x - 54, 72, tuned=i == 2)
    for i, (picture, bbox, clicks, words, good) in enumerate(cells):
        x, y = MARGIN + i % columns * (side + 48), top + i // columns * (side + 152)
        page.image.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        page.target(*(corner + edge * side / SIZE for corner, edge in zip((x, y, x, y), bbox)))
        for point, tuned in zip(clicks, (False, True)):
            if point:  # None is no click
                page.click(x + point[0] * side / SIZE, y + point[1] * side / SIZE, tuned)
        page.write(x, y + side + 64, words)
        if good is not None:
            page.rounded_rectangle((x + side - 200, y + side + 26, x + side, y + side + 106), 16, PALE if good else INK)
            page.write(x + side - 100, y + side + 64, "right" if good else "wrong", INK if good else "white", "mm")
    return page


def _cell(screen, sample: dict, answer, before) -> tuple:
    """A cell of a sample and the answers to it. Where a name is asked for, its place is the target."""
    picture = Image.fromarray(screen.image)
    if "bbox" in sample:
        return picture, sample["bbox"], (before, answer), sample["instruction"], is_hit(answer, sample["bbox"])
    bbox = next(e.click for e in screen.targets() if f"{e.colour} {e.name}".strip() == sample["answer"])
    return picture, bbox, (), answer, answer == sample["answer"]


def predictions(base: list, tuned: list) -> Image.Image:
    """Twelve of (screen, sample, click or name) before and after; failures have their share, but one at least."""
    cells = [_cell(*after, before) for (*_, before), after in zip(base, tuned)]
    order = sorted(range(len(cells)), key=lambda i: cells[i][-1])  # wrong ones first
    chosen = sorted({order[0], *(order[(2 * i + 1) * len(cells) // 24] for i in range(1, 12))})
    said = f"{100 * sum(cell[-1] for cell in cells) / len(cells):.1f} % of {len(cells):,} are right"
    return _sheet([cells[i] for i in chosen], 4, said).image.reduce(2)


def moving(given: list) -> list[Image.Image]:
    """Frames of six screens at most; given = [(step, [(screen, sample, point or None), ...]), ...], untuned first."""
    (_, first), (last, _), frames = given[0], given[-1], []
    pictures = [Image.fromarray(screen.image).resize((1040, 1040)) for screen, *_ in first[:6]]  # once, to save time
    for step, answers in given:
        cells = [(big, *_cell(*answer, before)[1:]) for big, (*_, before), answer in zip(pictures, first, answers)]
        said = f"step {step:,} of {last:,}:  {sum(cell[-1] for cell in cells)} of {len(cells)} clicks hit"
        page = _sheet(cells, 3, said, "click now")
        page.rectangle((MARGIN, 136, MARGIN + (WIDTH - 2 * MARGIN) * step / max(last, 1), 152), BLUE)
        frames.append(page.image.reduce(2).point(lambda value: value if value < 250 else 255))
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)  # few, so that white stays white
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def save_moving(frames: list[Image.Image], path) -> None:
    """An endless GIF; its last frame stays for three seconds."""
    times = [160] * (len(frames) - 1) + [3000]
    save(frames[0], path, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


@torch.no_grad()
def attention_maps(model, batch: dict) -> torch.Tensor:
    """Where every head looks from the last token of one sequence: its weights on visual tokens [L, H, P]."""
    with patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attend:
        model(**batch)  # whose queries and keys are [1, heads, T, d], rotated
    seen = [(q[0, :, -1:] @ k[0].mT / q.shape[-1] ** 0.5).softmax(-1) for (q, k, _), _ in attend.call_args_list]
    return torch.stack(seen)[:, :, 0, batch["input_ids"][0] == model.config.image_token_id]


def where_it_looks(model, adapter, questions: list[dict]) -> tuple[tuple[int, int], list]:
    """(layer, head) of the most focused adapted head, and its maps [P] for each question, without and with adapter."""
    with adapter.disabled():
        before = [attention_maps(model, question) for question in questions]
    places = [(layer, head) for layer, heads in adapter.heads.items() for head in heads]
    place = max(places, key=lambda place: sum(maps[place].max() for maps in before))
    return place, [(old[place], attention_maps(model, question)[place]) for old, question in zip(before, questions)]


def look(screens: list, samples: list, weights: list, base: list, tuned: list, place: tuple) -> Image.Image:
    """A row for each screen: where the head at `place` (layer, head) looks, by its weights [P], and what is clicked."""
    cells = []
    for screen, sample, looks, before, after in zip(screens, samples, weights, base, tuned):
        cells.append((Image.fromarray(screen.image), sample["bbox"], (), sample["instruction"], None))
        for seen in looks:
            picture, side = Image.fromarray(screen.image), round(len(seen) ** 0.5)
            shade = (205 - 205 * (seen / seen.max()).sqrt()).byte().reshape(side, side).cpu().numpy()
            picture.paste("#101828", None, Image.fromarray(shade).resize(picture.size, Image.Resampling.NEAREST))
            cells.append((picture, sample["bbox"], (), "", None))
        cells.append(_cell(screen, sample, after, before))
    page = _sheet(cells, 4, top=336)
    for i, title in enumerate(("what is asked", "before", "after fine-tuning", "where the click goes")):
        page.write(MARGIN + 816 * i, 288, title)
    page.write(868, 192, "where head {1} of layer {0} looks".format(*place))
    page.line((868, 240, 2452, 240), GREY, 4)
    return page.image.reduce(2)


def curve(steps: list) -> Image.Image:
    """steps = [(step, loss, click or None), ...]: each loss, their running mean, and the running click accuracy."""
    page, losses = Page(1300), [max(loss, 1e-5) for _, loss, _ in steps]
    means = [*accumulate(losses, lambda mean, loss: 0.9 * mean + 0.1 * loss)]
    each, running = ([(step, y, 0) for (step, *_), y in zip(steps, ys)] for ys in (losses, means))
    lines = [("", "#cde1ee", each), (f"{means[-1]:.2g}", BLUE, running)]
    page.axes(240, 200, 1400, 1064, lines, "training step", "loss of the answers (log scale)", "y", dots=False)
    shares = [(step, 100 * click, 0) for step, _, click in steps if click is not None]
    clicks = [*accumulate(shares, lambda mean, now: (now[0], 0.9 * mean[1] + 0.1 * now[1], 0))]
    if clicks:
        lines, title = [(f"{clicks[-1][1]:.0f} %", BLUE, clicks)], "clicks that hit the target, running mean, %"
        page.axes(1880, 200, 3040, 1064, lines, "training step", title, dots=False, ends=(0, 100))
    return page.image.reduce(2)


def trade_off(points: list[dict], title: str = "click accuracy after fine-tuning, %") -> Image.Image:
    """Accuracy against the adapter's FLOPs: points = [{name, x: kFLOP a screen, y, spread: 0..1, kept: bool}, ...]."""
    points = sorted(points, key=lambda point: (point["x"], point["y"]))
    page, top = Page(1480 + 84 * len(points)), 340 + 84 * len(points)
    page.write(MARGIN, 72, title)
    page.write(1080, 72, "blue: answers without an image stay exactly as they were", BLUE)
    page.write(2640, 72, "orange: they change", ORANGE)
    lines = [("", BLUE if p["kept"] else ORANGE, [(p["x"], 100 * p["y"], 100 * p["spread"])]) for p in points]
    x_title = "FLOPs of the adapter in a training step, thousands a screen (log scale)"
    at_x, at_y = page.axes(240, top, 2760, top + 940, lines, x_title, "", "x")
    for i, (_, fill, [(x, y, spread)]) in enumerate(lines):  # the names stand on poles
        page.line((at_x(x), 160 + 84 * i, at_x(x), at_y(min(y + spread, 100))), fill, 3)
        page.write(at_x(x) + 20, 180 + 84 * i, f"{points[i]['name']}: {y:.1f} %", fill)
    return page.image.reduce(2)


def skill(series: dict) -> Image.Image:
    """When values suffice: {name: [(the base's relation accuracy, click accuracy on row, its spread), ...]}, 0..1."""
    page, lines = Page(1760), []
    for (name, line), fill in zip(series.items(), (BLUE, GREEN, ORANGE)):
        lines.append((name, fill, sorted((100 * x, 100 * y, 100 * spread) for x, y, spread in line)))
    before = "before fine-tuning: how often the base model knows what stands right of a name, %"
    after = "after fine-tuning on row screens: clicks that hit the switch, %"
    page.axes(240, 200, WIDTH - 100 - max(map(FONT.getlength, series)), 1528, lines, before, after)
    return page.image.reduce(2)


def factors(named: list) -> Image.Image:
    """The factors of the savings, a bar each: named = [(what is adapted, its share of LoRA's adapter FLOPs), ...]."""
    page, left = Page(160 * len(named) + 176), 900
    page.write(MARGIN, 72, "FLOPs of the adapter as a share of LoRA's")
    for i, ((name, share), (_, before)) in enumerate(zip(named, named[:1] + named)):
        y, end = 240 + 160 * i, left + 1900 * before
        page.write(left - 56, y, name, anchor="rm")
        page.rectangle((left, y - 52, end, y + 52), PALE)
        page.rectangle((left, y - 52, left + 1900 * share, y + 52), BLUE)
        page.write(end + 40, y, f"{100 * share:.3g} %" + f"    x {share / before:.2f}" * (i > 0))
    return page.image.reduce(2)


def save(picture: Image.Image, path, form: str = "PNG", **how) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, form, optimize=True, **how)
    safe_write(buffer.getbuffer(), path)


def bars(scores: torch.Tensor, heads: dict) -> str:
    """A bar for each head, layer by layer, scaled to the largest score; selected heads are bracketed."""
    heights = (scores / scores.max().clamp(min=1e-30) * 8).ceil().int().tolist()
    layers = []
    for layer, row in enumerate(heights):
        marks = ["▁▁▂▃▄▅▆▇█"[height] for height in row]
        layers.append("".join(f"[{m}]" if head in heads.get(layer, []) else m for head, m in enumerate(marks)))
    return " · ".join(layers)
