"""Every picture, drawn with Pillow: plain data in, images out. Screens with clicks, plots, and a bar chart in text.

Places and sizes are in pixels of the page, 830 to its width; a canvas has four times as many each way while it is drawn
on, and half of those when it is done: smooth edges, and sharp on dense displays.
"""

import io
import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data.screens import SIZE, is_hit
from data.tokenizer import parse_point
from imagelora import safe_write

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # colour-blind readers can tell them apart (Okabe and Ito)
INK, GREY, PALE = "#222222", "#667085", "#e4e7ec"
WIDTH, MARGIN = 830, 13  # of a picture; a row of four screens fills it
SIDE = 192  # of a screen


# ---- The core: a canvas, and axes on it ------------------------------------------------------------------------------


@cache
def _font(size: float):
    return ImageFont.load_default(size)


def _length(words: str, size: float = 14) -> float:
    return _font(4 * size).getlength(words) / 4


class Canvas:
    def __init__(self, height: float, scale: int = 4):
        self.scale = scale
        self.pixels = Image.new("RGB", (WIDTH * scale, round(height * scale)), "white")
        self.pen = ImageDraw.Draw(self.pixels)

    def text(self, x, y, words: str, size=14, fill=INK, anchor="lm") -> None:
        self.pen.text((x * self.scale, y * self.scale), words, fill, _font(size * self.scale), anchor)

    def line(self, places: list, fill=INK, width=1.0) -> None:
        corners = [(x * self.scale, y * self.scale) for x, y in places]
        self.pen.line(corners, fill, round(width * self.scale), "curve")

    def box(self, left, top, right, bottom, fill=None, rim=None, width=0.0, radius=0.0) -> None:
        edges = [round(edge * self.scale) for edge in (left, top, right, bottom)]
        edges[2:] = max(edges[0], edges[2] - 1), max(edges[1], edges[3] - 1)
        self.pen.rounded_rectangle(edges, radius * self.scale, fill, rim, round(width * self.scale))

    def disc(self, x, y, r, fill=None, rim=None, width=0.0) -> None:
        edges = [edge * self.scale for edge in (x - r, y - r, x + r, y + r)]
        self.pen.ellipse(edges, fill, rim, round(width * self.scale))

    def paste(self, picture: Image.Image, x, y, side, how=Image.Resampling.LANCZOS, fill=None) -> None:
        """A square picture; with `fill`, that colour where the picture is bright."""
        picture = picture.resize((round(side * self.scale),) * 2, how)
        place = round(x * self.scale), round(y * self.scale)
        self.pixels.paste(fill or picture, place, picture if fill else None)

    def done(self) -> Image.Image:
        return self.pixels.reduce(2)


@dataclass(frozen=True)
class Scale:
    """One axis: its ends, its ticks, and whether it is logarithmic."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        low, value, high = (math.log(v) if self.log else v for v in (self.low, value, self.high))
        return (value - low) / (high - low)


def _linear(low: float, high: float) -> Scale:
    """From the tick below `low` to the one above `high`."""
    span = max(high - low, 1e-9)
    unit = next(u for e in range(-9, 12) for u in (10**e, 2 * 10**e, 5 * 10**e) if span / u <= 6)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    last = max(last, first + 1)
    return Scale(first * unit, last * unit, [i * unit for i in range(first, last + 1)])


def _log(low: float, high: float) -> Scale:
    steps = (1, 2, 5) if high / low < 2000 else (1,)
    ticks = [step * 10.0**e for e in range(-12, 13) for step in steps]
    return Scale(low, high, [tick for tick in ticks if low <= tick <= high], log=True)


class Axes:
    """A panel of a plot: its frame is (left, top, right, bottom), the places between its ticks and titles."""

    def __init__(self, canvas: Canvas, frame: tuple, x: Scale, y: Scale, x_title: str, y_title: str):
        self.canvas, self.frame, self.x, self.y = canvas, frame, x, y
        left, top, right, bottom = frame
        for tick in y.ticks:
            _, at = self.place(x.low, tick)
            canvas.line([(left, at), (right, at)], PALE)
            canvas.text(left - 8, at, f"{tick:,g}", 13, GREY, "rm")
        for tick in x.ticks:
            at, _ = self.place(tick, y.low)
            canvas.line([(at, bottom), (at, bottom + 5)], GREY)
            canvas.text(at, bottom + 16, f"{tick:,g}", 13, GREY, "mm")
        canvas.line([(left, bottom), (right, bottom)], GREY)
        canvas.text((left + right) / 2, bottom + 38, x_title, 14, INK, "mm")
        canvas.text(left, top - 20, y_title)

    def place(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.frame
        return left + self.x.share(x) * (right - left), bottom - self.y.share(y) * (bottom - top)

    def line(self, points: list, fill: str, width: float) -> None:
        if len(points) > 1:
            self.canvas.line([self.place(x, y) for x, y in points], fill, width)

    def spread(self, x, y, spread, fill: str) -> tuple:
        """A bar from y - spread to y + spread, at most to the panel's edges; the box that it takes."""
        (at, low), (_, high) = (self.place(x, min(max(end, self.y.low), self.y.high)) for end in (y - spread, y + spread))
        self.canvas.line([(at, low), (at, high)], fill, 1.5)
        return at - 2, high, at + 2, low


