"""Draws answers with Pillow, and a bar chart in text: plain data in, images out.

A page is drawn at twice its size and halved at the end, which makes lines smooth: places are in half pixels.
"""

import io
import math
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from data.command import write_file
from data.evaluate import Answer
from data.questions import is_hit
from data.screens import SIZE

BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito's
INK, GREY, RED = "#222222", "#667085", "#b42318"
FONT = ImageFont.load_default(56)
LINE = 72  # from one line of text to the next
WIDTH = 3320  # of a page
MARGIN = 52


def draw_frame(draw: ImageDraw.ImageDraw, left, top, right, bottom) -> None:
    """A black frame, with a white rim that shows on dark ground."""
    draw.rectangle((left - 4, top - 4, right + 4, bottom + 4), None, "white", 4)
    draw.rectangle((left, top, right, bottom), None, "black", 6)


def draw_cross(draw: ImageDraw.ImageDraw, x, y) -> None:
    for radius, fill, width in ((22, "white", 18), (18, ORANGE, 9)):
        draw.line((x - radius, y - radius, x + radius, y + radius), fill, width)
        draw.line((x - radius, y + radius, x + radius, y - radius), fill, width)


def draw_ring(draw: ImageDraw.ImageDraw, x, y) -> None:
    draw.circle((x, y), 30, None, "white", 18)
    draw.circle((x, y), 26, None, BLUE, 9)
    draw.circle((x, y), 9, "white")
    draw.circle((x, y), 6, BLUE)


def draw_legend(draw: ImageDraw.ImageDraw, headline: str) -> None:
    """The marks of a page with their names, and what stands right of them."""
    y = MARGIN + 24  # its middle
    draw_frame(draw, MARGIN + 16, y - 24, MARGIN + 80, y + 24)
    draw_cross(draw, 438, y)
    draw_ring(draw, 1070, y)
    for x, words in ((172, "target"), (492, "base model's click"), (1124, "tuned model's click")):
        draw.text((x, y), words, INK, FONT, "lm")
    draw.text((WIDTH - MARGIN, y), headline, INK, FONT, "rm")


def draw_answer(image: Image.Image, x: int, y: int, side: int, base_answer: Answer, answer: Answer) -> None:
    """The screen of an answer; of a click also the target, and where the base model and the tuned one clicked."""
    image.paste(Image.fromarray(answer.screen.image).resize((side, side)), (x, y))
    if "bbox" not in answer.sample:
        return
    draw = ImageDraw.Draw(image)
    zoom = side / SIZE
    left, top, right, bottom = answer.sample["bbox"]
    draw_frame(draw, x + zoom * left, y + zoom * top, x + zoom * right, y + zoom * bottom)
    for click, draw_mark in ((base_answer.output, draw_cross), (answer.output, draw_ring)):
        if click is not None:  # otherwise the answer is no point
            draw_mark(draw, x + zoom * click[0], y + zoom * click[1])


def page(base_answers: list[Answer], answers: list[Answer], columns: int, headline: str) -> Image.Image:
    """Clicks on screens below a legend."""
    gap = 48  # between screens
    side = (WIDTH - 2 * MARGIN + gap) // columns - gap  # of a screen
    header = MARGIN + 2 * LINE + 36  # height of the legend and what is free below it
    row_height = side + LINE + 56
    image = Image.new("RGB", (WIDTH, header + math.ceil(len(answers) / columns) * row_height), "white")
    draw = ImageDraw.Draw(image)
    draw_legend(draw, headline)
    rule = "A click is correct if its point is inside the target, whose right and bottom edges are excluded."
    draw.text((MARGIN, MARGIN + 24 + LINE), rule, GREY, FONT, "lm")
    for i, (base_answer, answer) in enumerate(zip(base_answers, answers)):
        row, column = divmod(i, columns)
        x = MARGIN + column * (side + gap)
        y = header + row * row_height
        draw_answer(image, x, y, side, base_answer, answer)
        verdict, ink = ("correct", INK) if is_right(answer) else ("wrong", RED)
        draw.text((x, y + side + 48), f"{answer.sample['instruction']}: {verdict}", ink, FONT, "lm")
    return image.reduce(2)


def film_frame(rows: dict[str, tuple], headline: str) -> Image.Image:
    """Rows of three screens below a legend, their questions and answers beside them.

    rows: {title: pairs of the base model's answer and the tuned one's}"""
    side = 520  # of a screen
    header = MARGIN + LINE + 36
    row_height = LINE + side + 56
    image = Image.new("RGB", (WIDTH, header + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(image)
    draw_legend(draw, headline)
    for row, (title, pairs) in enumerate(rows.items()):
        y = header + row * row_height
        draw.text((MARGIN, y + 24), title, INK, FONT, "lm")
        for column, (base_answer, answer) in enumerate(pairs):
            x = MARGIN + column * (WIDTH - 2 * MARGIN) // 3
            draw_answer(image, x, y + LINE, side, base_answer, answer)
            x += side + 32
            ink = INK if is_right(answer) else RED
            draw.text((x, y + LINE), textwrap.fill(answer.sample["instruction"], 18), INK, FONT, spacing=16)
            draw.text((x, y + 4 * LINE), verdict(answer), ink, FONT, spacing=16)
    return image.reduce(2)


def verdict(answer: Answer) -> str:
    """Of a click, whether it is correct; otherwise the name that was answered and, if it is wrong, the correct one."""
    if "bbox" in answer.sample:
        return "correct" if is_right(answer) else "wrong"
    return answer.output if is_right(answer) else f"{answer.output or 'nothing'},\nnot {answer.sample['answer']}"


def is_right(answer: Answer) -> bool:
    """Whether a click hits its target, or a name is the correct one."""
    if "bbox" in answer.sample:
        return is_hit(answer.output, answer.sample["bbox"])
    return answer.output == answer.sample["answer"]


def predictions(base_answers: list[Answer], answers: list[Answer]) -> Image.Image:
    """Eleven of the answers, evenly chosen, and the first one that is wrong, if any is."""
    wrong = [i for i, answer in enumerate(answers) if not is_right(answer)]
    evenly = [twelfth * len(answers) // 12 for twelfth in range(11)]
    shown = sorted({*evenly, *wrong[:1]})
    headline = f"{1 - len(wrong) / len(answers):.1%} of {len(answers):,} are correct"
    return page([base_answers[i] for i in shown], [answers[i] for i in shown], 4, headline)


def bars(scores: torch.Tensor, heads: dict) -> str:
    """A bar for each head, layer by layer, scaled to the largest score; selected heads are bracketed."""
    heights = (8 * scores / scores.max()).ceil().int()
    marks = [["▁▁▂▃▄▅▆▇█"[height] for height in row] for row in heights]  # even without influence, a head gets a bar
    for layer, selected in heads.items():
        for head in selected:
            marks[layer][head] = f"[{marks[layer][head]}]"
    return " · ".join(map("".join, marks))


def save(frames: list[Image.Image], path: Path) -> None:
    """Writes a picture; or several as an endless GIF, whose first frame stays for one second and its last for three."""
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)  # few colours make a small file
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    if not others:
        first = palette  # With a given palette, quantize rounds colours, black and white among them.
    durations = [160] * len(others) + [3000]  # milliseconds
    if others:
        durations[0] = 1000
    buffer = io.BytesIO()
    options = {"optimize": True, "save_all": True, "append_images": others, "duration": durations, "loop": 0}
    first.save(buffer, path.suffix[1:], **options)
    write_file(path, buffer.getbuffer())
