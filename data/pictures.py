"""Draws clicks with Pillow: the target's frame, the base model's click in orange, the tuned model's in blue."""

import io
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.command import write_file
from data.evaluate import Answer, is_right
from data.screens import SIZE

BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito's
INK, RED = "#222222", "#b42318"
COLUMNS = 4  # of a page
SIDE = 400  # pixels of a screen there
LINE = 40  # pixels from one line of text to the next


def picture_of(base_answer: Answer, answer: Answer) -> Image.Image:
    """A screen, its target's frame, a cross where the base model clicked, and a ring where the tuned one did."""
    image = Image.fromarray(answer.screen.image).resize((SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    zoom = SIDE / SIZE
    draw.rectangle([zoom * edge for edge in answer.sample["bbox"]], None, "black", 3)
    if base_answer.output is not None:  # otherwise the answer is no point
        x, y = (zoom * place for place in base_answer.output)
        draw.line((x - 9, y - 9, x + 9, y + 9), ORANGE, 5)
        draw.line((x - 9, y + 9, x + 9, y - 9), ORANGE, 5)
    if answer.output is not None:
        draw.circle([zoom * place for place in answer.output], 13, None, BLUE, 5)
    return image


def save_predictions(base_answers: list[Answer], answers: list[Answer], path: Path) -> None:
    """Eleven of the answers, evenly chosen, and the first one that is wrong, if any is. Below each is its question."""
    wrong = [i for i, answer in enumerate(answers) if not is_right(answer)]
    evenly = [twelfth * len(answers) // 12 for twelfth in range(11)]
    shown = sorted({*evenly, *wrong[:1]})
    num_rows = math.ceil(len(shown) / COLUMNS)
    page = Image.new("RGB", (COLUMNS * SIDE, num_rows * (SIDE + LINE)), "white")
    draw = ImageDraw.Draw(page)
    for place, i in enumerate(shown):
        row, column = divmod(place, COLUMNS)
        x, y = column * SIDE, row * (SIDE + LINE)
        page.paste(picture_of(base_answers[i], answers[i]), (x, y))
        verdict, ink = ("wrong", RED) if i in wrong else ("correct", INK)
        words = f"{answers[i].sample['instruction']}: {verdict}"
        draw.text((x + SIDE // 2, y + SIDE + LINE // 2), words, ink, ImageFont.load_default(LINE // 2), "mm")
    buffer = io.BytesIO()
    page.quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1).save(buffer, "png", optimize=True)
    write_file(path, buffer.getbuffer())
