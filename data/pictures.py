"""Draws answers and attention with Pillow, and a bar chart in text: plain data in, images out.

A page is drawn at twice its size and halved at the end, which makes lines smooth: places are in half pixels.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data.command import write_file
from data.evaluate import Answer
from data.questions import is_hit
from data.screens import SIZE, Box

BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito's
INK, GREY, RED = "#222222", "#667085", "#b42318"
FONT = ImageFont.load_default(56)
LINE = 72  # from one line of text to the next
WIDTH = 3320  # of a page
MARGIN = 52
GAP = 48  # between panels
HEADER = MARGIN + 2 * LINE + 36  # height of the legend and what is free below it
CAPTION = LINE + 56  # height of the text below a panel
RULE = "A click is correct if its point is inside the target, whose right and bottom edges are excluded."


class Page:
    """A white page with a legend, and below it panels in rows and columns."""

    def __init__(self, rows: int, columns: int, titles=(), headline=""):
        """titles: what stands above each row; none by default. headline: stands right of the legend."""
        self.side = (WIDTH - 2 * MARGIN + GAP) // columns - GAP  # of a panel
        self.title_height = LINE if titles else 0
        self.row_height = self.title_height + self.side + CAPTION
        self.image = Image.new("RGB", (WIDTH, HEADER + rows * self.row_height), "white")
        self.draw = ImageDraw.Draw(self.image)
        y = MARGIN + 24  # middle of the legend
        self.frame(MARGIN + 16, y - 24, MARGIN + 80, y + 24)
        self.write(172, y, "target")
        self.cross(438, y)
        self.write(492, y, "base model's click")
        self.ring(1070, y)
        self.write(1124, y, "tuned model's click")
        self.write(WIDTH - MARGIN, y, headline, anchor="rm")
        self.write(MARGIN, y + LINE, RULE, GREY)
        for row, title in enumerate(titles):
            self.write(MARGIN, HEADER + row * self.row_height + 24, title)

    def write(self, x, y, text: str, fill=INK, anchor="lm"):
        self.draw.text((x, y), text, fill, FONT, anchor)

    def frame(self, left, top, right, bottom):
        """A black frame, with a white rim that shows on dark ground."""
        self.draw.rectangle((left - 4, top - 4, right + 4, bottom + 4), None, "white", 4)
        self.draw.rectangle((left, top, right, bottom), None, "black", 6)

    def cross(self, x, y):
        for radius, fill, width in ((22, "white", 18), (18, ORANGE, 9)):
            self.draw.line((x - radius, y - radius, x + radius, y + radius), fill, width)
            self.draw.line((x - radius, y + radius, x + radius, y - radius), fill, width)

    def ring(self, x, y):
        """A ring around a dot."""
        self.draw.circle((x, y), 30, None, "white", 18)
        self.draw.circle((x, y), 26, None, BLUE, 9)
        self.draw.circle((x, y), 9, "white")
        self.draw.circle((x, y), 6, BLUE)

    def panel(self, row: int, column: int, picture: Image.Image, target: Box, caption: str, fill=INK, clicks=()):
        """The picture of a screen, with its target and clicks (the base model's, the tuned model's), and a caption."""
        x = MARGIN + column * (self.side + GAP)
        y = HEADER + row * self.row_height + self.title_height
        zoom = self.side / SIZE
        self.image.paste(picture.resize((self.side, self.side)), (x, y))
        left, top, right, bottom = target
        self.frame(x + zoom * left, y + zoom * top, x + zoom * right, y + zoom * bottom)
        for click, mark in zip(clicks, (self.cross, self.ring)):
            if click is not None:  # otherwise the answer is no point
                mark(x + zoom * click[0], y + zoom * click[1])
        self.write(x, y + self.side + 48, caption, fill)

    def answer(self, row: int, column: int, base_answer: Answer, answer: Answer):
        """A panel of two answers to one question, before and after fine-tuning."""
        picture = Image.fromarray(answer.screen.image)
        target = answer.sample["bbox"]
        caption, fill = f"{answer.sample['instruction']}: correct", INK
        if not is_correct(answer):
            caption, fill = f"{answer.sample['instruction']}: wrong", RED
        self.panel(row, column, picture, target, caption, fill, clicks=(base_answer.output, answer.output))


def is_correct(answer: Answer) -> bool:
    """Whether a click hits its target."""
    return is_hit(answer.output, answer.sample["bbox"])


def page_of_answers(base_answers: list[Answer], answers: list[Answer], columns: int, headline: str) -> Image.Image:
    """A panel for each question, with the clicks before and after fine-tuning."""
    page = Page(math.ceil(len(answers) / columns), columns, headline=headline)
    for i, (base_answer, answer) in enumerate(zip(base_answers, answers)):
        row, column = divmod(i, columns)
        page.answer(row, column, base_answer, answer)
    return page.image.reduce(2)


def predictions(base_answers: list[Answer], answers: list[Answer]) -> Image.Image:
    """Eleven of the answers, evenly chosen, and the first one that is wrong, if any is."""
    wrong = [i for i, answer in enumerate(answers) if not is_correct(answer)]
    evenly = [twelfth * len(answers) // 12 for twelfth in range(11)]
    chosen = sorted({*evenly, *wrong[:1]})
    headline = f"{1 - len(wrong) / len(answers):.1%} of {len(answers):,} are correct"
    before = [base_answers[i] for i in chosen]
    after = [answers[i] for i in chosen]
    return page_of_answers(before, after, columns=4, headline=headline)


def moving_picture(film: list) -> list[Image.Image]:
    """The frames of film = [(step, answers), ...], which begins before training."""
    _, base_answers = film[0]
    last_step, _ = film[-1]
    frames = []
    for step, answers in film:
        hits = sum(is_correct(answer) for answer in answers)
        headline = f"step {step:,} of {last_step:,}:  {hits} of {len(answers)} clicks hit"
        frames.append(page_of_answers(base_answers, answers, columns=3, headline=headline))
    return frames


def attention_picture(columns: list[tuple], head_name: str) -> Image.Image:
    """Where a head looks. columns: (base answer, answer, base weights, weights), its attention to visual tokens [P]."""
    before = f"Before fine-tuning: where {head_name} looks (bright), and how much of its attention is on the target"
    titles = before, "After fine-tuning", "The clicks"
    page = Page(3, len(columns), titles)
    for column, (base_answer, answer, base_weights, weights) in enumerate(columns):
        target = answer.sample["bbox"]
        for row, head_weights in enumerate((base_weights, weights)):
            caption = f"{answer.sample['instruction']}: {share_on(target, head_weights):.0%}"
            page.panel(row, column, darken(answer.screen.image, head_weights), target, caption)
        page.answer(2, column, base_answer, answer)
    return page.image.reduce(2)


def share_on(box: Box, weights: torch.Tensor) -> torch.Tensor:
    """How much of attention weights [..., P] is on the patches that this box touches, [...]."""
    side = round(weights.shape[-1] ** 0.5)  # patches in a row
    size = SIZE // side  # of a patch, in pixels
    left, top, right, bottom = box
    grid = weights.unflatten(-1, (side, side))
    rows = slice(top // size, (bottom - 1) // size + 1)
    columns = slice(left // size, (right - 1) // size + 1)
    return grid[..., rows, columns].sum((-2, -1))


def darken(image: np.ndarray, weights: torch.Tensor) -> Image.Image:
    """The picture of a screen, the darker the less a head looks there: weights [P]."""
    side = round(len(weights) ** 0.5)
    shade = 205 - 205 * (weights / weights.max()).sqrt()
    mask = Image.fromarray(shade.byte().view(side, side).cpu().numpy())
    mask = mask.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", mask.size, "#101828"), Image.fromarray(image), mask)


def bars(scores: torch.Tensor, heads: dict) -> str:
    """A bar for each head, layer by layer, scaled to the largest score; selected heads are bracketed."""
    heights = (8 * scores / scores.max()).ceil().int()
    layers = []
    for layer, row in enumerate(heights.tolist()):
        marks = ["▁▁▂▃▄▅▆▇█"[height] for height in row]  # even a head without influence gets a bar
        for head in heads.get(layer, []):
            marks[head] = f"[{marks[head]}]"
        layers.append("".join(marks))
    return " · ".join(layers)


def save(frames: list[Image.Image], path: Path) -> None:
    """Writes a picture; or several as an endless GIF, whose last frame stays for three seconds."""
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)  # few colours make a small file
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [160] * len(others) + [3000]  # milliseconds
    options = {"save_all": len(frames) > 1, "append_images": others, "duration": durations, "loop": 0}
    buffer = io.BytesIO()
    first.save(buffer, path.suffix[1:], optimize=True, **options)
    write_file(path, buffer.getbuffer())
