"""Every picture, drawn with Pillow: plain data in, images out; and a bar chart in text.

Places on a page are in units of half a pixel of the finished picture: a page is drawn at twice its size and halved at
the end, which makes it smooth. A picture is shown at about half of its size, so that it is sharp on good screens.
"""

import io
import math
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from data.screens import SIZE, Box, is_hit
from imagelora import safe_write

BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe and Ito's
INK, GREY, PALE = "#222222", "#667085", "#e4e7ec"
FONT = ImageFont.load_default(56)
WIDTH = 3320  # of a page
MARGIN = 52  # left and right of everything on it
LINE = 80  # from one line of text to the next
FIRST_LINE = 72  # where the legend stands
HEADER = FIRST_LINE + 2 * LINE + 32  # height of the legend and the rule below it
GAP = 48  # between panels
CAPTION = 152  # height of the text below a panel
INSET = 300  # width and height of an enlarged part of a screen
INSET_PIXELS = 24  # width and height of that part, in pixels of the screen
RULE = "A click is correct if the centre of its mark is inside the target, whose right and bottom edges are excluded."


class Panel(NamedTuple):
    """A screen, what is marked on it, and what is written below it."""

    picture: Image.Image
    target: Box
    caption: str = ""
    base_click: tuple | None = None  # x, y in pixels of the screen
    click: tuple | None = None
    verdict: bool | None = None  # whether `click` is correct; None: the panel does not say


class Example(NamedTuple):
    """Where a head looks while one question is answered."""

    base_answer: tuple  # (screen, sample, click) before and after fine-tuning
    answer: tuple
    base_weights: torch.Tensor  # its attention to the visual tokens, [P], before and after
    weights: torch.Tensor
    base_note: str  # what is written below the two
    note: str


