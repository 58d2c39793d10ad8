"""Draws answers, attention and changes with Pillow, and a bar chart in text: plain data in, images out.

A page is drawn at twice its size and halved at the end, which makes lines smooth: places are in half pixels.
"""

import io
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data.command import write_file
from data.evaluate import Answer
from data.prompts import IMAGE
from data.questions import is_hit
from data.screens import SIZE, Box

BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito's
INK, GREY, RED = "#222222", "#667085", "#b42318"
CHANGES = (36, 76, 150), (40, 130, 205), (86, 180, 233), (255, 240, 190)  # colours, from a small one to a large one
FONT = ImageFont.load_default(56)
LARGE = ImageFont.load_default(72)
LINE = 72  # from one line of text to the next
WIDTH = 3320  # of a page
MARGIN = 52


class Sheet:
    """A white sheet, and what the pictures draw on it."""

    def __init__(self, height: int):
        self.image = Image.new("RGB", (WIDTH, height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def write(self, x, y, text: str, fill=INK, anchor="lm", font=FONT):
        self.draw.text((x, y), text, fill, font, anchor)

    def arrow(self, x, y):
        self.draw.polygon(((x, y - 12), (x + 28, y), (x, y + 12)), ORANGE)

    def frame(self, left, top, right, bottom):
        """A black frame, with a white rim that shows on dark ground."""
        self.draw.rectangle((left - 4, top - 4, right + 4, bottom + 4), None, "white", 4)
        self.draw.rectangle((left, top, right, bottom), None, "black", 6)

    def cross(self, x, y):
        for radius, fill, width in ((22, "white", 18), (18, ORANGE, 9)):
            self.draw.line((x - radius, y - radius, x + radius, y + radius), fill, width)
            self.draw.line((x - radius, y + radius, x + radius, y - radius), fill, width)

    def ring(self, x, y):
        self.draw.circle((x, y), 30, None, "white", 18)
        self.draw.circle((x, y), 26, None, BLUE, 9)
        self.draw.circle((x, y), 9, "white")
        self.draw.circle((x, y), 6, BLUE)


def page(panels: list[tuple], columns: int, headline="", titles=()) -> Image.Image:
    """Screens with a question's target and clicks, row by row, below a legend.

    panels: (picture, sample, verdict, clicks of the base model and of the tuned one). titles: stand above the rows."""
    gap = 48  # between panels
    side = (WIDTH - 2 * MARGIN + gap) // columns - gap  # of a panel
    header = MARGIN + 2 * LINE + 36  # height of the legend and what is free below it
    title_height = LINE if titles else 0
    row_height = title_height + side + LINE + 56
    sheet = Sheet(header + math.ceil(len(panels) / columns) * row_height)
    y = MARGIN + 24  # middle of the legend
    sheet.frame(MARGIN + 16, y - 24, MARGIN + 80, y + 24)
    sheet.write(172, y, "target")
    sheet.cross(438, y)
    sheet.write(492, y, "base model's click")
    sheet.ring(1070, y)
    sheet.write(1124, y, "tuned model's click")
    sheet.write(WIDTH - MARGIN, y, headline, anchor="rm")
    rule = "A click is correct if its point is inside the target, whose right and bottom edges are excluded."
    sheet.write(MARGIN, y + LINE, rule, GREY)
    for row, title in enumerate(titles):
        sheet.write(MARGIN, header + row * row_height + 24, title)

    zoom = side / SIZE
    for i, (picture, sample, verdict, clicks) in enumerate(panels):
        row, column = divmod(i, columns)
        x = MARGIN + column * (side + gap)
        y = header + row * row_height + title_height
        sheet.image.paste(picture.resize((side, side)), (x, y))
        left, top, right, bottom = sample["bbox"]
        sheet.frame(x + zoom * left, y + zoom * top, x + zoom * right, y + zoom * bottom)
        for click, mark in zip(clicks, (sheet.cross, sheet.ring)):
            if click is not None:  # otherwise the answer is no point
                mark(x + zoom * click[0], y + zoom * click[1])
        caption = f"{sample['instruction']}: {verdict}"
        sheet.write(x, y + side + 48, caption, RED if verdict == "wrong" else INK)
    return sheet.image.reduce(2)


def is_correct(answer: Answer) -> bool:
    """Whether a click hits its target."""
    return is_hit(answer.output, answer.sample["bbox"])


def clicks_panel(base_answer: Answer, answer: Answer) -> tuple:
    """The clicks before and after fine-tuning."""
    verdict = "correct" if is_correct(answer) else "wrong"
    return Image.fromarray(answer.screen.image), answer.sample, verdict, (base_answer.output, answer.output)


def attention_panel(answer: Answer, weights: torch.Tensor) -> tuple:
    """A screen, darker where a head looks less, and the share of its attention on the target. weights: [side, side]."""
    shade = 205 - 205 * (weights / weights.max()).sqrt()
    mask = Image.fromarray(shade.byte().cpu().numpy()).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    picture = Image.composite(Image.new("RGB", mask.size, "#101828"), Image.fromarray(answer.screen.image), mask)
    return picture, answer.sample, f"{share_on(answer.sample['bbox'], weights):.0%}", ()


def share_on(box: Box, weights: torch.Tensor) -> torch.Tensor:
    """How much of attention weights [..., side, side] is on the patches that this box touches, [...]."""
    size = SIZE // weights.shape[-1]  # of a patch, in pixels
    left, top, right, bottom = box
    rows = slice(top // size, (bottom - 1) // size + 1)
    columns = slice(left // size, (right - 1) // size + 1)
    return weights[..., rows, columns].sum((-2, -1))


def predictions(base_answers: list[Answer], answers: list[Answer]) -> Image.Image:
    """Eleven of the answers, evenly chosen, and the first one that is wrong, if any is."""
    wrong = [i for i, answer in enumerate(answers) if not is_correct(answer)]
    evenly = [twelfth * len(answers) // 12 for twelfth in range(11)]
    panels = [clicks_panel(base_answers[i], answers[i]) for i in sorted({*evenly, *wrong[:1]})]
    return page(panels, 4, f"{1 - len(wrong) / len(answers):.1%} of {len(answers):,} are correct")


def changes(values: torch.Tensor, queries: torch.Tensor, heads: dict, tokens: list, screen: np.ndarray) -> Image.Image:
    """How far each head's value [L, H, T] and query [L, H_q, T] at each token has moved, relative to the base's.

    heads: the selected ones, {layer: [head, ...]}. tokens: <bos>, some words, an image's placeholders, a question."""
    row, gap, top = 28, 20, 600  # height of a head, space between layers, where the first layer begins
    start = tokens.index(IMAGE)
    end = start + tokens.count(IMAGE)
    left = 1208  # edge of the image's tokens
    spans = [(slice(start), 384, 760), (slice(start, end), left, 1600), (slice(end, None), 2860, 408)]
    height_of_layer = (values.shape[1] + queries.shape[1]) * row + 2 * gap  # in both parts
    sheet = Sheet(top + len(values) * height_of_layer + 2 * MARGIN)

    # The title and the legend
    y = MARGIN + 36
    sheet.write(MARGIN, y, "What fine-tuning changes", font=LARGE)
    sheet.draw.rectangle((left, y - 26, left + 80, y + 26), "black")
    sheet.write(left + 104, y, "exactly 0")
    sheet.write(1790, y, "3%", anchor="rm")
    sheet.image.paste(shades(torch.logspace(-1.5, 0.5, 500)[None]).resize((500, 52)), (1814, y - 26))
    sheet.write(2338, y, "300% of the base")
    sheet.arrow(2880, y)
    sheet.write(2930, y, "selected head")

    # The prompt
    y = 216
    for (part, x, width), name in zip(spans, ("words", "image", "question")):
        sheet.write(x, y, name, font=LARGE)
        words = " ".join(token for token in tokens[part] if token[0] != "<") or "patches, row by row"
        for line, text in enumerate(textwrap.wrap(words, 27), 1):
            sheet.write(x, y + line * LINE + 8, text, GREY)
        sheet.draw.line((x, top - 14, x + width, top - 14), GREY, 4)
    sheet.image.paste(Image.fromarray(screen).resize((340, 340)), (left + 560, y - 36))
    rows_of_patches = np.concatenate(np.split(screen, 8), axis=1)
    sheet.image.paste(Image.fromarray(rows_of_patches).resize((1600, 25)), (left, top - 46))

    # The changes
    y = top
    for name, moves, selected in (("values", values, heads), ("queries", queries, {})):
        height = row * moves.shape[1]
        middle = y + (len(moves) * (height + gap) - gap) / 2
        upwards = ImageFont.TransposedFont(LARGE, Image.Transpose.ROTATE_90)
        title = f"{name} of {moves.shape[1]} heads"
        sheet.draw.text((MARGIN, middle - LARGE.getlength(title) / 2), title, INK, upwards)
        for layer, moves_of_layer in enumerate(moves):
            sheet.write(364, y + height / 2, f"layer {layer}", anchor="rm")
            for part, x, width in spans:
                cells = shades(moves_of_layer[:, part])
                sheet.image.paste(cells.resize((width, height), Image.Resampling.NEAREST), (x, y))
            for head in selected.get(layer, []):
                sheet.arrow(left - 36, y + row * (head + 0.5))
            y += height + gap
        y += MARGIN
    return sheet.image.reduce(2)


def shades(moves: torch.Tensor) -> Image.Image:
    """Black where nothing has moved, otherwise a colour that says how far, on a logarithmic scale from 3 to 300 %."""
    moves = moves.cpu().numpy()
    places = np.linspace(-1.5, 0.5, len(CHANGES))
    channels = [np.interp(np.log10(moves.clip(1e-9)), places, channel) for channel in zip(*CHANGES)]
    colours = np.stack(channels, -1) * (moves > 0)[..., None]
    return Image.fromarray(colours.astype(np.uint8))


def bars(scores: torch.Tensor, heads: dict) -> str:
    """A bar for each head, layer by layer, scaled to the largest score; selected heads are bracketed."""
    heights = (8 * scores / scores.max()).ceil().int()
    marks = [["▁▁▂▃▄▅▆▇█"[height] for height in row] for row in heights]  # even without influence, a head gets a bar
    for layer, selected in heads.items():
        for head in selected:
            marks[layer][head] = f"[{marks[layer][head]}]"
    return " · ".join(map("".join, marks))


def save(frames: list[Image.Image], path: Path) -> None:
    """Writes a picture; or several as an endless GIF, whose last frame stays for three seconds."""
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)  # few colours make a small file
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    if not others:
        first = palette  # With a given palette, quantize rounds colours, black and white among them.
    durations = [160] * len(others) + [3000]  # milliseconds
    buffer = io.BytesIO()
    options = {"optimize": True, "save_all": True, "append_images": others, "duration": durations, "loop": 0}
    first.save(buffer, path.suffix[1:], **options)
    write_file(path, buffer.getbuffer())