# ---- Screens with clicks ---------------------------------------------------------------------------------------------


def _target(canvas: Canvas, left, top, right, bottom) -> None:
    """A box with a white rim, to be seen on every screen."""
    for margin, fill, width in ((3, "white", 3.75), (2.25, "black", 1.5)):
        canvas.box(left - margin, top - margin, right + margin, bottom + margin, None, fill, width, 2)


def _click(canvas: Canvas, x: float, y: float, tuned: bool) -> None:
    """A click with a white rim: the base model's is a cross, the tuned model's a ring."""
    for fill, width in (("white", 4.5), (BLUE if tuned else ORANGE, 2.25)):
        if tuned:
            canvas.disc(x, y, 5.5 + width / 2, None, fill, width)
        else:
            a = 4.5 + (width - 2.25) / 4
            canvas.line([(x - a, y - a), (x + a, y + a)], fill, width)
            canvas.line([(x - a, y + a), (x + a, y - a)], fill, width)


def _legend(canvas: Canvas, y: float, now: str = "after fine-tuning") -> None:
    _target(canvas, MARGIN + 4, y - 6, MARGIN + 20, y + 6)
    canvas.text(MARGIN + 30, y, "target")
    _click(canvas, MARGIN + 97, y, tuned=False)
    canvas.text(MARGIN + 110, y, "base model's click")
    _click(canvas, MARGIN + 254, y, tuned=True)
    canvas.text(MARGIN + 268, y, now)


def _screen(canvas: Canvas, x: float, y: float, side: float, screen, bbox=None) -> None:
    canvas.paste(Image.fromarray(screen.image), x, y, side)
    if bbox:
        _target(canvas, *(corner + edge * side / SIZE for corner, edge in zip((x, y, x, y), bbox)))


def _clicks(canvas: Canvas, x: float, y: float, side: float, before, after) -> None:
    """Points of a screen, before and after; None is no click."""
    for point, tuned in ((before, False), (after, True)):
        if point:
            _click(canvas, x + point[0] * side / SIZE, y + point[1] * side / SIZE, tuned)


def _verdict(canvas: Canvas, right: float, y: float, good: bool) -> None:
    if not good:
        canvas.box(right - 50, y - 9, right, y + 10, INK, radius=4)
    canvas.text(right - 25 * (not good), y, "right" if good else "wrong", 14, GREY if good else "white", "rm" if good else "mm")


