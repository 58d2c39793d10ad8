"""Frames of a film, drawn with Pillow: rows of screens, and beside each the question and the answer."""

import io
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.command import write_file
from data.evaluate import Answer
from data.pictures import INK, RED, is_right, picture_of

FONT = ImageFont.load_default(28)
LINE = 36  # from one line of text to the next
WIDTH = 1660
MARGIN = 26
SIDE = 260  # of a screen
MARKS = "frame: target · orange cross: base model's click · blue ring: tuned model's click"


def film_frame(rows: dict[str, tuple], headline: str) -> Image.Image:
    """Rows of three screens below a legend.

    rows: {title: pairs of the base model's answer and the tuned one's}"""
    header = MARGIN + LINE + 18
    row_height = LINE + SIDE + 28
    image = Image.new("RGB", (WIDTH, header + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN + 12), MARKS, INK, FONT, "lm")
    draw.text((WIDTH - MARGIN, MARGIN + 12), headline, INK, FONT, "rm")
    for row, (title, pairs) in enumerate(rows.items()):
        y = header + row * row_height
        draw.text((MARGIN, y + 12), title, INK, FONT, "lm")
        for column, (base_answer, answer) in enumerate(pairs):
            x = MARGIN + column * (WIDTH - 2 * MARGIN) // 3
            image.paste(picture_of(base_answer, answer, SIDE), (x, y + LINE))
            x += SIDE + 16
            ink = INK if is_right(answer) else RED
            draw.text((x, y + LINE), textwrap.fill(answer.sample["instruction"], 18), INK, FONT, spacing=8)
            draw.text((x, y + 4 * LINE), verdict(answer), ink, FONT, spacing=8)
    return image


def verdict(answer: Answer) -> str:
    """Of a click, whether it is correct; otherwise the name that was answered and, if it is wrong, the correct one."""
    if "bbox" in answer.sample:
        return "correct" if is_right(answer) else "wrong"
    return answer.output if is_right(answer) else f"{answer.output or 'nothing'},\nnot {answer.sample['answer']}"


def save_film(frames: list[Image.Image], path: Path) -> None:
    """Writes an endless GIF, whose first frame stays for one second and its last for three."""
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)  # few colours make a small file
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [1000] + [160] * (len(others) - 1) + [3000]  # milliseconds
    buffer = io.BytesIO()
    options = {"optimize": True, "save_all": True, "append_images": others, "duration": durations, "loop": 0}
    first.save(buffer, "gif", **options)
    write_file(path, buffer.getbuffer())
