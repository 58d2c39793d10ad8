"""Every picture, drawn with Pillow: plain data in, images out; and a bar chart in text.

Places are in quarters of a pixel of a page that shows a picture 830 wide; halved at the end, it is smooth and sharp.
"""

import io
import math
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from data.screens import SIZE, is_hit, referring
from imagelora import safe_write

BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito's
INK, GREY, PALE = "#222222", "#667085", "#e4e7ec"
FONT = ImageFont.load_default(56)
WIDTH = 3320  # of a page
MARGIN = 52  # left and right of what is on it
TITLE = 72  # where the first line of words stands
GAP = 48  # between the pictures of screens
CAPTION = 152  # below each of them, for words
POLE = 84  # by which the names of `trade_off` stand right of and below each other
ROUND = [step * 10.0**e for e in range(-6, 10) for step in (1, 2, 5)]  # what the ticks of axes are


class Page(ImageDraw.ImageDraw):
    """A white page and the pen for it. After `axes`, at_x and at_y give the places of values."""

    def __init__(self, height: int):
        self.image = Image.new("RGB", (WIDTH, height), "white")
        super().__init__(self.image)

    def finished(self) -> Image.Image:
        return self.image.reduce(2)

    def write(self, x, y, words: str, fill=INK, anchor="lm"):
        self.text((x, y), words, fill, FONT, anchor)

    def legend(self, title: str, inks: dict, own_line=False, rings=False):
        """The first line: a title, then each name in its ink, there or on a line of their own."""
        self.write(MARGIN, TITLE, title)
        x, y = (MARGIN - 80, TITLE + 96) if own_line else (MARGIN + self.textlength(title, FONT), TITLE)
        for name, fill in inks.items():
            self.circle((x + 100, y), 20, None if rings else fill, fill, 6)
            self.write(x + 136, y, name, fill)
            x += 136 + self.textlength(name, FONT)

    def target(self, left, top, right, bottom):
        """A black frame with a white rim, to be seen on every screen."""
        for margin, fill, width in ((12, "white", 15), (9, "black", 6)):
            frame = left - margin, top - margin, right + margin, bottom + margin
            self.rounded_rectangle(frame, 8, None, fill, width)

    def click(self, x, y, tuned: bool):
        """A click with a white rim: the base model's is a cross, the tuned model's a ring."""
        for r, fill, width in ((22, "white", 18), (18, BLUE if tuned else ORANGE, 9)):
            if tuned:
                self.circle((x, y), r + 8, None, fill, width)
            else:
                self.line((x - r, y - r, x + r, y + r), fill, width)
                self.line((x - r, y + r, x + r, y - r), fill, width)

    def axes(self, box: tuple, xs, ys, of_x: str, of_y="", log=""):
        """Axes around a box (left, top, right, bottom) that these values fill; log: "x" or "y" for a logarithm."""
        left, top, right, bottom = box
        x_ticks, self.at_x = _scale(xs, left, right, log == "x") if xs else ((), None)
        y_ticks, self.at_y = _scale(ys, bottom, top, log == "y")
        self.names_at, self.free = right, top
        for tick in y_ticks:
            y = self.at_y(tick)
            self.line((left, y, right, y), PALE, 4)
            self.write(left - 32, y, f"{tick:,g}", GREY, "rm")
        for tick in x_ticks:
            x = self.at_x(tick)
            self.line((x, bottom, x, bottom + 20), GREY, 4)
            self.write(x, bottom + 64, f"{tick:,g}", GREY, "mm")
        self.line((left, bottom, right, bottom), GREY, 4)
        self.write((left + right) / 2, bottom + 152, of_x, anchor="mm")
        self.write(left, top - 80, of_y)

    def plot(self, xs, ys, fill: str, name=""):
        """A line, and its name right of its end, but below the names before it."""
        places = [*zip(map(self.at_x, xs), map(self.at_y, ys))]
        self.line(places, fill, 6, "curve")
        if name:
            y = max(places[-1][1], self.free)
            self.line((*places[-1], self.names_at + 28, y), fill, 3)
            self.write(self.names_at + 40, y, name, fill)
            self.free = y + 80

    def dot(self, mark: tuple, fill: str, radius=22):
        x, y, low, high = mark
        x = self.at_x(x)
        self.line((x, self.at_y(low), x, self.at_y(high)), fill, 6)
        self.circle((x, self.at_y(y)), radius, fill)