def _evenly(items: list, count: int) -> list:
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def predictions(base: list, tuned: list) -> Image.Image:
    """Three rows of four screens with the clicks, or names, of (screen, sample, answer) before and after.

    They hold the share of failures that there is, but one at least where there is any."""
    clicks = "bbox" in base[0][1]  # else a point is given and names are asked for
    good = [is_hit(a, s["bbox"]) if clicks else a == s["answer"] for _, s, a in tuned]
    hits, misses = ([i for i, hit in enumerate(good) if hit == kind] for kind in (True, False))
    shown = min(12, len(good))
    failures = max(round(shown * len(misses) / len(good)), min(len(misses), 1))
    canvas = Canvas(36 + math.ceil(shown / 4) * (SIDE + 38))
    if clicks:
        _legend(canvas, 18)
    else:
        _target(canvas, MARGIN + 4, 12, MARGIN + 20, 24)
        canvas.text(MARGIN + 30, 18, "what is it? The answers after fine-tuning:")
    canvas.text(WIDTH - MARGIN, 18, f"{100 * len(hits) / len(good):.1f} % of {len(good):,} are right", anchor="rm")
    chosen = sorted(_evenly(hits, shown - failures) + _evenly(misses, failures))
    for place, i in enumerate(chosen):
        (screen, sample, before), (_, _, after) = base[i], tuned[i]
        x, y = MARGIN + place % 4 * (SIDE + 12), 36 + place // 4 * (SIDE + 38)
        if clicks:
            _screen(canvas, x, y, SIDE, screen, sample["bbox"])
            _clicks(canvas, x, y, SIDE, before, after)
        else:
            point = parse_point(" ".join(sample["instruction"].split()[-2:]))
            _screen(canvas, x, y, SIDE, screen, next(e.click for e in screen.targets() if is_hit(point, e.click)))
        canvas.text(x, y + SIDE + 16, sample["instruction"] if clicks else after)
        _verdict(canvas, x + SIDE, y + SIDE + 16, good[i])
    return canvas.done()


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


def look(screens: list, samples: list, weights: list, base: list, tuned: list, place: tuple) -> Image.Image:
    """A row for each screen: where the head at `place` (layer, head) looks, by its weights [P], and what is clicked."""
    top, step = 84, SIDE + 40
    canvas = Canvas(top + len(screens) * step)
    _legend(canvas, 18)
    layer, head = place
    columns = [MARGIN + i * (SIDE + 12) for i in range(4)]
    for x, title in zip(columns, ("what is asked", "before", "after fine-tuning", "where the click goes")):
        canvas.text(x, 72, title)
    canvas.text(columns[1], 48, f"where head {head} of layer {layer} looks")
    canvas.line([(columns[1], 60), (columns[2] + SIDE, 60)], GREY)
    for i, (screen, sample, looks, *answers) in enumerate(zip(screens, samples, weights, base, tuned)):
        y = top + i * step
        before, after = map(parse_point, answers)
        for column, x in enumerate(columns):
            _screen(canvas, x, y, SIDE, screen, sample["bbox"] if column == 3 else None)
        for x, seen in zip(columns[1:], looks):
            patches = round(len(seen) ** 0.5)
            shade = (220 - 220 * (seen / seen.max()).sqrt()).byte().reshape(patches, patches).cpu().numpy()
            canvas.paste(Image.fromarray(shade), x, y, SIDE, Image.Resampling.NEAREST, "#101828")
        _clicks(canvas, columns[3], y, SIDE, before, after)
        canvas.text(columns[0], y + SIDE + 16, sample["instruction"])
        _verdict(canvas, columns[3] + SIDE, y + SIDE + 16, is_hit(after, sample["bbox"]))
    return canvas.done()