class Page(ImageDraw.ImageDraw):
    """A white page and the pen for it."""

    def __init__(self, height: int):
        self.image = Image.new("RGB", (WIDTH, height), "white")
        super().__init__(self.image)

    def write(self, x, y, text: str, fill=INK, anchor="lm"):
        self.text((x, y), text, fill, FONT, anchor)

    def target(self, left, top, right, bottom):
        """A black frame inside of this box, with a white rim around it that shows on dark ground."""
        self.rectangle((left - 4, top - 4, right + 4, bottom + 4), None, "white", 4)
        self.rectangle((left, top, right, bottom), None, "black", 6)

    def click(self, x, y, tuned: bool):
        """A mark with a white rim: a cross for the base's click, a ring around a dot for the tuned model's."""
        for radius, fill, width in ((22, "white", 18), (18, BLUE if tuned else ORANGE, 9)):
            if tuned:
                self.circle((x, y), radius + 8, None, fill, width)
            else:
                for rise in (radius, -radius):
                    self.line((x - radius, y - rise, x + radius, y + rise), fill, width)
        if tuned:
            self.circle((x, y), 9, "white")
            self.circle((x, y), 6, BLUE)

    def legend(self, tuned_label="after fine-tuning", headline=""):
        """What the marks mean, and when a click is correct; a headline at the right."""
        self.target(68, FIRST_LINE - 24, 132, FIRST_LINE + 24)
        self.write(172, FIRST_LINE, "target")
        self.click(438, FIRST_LINE, tuned=False)
        self.write(492, FIRST_LINE, "base model's click")
        self.click(1070, FIRST_LINE, tuned=True)
        self.write(1124, FIRST_LINE, tuned_label)
        self.write(WIDTH - MARGIN, FIRST_LINE, headline, anchor="rm")
        self.write(MARGIN, FIRST_LINE + LINE, RULE, GREY)

    def screen(self, panel: Panel, x, y, side, corner=(0, 0), num_pixels=SIZE):
        """The screen of a panel with its marks at (x, y), or the part of it that has this corner and so many pixels."""
        zoom = side / num_pixels
        left, top = corner
        part = panel.picture.crop((left, top, left + num_pixels, top + num_pixels))
        self.image.paste(part.resize((side, side)), (round(x), round(y)))
        target_left, target_top, target_right, target_bottom = panel.target
        self.target(
            x + zoom * (target_left - left),
            y + zoom * (target_top - top),
            x + zoom * (target_right - left),
            y + zoom * (target_bottom - top),
        )
        for click, tuned in ((panel.base_click, False), (panel.click, True)):
            if click and left <= click[0] <= left + num_pixels and top <= click[1] <= top + num_pixels:
                self.click(x + zoom * (click[0] - left), y + zoom * (click[1] - top), tuned)

    def inset(self, panel: Panel, x, y, side):
        """The target enlarged, in the corner of the panel that is farthest from it."""
        left, top, right, bottom = panel.target
        centre_x, centre_y = (left + right) // 2, (top + bottom) // 2
        inset_x = x if centre_x > SIZE / 2 else x + side - INSET
        inset_y = y if centre_y > SIZE / 2 else y + side - INSET
        corner = (centre_x - INSET_PIXELS // 2, centre_y - INSET_PIXELS // 2)
        self.screen(panel, inset_x, inset_y, INSET, corner, INSET_PIXELS)
        self.rectangle((inset_x - 6, inset_y - 6, inset_x + INSET + 6, inset_y + INSET + 6), None, INK, 6)

    def panel(self, panel: Panel, x, y, side):
        """A panel at (x, y). If the click is wrong but near the target, an inset shows why."""
        self.screen(panel, x, y, side)
        if panel.verdict is False and is_near(panel.click, panel.target):
            self.inset(panel, x, y, side)
        below = y + side + 64
        self.write(x, below, panel.caption)
        if panel.verdict is not None:
            label, ink, fill = ("correct", INK, PALE) if panel.verdict else ("wrong", "white", INK)
            end = x + side
            self.rounded_rectangle((end - 240, below - 38, end, below + 42), 16, fill)
            self.write(end - 120, below, label, ink, "mm")


def is_near(click: tuple | None, target: Box) -> bool:
    """Whether an inset around this target would show the click."""
    if click is None:
        return False
    left, top, right, bottom = target
    reach = INSET_PIXELS // 2
    return abs(click[0] - (left + right) // 2) <= reach and abs(click[1] - (top + bottom) // 2) <= reach


def answer_panel(base_answer: tuple, answer: tuple) -> Panel:
    """Two answers (screen, sample, click) to the same question, before and after fine-tuning, as a panel."""
    screen, sample, click = answer
    target = sample["bbox"]
    picture = Image.fromarray(screen.image)
    return Panel(picture, target, sample["instruction"], base_answer[2], click, is_hit(click, target))


def page_of_panels(panels: list[Panel], columns: int, header: int) -> Page:
    """Panels in columns, below a header of this height that is still empty."""
    side = (WIDTH - 2 * MARGIN + GAP) // columns - GAP
    rows = math.ceil(len(panels) / columns)
    page = Page(header + rows * (side + CAPTION))
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        page.panel(panel, MARGIN + column * (side + GAP), header + row * (side + CAPTION), side)
    return page


def predictions(base_answers: list, answers: list) -> Image.Image:
    """Twelve of the answers (screen, sample, click) before and after: as large a share of them is wrong as of all, but
    at least one."""
    panels = [answer_panel(before, after) for before, after in zip(base_answers, answers)]
    order = sorted(range(len(panels)), key=lambda i: panels[i].verdict)  # wrong ones first
    chosen = {order[0]}
    for twelfth in range(1, 12):
        chosen.add(order[(2 * twelfth + 1) * len(panels) // 24])  # the middle one of each twelfth
    share = sum(panel.verdict for panel in panels) / len(panels)
    page = page_of_panels([panels[i] for i in sorted(chosen)], 4, HEADER)
    page.legend(headline=f"{share:.1%} of {len(panels):,} are correct")
    return page.image.reduce(2)


def is_filmed(step: int, steps: int) -> bool:
    """Whether the moving picture shows this step: two frames in three are of the first quarter, where clicks move."""
    most = 96 if 4 * step < steps else 16
    return step % (steps // most + 1) == 0


def moving_picture(film: list) -> list[Image.Image]:
    """The frames of film = [(step, [(screen, sample, click), ...]), ...], which begins before training."""
    _, base_answers = film[0]
    last_step, _ = film[-1]
    frames = []
    for step, answers in film:
        panels = [answer_panel(before, after) for before, after in zip(base_answers, answers)]
        hits = sum(panel.verdict for panel in panels)
        page = page_of_panels(panels, 3, HEADER)
        page.legend("click now", f"step {step:,} of {last_step:,}:  {hits} of {len(panels)} clicks hit")
        page.rectangle((MARGIN, HEADER - 40, MARGIN + (WIDTH - 2 * MARGIN) * step / last_step, HEADER - 24), BLUE)
        picture = page.image.reduce(2)
        frames.append(picture.point(lambda value: value if value < 250 else 255))
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=1)  # few colours, so that white stays white
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def attention_picture(examples: list[Example], head: str, text: list[str]) -> Image.Image:
    """Where a head looks, a row for each example. head: its name. text: lines below the legend."""
    panels = []
    for example in examples:
        panel = answer_panel(example.base_answer, example.answer)
        panels.append(Panel(panel.picture, panel.target, panel.caption))
        panels.append(Panel(darkened(panel.picture, example.base_weights), panel.target, example.base_note))
        panels.append(Panel(darkened(panel.picture, example.weights), panel.target, example.note))
        panels.append(panel)
    header = HEADER + (len(text) + 1) * LINE + 64
    page = page_of_panels(panels, 4, header)
    page.legend()
    for i, line in enumerate(text, 2):
        page.write(MARGIN, FIRST_LINE + i * LINE, line)
    step = (WIDTH - 2 * MARGIN + GAP) // 4
    for i, title in enumerate(("the question", "before", "after fine-tuning", "the click")):
        page.write(MARGIN + i * step, header - 48, title)
    x = MARGIN + step
    page.write(
        x, header - 48 - 96, f"where {head} looks, from the question's last token (bright; scaled in each panel)"
    )
    page.line((x, header - 96, x + 2 * step - GAP, header - 96), GREY, 4)
    return page.image.reduce(2)


def darkened(picture: Image.Image, weights: torch.Tensor) -> Image.Image:
    """The picture of a screen, the darker the less a head looks there: weights [P]."""
    side = round(len(weights) ** 0.5)
    shade = 205 - 205 * (weights / weights.max()).sqrt()
    shade = shade.byte().reshape(side, side).cpu()
    mask = Image.fromarray(shade.numpy()).resize(picture.size, Image.Resampling.NEAREST)
    dark = Image.new("RGB", picture.size, "#101828")
    return Image.composite(dark, picture, mask)


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
    """Writes a picture; or several as an endless GIF, whose last frame stays for three seconds."""
    first, *others = frames
    options = {}
    if others:
        durations = [160] * len(others) + [3000]  # milliseconds
        options = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    buffer = io.BytesIO()
    first.save(buffer, path.suffix[1:], optimize=True, **options)
    safe_write(buffer.getbuffer(), path)
