"""The pictures on the pages, drawn with Pillow, and a bar chart in text: plain data in, images out.

A page is drawn at twice its size and halved at the end, which makes lines smooth: places are in half pixels.
"""

import io
import math
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import write_file
from data.screens import SIZE, Box, is_hit

BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito's
INK, GREY, RED = "#222222", "#667085", "#b42318"
FONT = ImageFont.load_default(56)
LETTER = 25  # mean width of a letter
LINE = 72  # from one line of text to the next
WIDTH = 3320  # of a page
MARGIN = 52
GAP = 48  # between panels
HEADER = MARGIN + 2 * LINE + 52  # height of the legend and what is free below it
CAPTION = 2 * LINE + 56  # height of the text below a panel
FRAMES = 32  # of the moving picture
RULE = "A click is correct if its point is inside the target, whose right and bottom edges are excluded."


class Example(NamedTuple):
    """Where a head looks while one question is answered."""

    base_answer: tuple  # (screen, sample, click) before and after fine-tuning
    answer: tuple
    base_weights: torch.Tensor  # the head's attention to the visual tokens, [P], before and after
    weights: torch.Tensor
    base_note: str  # what is written below the two
    note: str


class Page:
    """A white page with a legend, and below it panels in columns."""

    def __init__(self, height: int, columns: int, tuned_label="after fine-tuning", headline=""):
        self.image = Image.new("RGB", (WIDTH, height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.side = (WIDTH - 2 * MARGIN + GAP) // columns - GAP  # of a panel
        y = MARGIN + 24  # middle of the legend
        self.frame((MARGIN + 16, y - 24, MARGIN + 80, y + 24))
        self.write(172, y, "target")
        self.cross(438, y)
        self.write(492, y, "base model's click")
        self.ring(1070, y)
        self.write(1124, y, tuned_label)
        self.write(WIDTH - MARGIN, y, headline, anchor="rm")
        self.write(MARGIN, y + LINE, RULE, GREY)

    def write(self, x, y, text: str, fill=INK, anchor="lm"):
        self.draw.text((x, y), text, fill, FONT, anchor)

    def frame(self, box):
        """A black frame, with a white rim that shows on dark ground."""
        left, top, right, bottom = box
        self.draw.rectangle((left - 4, top - 4, right + 4, bottom + 4), None, "white", 4)
        self.draw.rectangle(box, None, "black", 6)

    def cross(self, x, y):
        for radius, fill, width in ((22, "white", 18), (18, ORANGE, 9)):
            self.draw.line((x - radius, y - radius, x + radius, y + radius), fill, width)
            self.draw.line((x - radius, y + radius, x + radius, y - radius), fill, width)

    def ring(self, x, y):
        for radius, outline, width in ((30, "white", 18), (26, BLUE, 9)):
            self.draw.circle((x, y), radius, None, outline, width)
        for radius, fill in ((9, "white"), (6, BLUE)):
            self.draw.circle((x, y), radius, fill)

    def x_of(self, column: int) -> int:
        return MARGIN + column * (self.side + GAP)

    def panel(self, column: int, y, picture: Image.Image, target: Box, caption: str, fill=INK):
        """The picture of a screen with its target, and a caption below it."""
        x, zoom = self.x_of(column), self.side / SIZE
        self.image.paste(picture.resize((self.side, self.side)), (x, y))
        left, top, right, bottom = target
        self.frame((x + zoom * left, y + zoom * top, x + zoom * right, y + zoom * bottom))
        for i, line in enumerate(wrap(caption, self.side // LETTER)):
            self.write(x, y + self.side + 48 + i * LINE, line, fill)

    def clicks(self, column: int, y, base_answer: tuple, answer: tuple):
        """A panel with the clicks of two answers (screen, sample, click) to one question, before and after."""
        screen, sample, click = answer
        _, _, base_click = base_answer
        judgement = verdict(answer)
        fill = INK if judgement == "correct" else RED
        self.panel(
            column, y, Image.fromarray(screen.image), sample["bbox"], f"{sample['instruction']}: {judgement}", fill
        )
        x, zoom = self.x_of(column), self.side / SIZE
        if base_click:
            self.cross(x + zoom * base_click[0], y + zoom * base_click[1])
        if click:
            self.ring(x + zoom * click[0], y + zoom * click[1])


def things(answer: tuple) -> list[tuple[str, Box]]:
    """What can be clicked on the screen of an answer: (what a caption calls it, its box)."""
    screen, sample, _ = answer
    names = []
    for element in screen.targets():
        if element.click == sample["bbox"]:
            names += [("its name", element.bbox), ("its switch", element.click)]
        else:
            full_name = element.full_name()
            names += [(f"the name {full_name}", element.bbox), (f"the switch of {full_name}", element.click)]
    return names


def verdict(answer: tuple) -> str:
    """Whether a click is correct and, if not, what it has hit instead."""
    _, sample, click = answer
    if is_hit(click, sample["bbox"]):
        return "correct"
    if click is None:
        return "wrong, no point"
    for name, box in things(answer):
        if is_hit(click, box):
            return f"wrong, {name}"
    return "wrong, beside its switch"


def page_of_clicks(base_answers: list, answers: list, columns: int, **header) -> Page:
    """A panel for each answer (screen, sample, click), with the click before and after."""
    rows = math.ceil(len(answers) / columns)
    side = (WIDTH - 2 * MARGIN + GAP) // columns - GAP
    page = Page(HEADER + rows * (side + CAPTION), columns, **header)
    for i, (base_answer, answer) in enumerate(zip(base_answers, answers)):
        row, column = divmod(i, columns)
        page.clicks(column, HEADER + row * (side + CAPTION), base_answer, answer)
    return page


def predictions(base_answers: list, answers: list) -> Image.Image:
    """Twelve of the answers: as large a share of them is wrong as of all, but at least one."""
    hits = [is_hit(click, sample["bbox"]) for _, sample, click in answers]
    order = sorted(range(len(hits)), key=lambda i: hits[i])  # wrong ones first
    middles = [(2 * twelfth + 1) * len(hits) // 24 for twelfth in range(1, 12)]
    chosen = sorted({order[0], *(order[middle] for middle in middles)})
    headline = f"{sum(hits) / len(hits):.1%} of {len(hits):,} are correct"
    before = [base_answers[i] for i in chosen]
    after = [answers[i] for i in chosen]
    return page_of_clicks(before, after, columns=4, headline=headline).image.reduce(2)


def is_filmed(step: int, steps: int) -> bool:
    """Whether the moving picture shows this step: many at the start, where clicks move, few at the end."""
    return step in {round(steps * (frame / FRAMES) ** 2) for frame in range(FRAMES + 1)}


def moving_picture(film: list) -> list[Image.Image]:
    """The frames of film = [(step, answers), ...], which begins before training."""
    _, base_answers = film[0]
    last_step, _ = film[-1]
    frames = []
    for step, answers in film:
        hits = sum(verdict(answer) == "correct" for answer in answers)
        headline = f"step {step:,} of {last_step:,}:  {hits} of {len(answers)} clicks hit"
        page = page_of_clicks(base_answers, answers, columns=3, tuned_label="click now", headline=headline)
        done = (WIDTH - 2 * MARGIN) * step / last_step
        page.draw.rectangle((MARGIN, HEADER - 32, MARGIN + done, HEADER - 16), BLUE)
        frames.append(page.image.reduce(2))
    return frames


def attention_picture(examples: list[Example], lines: list[str]) -> Image.Image:
    """Where a head looks, a column for each example. lines: what stands above the three rows of panels."""
    side = (WIDTH - 2 * MARGIN + GAP) // len(examples) - GAP
    row_height = LINE + side + CAPTION
    page = Page(HEADER + 3 * row_height, len(examples))
    for row, line in enumerate(lines):
        page.write(MARGIN, HEADER + row * row_height + 24, line)
    for column, example in enumerate(examples):
        y = HEADER + LINE
        screen, sample, _ = example.answer
        for weights, note in ((example.base_weights, example.base_note), (example.weights, example.note)):
            page.panel(column, y, darkened(screen.image, weights), sample["bbox"], note)
            y += row_height
        page.clicks(column, y, example.base_answer, example.answer)
    return page.image.reduce(2)


def darkened(image: np.ndarray, weights: torch.Tensor) -> Image.Image:
    """The picture of a screen, the darker the less a head looks there: weights [P]."""
    side = round(len(weights) ** 0.5)
    shade = 205 - 205 * (weights / weights.max()).sqrt()
    mask = Image.fromarray(shade.byte().reshape(side, side).cpu().numpy()).resize(
        (SIZE, SIZE), Image.Resampling.NEAREST
    )
    return Image.composite(Image.new("RGB", (SIZE, SIZE), "#101828"), Image.fromarray(image), mask)


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


def save(frames: list[Image.Image], path: Path) -> None:
    """Writes a picture; or several as an endless GIF, whose last frame stays for three seconds."""
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)  # few colours make a small file
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options = {}
    if others:
        durations = [160] * len(others) + [3000]  # milliseconds
        options = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    buffer = io.BytesIO()
    first.save(buffer, path.suffix[1:], optimize=True, **options)
    write_file(path, buffer.getbuffer())