def _scale(values, start: int, end: int, log: bool) -> tuple:
    """Round ticks around these values, and the function from a value to its place in start..end."""
    least, most = min(values), max(values)
    if log:
        low, high, bend = 0.7 * least, 1.4 * most, math.log
        ticks = [tick for tick in ROUND if low <= tick <= high]
    else:
        unit = next(int(unit) for unit in ROUND if unit >= max(1, (most - least) / 6))
        low = math.floor(least / unit) * unit
        high = max(math.ceil(most / unit) * unit, low + unit)
        ticks, bend = range(low, high + 1, unit), float
    length = bend(high) - bend(low)
    return ticks, lambda value: start + (end - start) * (bend(value) - bend(low)) / length


def _running_mean(values: list) -> list:
    means = values[:1]
    for value in values[1:]:
        means.append(0.9 * means[-1] + 0.1 * value)
    return means


def curve(steps: list) -> Image.Image:
    """steps = [(step, loss, click or None), ...]: each loss, their running mean, and the running click accuracy."""
    page = Page(1300)
    xs = [step for step, *_ in steps]
    losses = [max(loss, 1e-5) for _, loss, _ in steps]
    title = "loss (log scale); pale: each step, dark: running mean"
    page.axes((240, 200, 1400, 1064), xs, losses, "training step", title, "y")
    page.plot(xs, losses, "#cde1ee")
    means = _running_mean(losses)
    page.plot(xs, means, BLUE, f"{means[-1]:.2g}")
    means = _running_mean([100 * click for *_, click in steps if click is not None])
    if means:
        title = "correct clicks on training screens, running mean, %"
        page.axes((1880, 200, 3040, 1064), xs, (0, 100), "training step", title)
        page.plot(xs, means, BLUE, f"{means[-1]:.0f} %")
    return page.finished()


def _mark(x: float, y: float, spread: float) -> tuple:
    """(x, a mean in %, the low and the high end of its spread)."""
    return x, y, y - spread, min(y + spread, 100)


def trade_off(points: list[dict]) -> Image.Image:
    """Accuracy against the adapter's FLOPs: points = [{name, x: MFLOP, y, spread: %, kept: bool}, ...]."""
    dots = []
    for point in points:
        fill = BLUE if point["kept"] else ORANGE
        dots.append((_mark(point["x"], point["y"], point["spread"]), fill, point["name"]))
    dots.sort(key=lambda dot: (round(dot[0][0], 1), -dot[0][1]))  # of about equal FLOPs the better first
    top = 340 + POLE * len(dots)
    page = Page(top + 1140)
    inks = {"answers without an image stay as they were": BLUE, "they change": ORANGE}
    page.legend("correct clicks on row screens, %", inks)
    xs, _, lows, highs = zip(*(mark for mark, *_ in dots))
    title = "FLOPs of the adapter in a training step, millions per screen (log scale)"
    page.axes((240, top, 2760, top + 940), xs, lows + highs, title, log="x")
    pole = 0
    for i, ((x, y, *_), fill, name) in enumerate(dots):  # the names stand on poles, from which a line leads to the dot
        pole, height = max(page.at_x(x), pole + POLE), 180 + POLE * i
        page.line((pole, height - 20, pole, page.at_y(y), page.at_x(x), page.at_y(y)), GREY, 3)
        page.write(pole + 20, height, f"{name}: {y:.1f} %", fill)
    for mark, fill, _ in dots:
        page.dot(mark, fill)
    return page.finished()


