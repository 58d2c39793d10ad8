"""Every picture, drawn with Pillow: plain data in, images out; and a bar chart in text.

Places are in quarters of a pixel of a page that shows a picture 830 wide; halved at the end, it is smooth and sharp.
"""

import io
import math
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from data.screens import SIZE, is_hit
from imagelora import safe_write

BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito's
INK, GREY, PALE = "#222222", "#667085", "#e4e7ec"
FONT = ImageFont.load_default(56)
WIDTH = 3320  # of a page
MARGIN = 52  # left and right of what is on it
TITLE = 72  # where the first line of words stands
GAP = 48  # between the pictures of screens
CAPTION = 152  # below each of them, for words


class Page(ImageDraw.ImageDraw):
    """A white page and the pen for it."""

    def __init__(self, height: int):
        self.image = Image.new("RGB", (WIDTH, height), "white")
        super().__init__(self.image)

    def write(self, x, y, words: str, fill=INK, anchor="lm"):
        self.text((x, y), words, fill, FONT, anchor)

    def target(self, left, top, right, bottom):
        """A black frame with a white rim, to be seen on every screen."""
        for margin, fill, width in ((12, "white", 15), (9, "black", 6)):
            frame = left - margin, top - margin, right + margin, bottom + margin
            self.rounded_rectangle(frame, 8, None, fill, width)

    def click(self, x, y, tuned):
        """A click with a white rim: the base model's is a cross, the tuned model's a ring."""
        ink = BLUE if tuned else ORANGE
        for r, fill, width in ((22, "white", 18), (18, ink, 9)):
            if tuned:
                self.circle((x, y), r + 8, None, fill, width)
            else:
                for rise in (r, -r):
                    self.line((x - r, y - rise, x + r, y + rise), fill, width)


class Cell(NamedTuple):
    """A screen as it is shown."""

    picture: Image.Image
    target: tuple  # its box
    words: str = ""
    clicks: tuple = ()  # before and after fine-tuning, None for no click
    hit: bool | None = None  # whether the second is correct; None: it is not said


def _cell(before: tuple, after: tuple) -> Cell:
    """Two answers, (screen, sample, click)."""
    screen, sample, click = after
    target, picture = sample["bbox"], Image.fromarray(screen.image)
    return Cell(picture, target, sample["instruction"], (before[2], click), is_hit(click, target))


def _sheet(cells: list[Cell], columns: int, headline="", second="after fine-tuning", header=184) -> Page:
    """Cells in columns, under a legend and a headline; second: what the second click is called."""
    side = (WIDTH - 2 * MARGIN + GAP) // columns - GAP
    rows = math.ceil(len(cells) / columns)
    page = Page(header + rows * (side + CAPTION))
    page.write(WIDTH - MARGIN, TITLE, headline, anchor="rm")
    page.target(68, 48, 132, 96)
    page.write(172, TITLE, "target")
    page.click(438, TITLE, tuned=False)
    page.write(492, TITLE, "base model's click")
    page.click(1070, TITLE, tuned=True)
    page.write(1124, TITLE, second)
    for i, cell in enumerate(cells):
        row, column = divmod(i, columns)
        x, y = MARGIN + column * (side + GAP), header + row * (side + CAPTION)
        end, below, zoom = x + side, y + side + 64, side / SIZE
        page.image.paste(cell.picture.resize((side, side)), (x, y))
        left, top, right, bottom = (zoom * edge for edge in cell.target)
        page.target(x + left, y + top, x + right, y + bottom)
        for tuned, point in enumerate(cell.clicks):
            if point:
                page.click(x + zoom * point[0], y + zoom * point[1], tuned)
        page.write(x, below, cell.words)
        if cell.hit is not None:
            verdict, ink, fill = ("correct", INK, PALE) if cell.hit else ("wrong", "white", INK)
            page.rounded_rectangle((end - 240, below - 38, end, below + 42), 16, fill)
            page.write(end - 120, below, verdict, ink, "mm")
    return page


def predictions(base: list, tuned: list) -> Image.Image:
    """Twelve of (screen, sample, click) before and after; failures have their share, but one at least."""
    cells = [*map(_cell, base, tuned)]
    order = sorted(range(len(cells)), key=lambda i: cells[i].hit)  # wrong ones first
    chosen = {order[0]}
    for twelfth in range(1, 12):
        chosen.add(order[(2 * twelfth + 1) * len(cells) // 24])  # its middle
    share = sum(cell.hit for cell in cells) / len(cells)
    headline = f"{100 * share:.1f} % of {len(cells):,} are correct"
    return _sheet([cells[i] for i in sorted(chosen)], 4, headline).image.reduce(2)


def is_filmed(step: int, steps: int) -> bool:
    """Whether the moving picture shows this step: two frames in three are of the first quarter, where clicks move."""
    most = 96 if 4 * step < steps else 16
    return step % (steps // most + 1) == 0


def moving(film: list) -> list[Image.Image]:
    """Frames of a few screens; film = [(step, [(screen, sample, click), ...]), ...], untuned first."""
    first, last = film[0][1], film[-1][0]
    frames = []
    for step, answers in film:
        cells = [*map(_cell, first, answers)]
        hits = sum(cell.hit for cell in cells)
        headline = f"step {step:,} of {last:,}:  {hits} of {len(cells)} clicks hit"
        page = _sheet(cells, 3, headline, "click now")
        done = (WIDTH - 2 * MARGIN) * step / last
        page.rectangle((MARGIN, 136, MARGIN + done, 152), BLUE)
        picture = page.image.reduce(2)
        frames.append(picture.point(lambda value: value if value < 250 else 255))
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)  # few, so that white stays white
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def attention_picture(examples: list, layer: int, head: int) -> Image.Image:
    """Where a head looks, a row an example: examples = [(answer before, answer after, weights [P] before, after)]."""
    cells = []
    for before, after, *maps in examples:
        cell = _cell(before, after)
        cells.append(Cell(cell.picture, cell.target, cell.words))
        cells += [Cell(_shaded(cell.picture, weights), cell.target) for weights in maps]
        cells.append(cell)
    page = _sheet(cells, 4, header=336)
    for i, title in enumerate(("what is asked", "before", "after fine-tuning", "where the click goes")):
        page.write(MARGIN + 816 * i, 288, title)
    where = f"where the question's last token looks by head {head} of layer {layer}"
    page.write(868, 192, f"{where} (bright; scaled in each panel)")
    page.line((868, 240, 2452, 240), GREY, 4)
    return page.image.reduce(2)


def _shaded(screen: Image.Image, weights: torch.Tensor) -> Image.Image:
    """A screen, the darker the less a head looks there: weights [P]."""
    side = round(len(weights) ** 0.5)
    shade = 205 - 205 * (weights / weights.max()).sqrt()
    shade = shade.byte().reshape(side, side).cpu()
    mask = Image.fromarray(shade.numpy()).resize(screen.size, Image.Resampling.NEAREST)
    dark = Image.new("RGB", screen.size, "#101828")
    return Image.composite(dark, screen, mask)


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


def save(frames: list[Image.Image], path):
    """A picture; or several as an endless GIF, whose last frame stays for three seconds."""
    first, *others = frames
    moves = {"save_all": True, "append_images": others, "duration": [160] * len(others) + [3000], "loop": 0}
    buffer = io.BytesIO()
    first.save(buffer, path.suffix[1:], optimize=True, **(moves if others else {}))
    safe_write(buffer.getbuffer(), path)