def moving(given: list) -> list[Image.Image]:
    """Frames of a training run, in one palette: given = [(step, [(screen, sample, point or None), ...]), ...].

    Six screens at most, the same in each; the first step's clicks stay as crosses, as they are the base model's."""
    (_, first), (last, final) = given[0], given[-1]
    side, top = 256, 46
    rows = math.ceil(min(len(first), 6) / 3)
    places = [(MARGIN + i % 3 * (side + 18), top + i // 3 * (side + 38)) for i in range(min(len(first), 6))]
    ground = Canvas(top + rows * (side + 38))
    _legend(ground, 16, "click now")
    for (x, y), (screen, sample, _) in zip(places, first):
        _screen(ground, x, y, side, screen, sample["bbox"])
        ground.text(x, y + side + 16, sample["instruction"])
    frames = []
    for step, answers in given:
        canvas = Canvas(ground.pixels.height / 4)
        canvas.pixels.paste(ground.pixels)
        hits = [is_hit(point, sample["bbox"]) for _, sample, point in answers]
        said = f"step {step:,} of {last:,}:  {sum(hits)} of {len(hits)} clicks hit"
        canvas.text(WIDTH - MARGIN, 16, said, anchor="rm")
        canvas.box(MARGIN, 34, WIDTH - MARGIN, 38, PALE)
        canvas.box(MARGIN, 34, MARGIN + (WIDTH - 2 * MARGIN) * step / max(last, 1), 38, BLUE)
        for (x, y), (_, _, before), (_, _, now), hit in zip(places, first, answers, hits):
            _clicks(canvas, x, y, side, before, now)
            _verdict(canvas, x + side, y + side + 16, hit)
        frames.append(canvas.done())
    palette = frames[-1].quantize(255, dither=Image.Dither.NONE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def save_moving(frames: list[Image.Image], path: Path, milliseconds: int = 160) -> None:
    """An endless GIF; the last frame stays for three seconds."""
    buffer = io.BytesIO()
    times = [milliseconds] * (len(frames) - 1) + [3000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
    safe_write(buffer.getbuffer(), path)


# ---- Plots -----------------------------------------------------------------------------------------------------------


def curve(steps: list) -> Image.Image:
    """The loss, each step's and its running mean, and the running click accuracy: steps = [(step, loss, click or None)]."""
    canvas = Canvas(330)
    xs, losses, _ = zip(*steps)
    clicks = [(x, 100 * click) for x, _, click in steps if click is not None]
    losses = [max(loss, 1e-6) for loss in losses]
    means = list(accumulate(losses, lambda mean, loss: 0.9 * mean + 0.1 * loss))
    x = _linear(0, max(xs))
    y = _log(0.8 * min(losses), 1.25 * max(losses))
    right = 395 if clicks else WIDTH - 60
    loss = Axes(canvas, (60, 56, right, 272), x, y, "training step", "loss of the answers (log scale)")
    loss.line([*zip(xs, losses)], "#a8cbe0", 1)
    loss.line([*zip(xs, means)], BLUE, 2.25)
    ends = [(loss, xs[-1], means[-1], f"{means[-1]:.2g}")]
    if clicks:
        share = Axes(canvas, (480, 56, 780, 272), x, _linear(0, 100), "training step", "clicks that hit the target, %")
        share.line(clicks, BLUE, 2.25)
        ends.append((share, *clicks[-1], f"{clicks[-1][1]:.0f} %"))
    for panel, x, y, words in ends:
        x, y = panel.place(x, y)
        canvas.disc(x, y, 3.5, BLUE)
        canvas.text(x + 8, y, words, 14, BLUE)
    return canvas.done()


def _overlap(one: tuple, other: tuple) -> float:
    """The area that two boxes (left, top, right, bottom) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _near(place: tuple, words: str, frame: tuple) -> list[tuple]:
    """Where words can stand around a place in a frame: (distance, end of a line to them, box)."""
    (x, y), width, height, found = place, _length(words) + 6, 19, []
    for far, turn in product((9, 22, 36, 52, 70, 90), range(16)):
        u, v = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
        left = x + u * (far + width / 2) - width / 2
        top = y + v * (far + height / 2) - height / 2
        box = left, top, left + width, top + height
        if _overlap(box, frame) > width * height - 1:
            found.append((far, (min(max(x, left), box[2]), min(max(y, top), box[3])), box))
    return found


def _labels(places: list, names: list[str], marks: list, frame: tuple) -> list[tuple]:
    """One of `_near` for each name, which covers none of the others and of the marks [(boxes of a place), ...]."""
    options = [_near(place, name, frame) for place, name in zip(places, names)]
    chosen = [near[0] for near in options]

    def cost(one: tuple, i: int) -> float:
        far, (x, y), box = one
        others = [box for j, (_, _, box) in enumerate(chosen) if j != i]
        others += [box for j, boxes in enumerate(marks) if j != i for box in boxes]
        covered = sum(_overlap(box, other) for other in [*others, *marks[i]])
        if far > 9:  # a line leads there, here a row of dots
            dots = [(x + (a - x) * t / 15, y + (b - y) * t / 15) for a, b in places[i : i + 1] for t in range(15)]
            covered += 10 * sum(_overlap((u - 1, v - 1, u + 1, v + 1), other) for u, v in dots for other in others)
        return covered + far

    for i in [*range(len(names))] * 5:  # each moves to where it is best while the others stay
        chosen[i] = min(options[i], key=lambda one: cost(one, i))
    return chosen


def trade_off(points: list[dict], title: str = "click accuracy after fine-tuning, %") -> Image.Image:
    """Accuracy against the adapter's FLOPs: points = [{name, x: kFLOP a screen, y and spread: 0..1, kept: bool}]."""
    canvas, frame = Canvas(500), (60, 84, WIDTH - 30, 442)
    for x, fill, kept in ((MARGIN, BLUE, "kept exactly"), (MARGIN + 270, ORANGE, "changed")):
        canvas.disc(x + 6, 18, 5.5, fill if fill == BLUE else "white", fill, 2)
        canvas.text(x + 20, 18, f"answers without an image {kept}", fill=fill)
    xs = [point["x"] for point in points]
    ys = [100 * (point["y"] + sign * point["spread"]) for point in points for sign in (-1, 1)]
    x_title = "FLOPs of the adapter in a training step, thousands a screen (log scale)"
    axes = Axes(canvas, frame, _log(0.75 * min(xs), 1.4 * max(xs)), _linear(min(ys), min(max(ys), 100)), x_title, title)
    places = [axes.place(point["x"], 100 * point["y"]) for point in points]
    marks = []
    for point, (x, y) in zip(points, places):
        fill = BLUE if point["kept"] else ORANGE
        marks.append([(x - 7, y - 7, x + 7, y + 7), axes.spread(point["x"], 100 * point["y"], 100 * point["spread"], fill)])
    labels = _labels(places, [point["name"] for point in points], marks, frame)
    for point, place, (far, end, (left, top, right, bottom)) in zip(points, places, labels):
        fill = BLUE if point["kept"] else ORANGE
        if far > 9:
            canvas.line([place, end], GREY, 0.75)
        canvas.disc(*place, 5.5, fill if point["kept"] else "white", fill, 2)
        canvas.text((left + right) / 2, (top + bottom) / 2, point["name"], fill=fill, anchor="mm")
    return canvas.done()


def skill(series: dict) -> Image.Image:
    """When values suffice: {name: [(the base's relation accuracy, click accuracy on row, its spread), ...]}, 0..1."""
    canvas = Canvas(440)
    right = WIDTH - 32 - max(map(_length, series))
    lines = {name: sorted((100 * x, 100 * y, 100 * d) for x, y, d in line) for name, line in series.items()}
    xs = [x for line in lines.values() for x, _, _ in line]
    y = _linear(min(y - spread for line in lines.values() for _, y, spread in line), 100)
    x_title = "base model, before: what stands right of a name, % right"
    title = "after fine-tuning on row screens: clicks that hit the switch, %"
    axes = Axes(canvas, (60, 56, right, 382), _linear(min(xs), max(xs)), y, x_title, title)
    ends = []
    for (name, line), fill in zip(lines.items(), (BLUE, GREEN, ORANGE, INK)):
        axes.line([(x, y) for x, y, _ in line], fill, 2)
        for x, y, spread in line:
            axes.spread(x, y, spread, fill)
            canvas.disc(*axes.place(x, y), 5, fill)
        ends.append((axes.place(x, y), name, fill))
    lowest = 1e9
    for (x, y), name, fill in sorted(ends, key=lambda end: -end[0][1]):  # from below, none on another
        lowest = min(y, lowest - 19)
        canvas.text(x + 14, lowest, name, fill=fill)
    return canvas.done()


def factors(named: list) -> Image.Image:
    """The factors of the savings, a bar each: named = [(what is adapted, its share of LoRA's adapter FLOPs), ...]."""
    canvas = Canvas(len(named) * 40 + 44)
    canvas.text(MARGIN, 18, "adapter FLOPs, of LoRA's: each restriction multiplies")
    left = MARGIN + 14 + max(_length(name) for name, _ in named)
    unit = WIDTH - 130 - left
    before = named[0][1]
    for i, (name, share) in enumerate(named):
        y = 60 + 40 * i
        canvas.text(left - 14, y, name, anchor="rm")
        canvas.box(left, y - 13, left + before * unit, y + 13, PALE)
        canvas.box(left, y - 13, left + share * unit, y + 13, BLUE)
        words = f"{share:.1%}".replace(".0%", "%").replace("%", " %")
        at = left + before * unit + 10
        canvas.text(at, y, words)
        if i:
            canvas.text(at + _length(words) + 12, y, f"x {share / before:.2f}", fill=GREY)
        before = share
    return canvas.done()


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