def skill(panels: dict) -> Image.Image:
    """When values suffice, a panel each, three in a line: {title: {name: [(the base's relation accuracy, click accuracy
    on row, its spread), ...]}} in %."""
    page = Page(2400)
    inks = dict(zip(next(iter(panels.values())), (ORANGE, GREEN, PURPLE, BLUE)))
    page.legend("correct clicks on row screens, %", inks, own_line=True)
    for i, (title, series) in enumerate(panels.items()):
        left, top = 160 + 1080 * (i % 3), 400 + 1040 * (i // 3)
        page.axes((left, top, left + 880, top + 680), (0, 100), (0, 100), "skill of the base, %", title)
        for k, (name, points) in enumerate(series.items()):
            marks = sorted(_mark(*point) for point in points)
            xs, ys, *_ = zip(*marks)
            page.plot(xs, ys, inks[name])
            for mark in marks:
                page.dot(mark, inks[name], 32 - 5 * k)  # so that equal ones are rings around each other
    return page.finished()


def choices(panels: dict) -> Image.Image:
    """What choices of heads reach, a panel each: {title: {group: {choice: [click accuracy of a run, %, ...]}}}."""
    page = Page(1260)
    inks = dict(zip(("top", "matched", "random", "gate"), (BLUE, GREEN, GREY, ORANGE)))
    page.legend("correct clicks on row screens, %; a ring is a run, a line their mean", inks, rings=True)
    for i, (title, groups) in enumerate(panels.items()):
        left = 160 + 1640 * i
        page.axes((left, 280, left + 1480, 1100), (), (0, 100), "", title)
        for k, (group, runs) in enumerate(groups.items()):
            middle = left + 490 * k + 250
            page.write(middle, 1180, group, GREY, "mm")
            for j, (name, fill) in enumerate(inks.items()):
                x = middle + 110 * j - 165
                for value in runs[name]:
                    page.circle((x, page.at_y(value)), 16, None, fill, 6)
                y = page.at_y(sum(runs[name]) / len(runs[name]))
                page.line((x - 44, y, x + 44, y), fill, 10)
    return page.finished()


def factors(named: list) -> Image.Image:
    """The factors of the savings, a bar each: named = [(what is adapted, its share of LoRA's adapter FLOPs), ...]."""
    page = Page(160 * len(named) + 176)
    page.write(MARGIN, TITLE, "FLOPs of the adapter as a share of LoRA's")
    left, length = 900, 1900  # of a bar of all
    before = named[0][1]
    for i, (name, share) in enumerate(named):
        y, end = 240 + 160 * i, left + length * before
        page.write(left - 56, y, name, anchor="rm")
        page.rectangle((left, y - 52, end, y + 52), PALE)
        page.rectangle((left, y - 52, left + length * share, y + 52), BLUE)
        factor = f"    x {share / before:.2f}" if i else ""
        page.write(end + 40, y, f"{100 * share:.3g} %{factor}")
        before = share
    return page.finished()


class Cell(NamedTuple):
    """A screen as it is shown."""

    picture: Image.Image
    target: tuple  # its box
    words: str
    clicks: tuple = ()  # before and after fine-tuning, None for no click; empty where a name is asked for
    correct: bool | None = None  # None is not shown


def _cell(before: tuple, after: tuple) -> Cell:
    """Two answers, (screen, sample, click or name). Where a name is asked for, its place is the target."""
    screen, sample, answer = after
    picture = Image.fromarray(screen.image)
    if "bbox" in sample:
        target, clicks = sample["bbox"], (before[2], answer)
        return Cell(picture, target, sample["instruction"], clicks, is_hit(answer, target))
    element = next(e for e in screen.targets() if referring(screen, e) == sample)
    return Cell(picture, element.click, answer, (), answer == sample["answer"])


def _sheet(cells: list[Cell], columns: int, said="", now="after fine-tuning", top=184) -> Page:
    """Cells in columns, under a legend and what is `said`; now: what the second click is called."""
    side = (WIDTH - 2 * MARGIN + GAP) // columns - GAP
    rows = math.ceil(len(cells) / columns)
    page = Page(top + rows * (side + CAPTION))
    page.write(WIDTH - MARGIN, TITLE, said, anchor="rm")
    page.target(68, 48, 132, 96)
    if cells[-1].clicks:
        page.write(172, TITLE, "target")
        page.click(438, TITLE, tuned=False)
        page.write(492, TITLE, "base model's click")
        page.click(1070, TITLE, tuned=True)
        page.write(1124, TITLE, now)
    else:
        page.write(172, TITLE, "what is it? The answers after fine-tuning:")
    for i, cell in enumerate(cells):
        row, column = divmod(i, columns)
        _draw_cell(page, cell, MARGIN + column * (side + GAP), top + row * (side + CAPTION), side)
    return page


def _draw_cell(page: Page, cell: Cell, x: int, y: int, side: int):
    """x, y: the left upper corner of its picture, which is enlarged to this side."""
    zoom, end, below = side / SIZE, x + side, y + side + 64
    page.image.paste(cell.picture.resize((side, side)), (x, y))
    left, top, right, bottom = cell.target
    page.target(x + left * zoom, y + top * zoom, x + right * zoom, y + bottom * zoom)
    for tuned, point in enumerate(cell.clicks):
        if point:
            page.click(x + point[0] * zoom, y + point[1] * zoom, tuned)
    page.write(x, below, cell.words)
    if cell.correct is not None:
        verdict, fill, ink = ("right", PALE, INK) if cell.correct else ("wrong", INK, "white")
        page.rounded_rectangle((end - 200, below - 38, end, below + 42), 16, fill)
        page.write(end - 100, below, verdict, ink, "mm")


def predictions(base: list, tuned: list) -> Image.Image:
    """Twelve of (screen, sample, click or name) before and after; failures have their share, but one at least."""
    cells = [*map(_cell, base, tuned)]
    order = sorted(range(len(cells)), key=lambda i: cells[i].correct)  # wrong ones first
    chosen = {order[0]}
    for twelfth in range(1, 12):
        chosen.add(order[(2 * twelfth + 1) * len(cells) // 24])  # its middle
    share = 100 * sum(cell.correct for cell in cells) / len(cells)
    said = f"{share:.1f} % of {len(cells):,} are right"
    return _sheet([cells[i] for i in sorted(chosen)], 4, said).finished()


def moving(given: list) -> list[Image.Image]:
    """Frames of a few screens; given = [(step, [(screen, sample, click or name), ...]), ...], untuned first."""
    first, last = given[0][1], given[-1][0]
    frames = []
    for step, answers in given:
        cells = [*map(_cell, first, answers)]
        hits = sum(cell.correct for cell in cells)
        page = _sheet(cells, 3, f"step {step:,} of {last:,}:  {hits} of {len(cells)} clicks hit", "click now")
        done = (WIDTH - 2 * MARGIN) * step / last
        page.rectangle((MARGIN, 136, MARGIN + done, 152), BLUE)
        frames.append(page.finished().point(lambda value: value if value < 250 else 255))
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)  # few, so that white stays white
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def _shaded(screen: Image.Image, weights: torch.Tensor) -> Image.Image:
    """A screen, the darker the less a head looks there: weights [P]."""
    side = round(len(weights) ** 0.5)
    shade = 205 - 205 * (weights / weights.max()).sqrt()
    mask = Image.fromarray(shade.byte().reshape(side, side).cpu().numpy())
    mask = mask.resize(screen.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", screen.size, "#101828"), screen, mask)


def look(answers: list, place: tuple) -> Image.Image:
    """Where the head at `place` (layer, head) looks: a row for each of answers = [(screen, sample, its weights [P]
    before and after, clicks before and after), ...]."""
    cells = []
    for screen, sample, *looks, before, after in answers:
        cell = _cell((screen, sample, before), (screen, sample, after))
        cells.append(cell._replace(clicks=(), correct=None))
        for seen in looks:
            cells.append(Cell(_shaded(cell.picture, seen), cell.target, ""))
        cells.append(cell)
    page = _sheet(cells, 4, top=336)
    for i, title in enumerate(("what is asked", "before", "after fine-tuning", "where the click goes")):
        page.write(MARGIN + 816 * i, 288, title)
    layer, head = place
    where = f"where the question's last token looks by head {head} of layer {layer}"
    page.write(868, 192, f"{where} (bright; scaled in each panel)")
    page.line((868, 240, 2452, 240), GREY, 4)
    return page.finished()


def save(picture: Image.Image, path, form="PNG", **how) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, form, optimize=True, **how)
    safe_write(buffer.getbuffer(), path)


def save_moving(frames: list[Image.Image], path) -> None:
    """An endless GIF; its last frame stays for three seconds."""
    times = [160] * (len(frames) - 1) + [3000]
    save(frames[0], path, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


def bars(scores: torch.Tensor, heads: dict) -> str:
    """A bar for each head, layer by layer, scaled to the largest score; selected heads are bracketed."""
    heights = (scores / scores.max().clamp(min=1e-30) * 8).ceil().int().tolist()
    layers = []
    for layer, row in enumerate(heights):
        marks = ["▁▁▂▃▄▅▆▇█"[height] for height in row]
        chosen = heads.get(layer, [])
        marks = [f"[{mark}]" if head in chosen else mark for head, mark in enumerate(marks)]
        layers.append("".join(marks))
    return " · ".join(layers)
