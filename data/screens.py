"""Synthetic screens for GUI grounding, drawn with Pillow: 128 x 128 pixels, text buttons and icons. Domains:

old    elements anywhere; the only domain whose questions the base model is pretrained on
new    each line has a name and, anywhere to its right, a switch; the correct click is on the *switch*
dark   elements anywhere, in dark colours, shown to the vision tower in random tints and used for nothing else
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Keep the order: the position of a split is part of the random seed of its samples.
SPLITS = ("train", "validation", "test", "pretrain")
SIZE = 128  # pixels, width and height of a screen
LABELS = "wifi sound light sync lock mail maps news photo clock files music games notes home help".split()
ICONS = "circle square triangle star heart plus moon arrow".split()
COLOURS = "red yellow green blue purple brown".split()
LIGHT = dict(zip(COLOURS, "#dc2828 #e6b40a #28a046 #2864e6 #9637c8 #8c5528".split()))
DARK = dict(zip(COLOURS, "#ff6e64 #ffe16e #78e68c #78aaff #d28cff #c8966e".split()))
SWITCH = (16, 10)  # pixels, width and height of a switch
GAP = 6  # pixels between a name and its switch, at least
SCALE = 4  # elements are drawn this much larger, then averaged down
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive


def place_freely(rng, sizes: list[tuple]) -> list[Box] | None:
    """Random boxes, 3 pixels or more apart, or None after too many attempts."""
    boxes = []
    taken = np.zeros((SIZE, SIZE), bool)
    for width, height in sizes:
        for _ in range(40):
            x = int(rng.integers(1, SIZE - width))
            y = int(rng.integers(1, SIZE - height))
            if not taken[max(y - 3, 0) : y + height + 3, max(x - 3, 0) : x + width + 3].any():
                break
        else:
            return None
        taken[y : y + height, x : x + width] = True
        boxes.append((x, y, x + width, y + height))
    return boxes


def place_in_lines(rng, sizes: list[tuple]) -> list[Box]:
    """A box for each line. It starts near the left edge, and ends anywhere beyond its least width."""
    line_height = SIZE // len(sizes)
    boxes = []
    for line, (width, height) in enumerate(sizes):
        x = int(rng.integers(1, 9))
        y = line * line_height + int(rng.integers(1, line_height - height))
        right = int(rng.integers(x + width, SIZE))
        boxes.append((x, y, right, y + height))
    return boxes


class Domain(NamedTuple):
    number: int  # part of the random seed of its screens
    background: str
    button: str
    text: str
    icons: dict[str, str]  # name of a colour -> the colour that is drawn
    num_names: tuple[int, int] = (5, 7)  # on a screen, least and most
    switches: bool = False  # whether names are in lines, each with a switch


_LIGHT_SCREEN = "#f5f6f8", "#dfe3ea", "#1e2430", LIGHT  # background, button, text, icons
DOMAINS = {
    "old": Domain(0, *_LIGHT_SCREEN),
    "new": Domain(2, *_LIGHT_SCREEN, num_names=(4, 5), switches=True),
    "dark": Domain(5, "#14171c", "#303743", "#eef1f6", DARK),
}


@dataclass(frozen=True)
class Element:
    name: str  # one of LABELS or ICONS, or "switch"
    colour: str  # of an icon; "" for text
    bbox: Box  # where it is drawn
    click: Box | None  # where a click on it is correct; None for a switch, which is never asked for

    def full_name(self) -> str:
        return f"{self.colour} {self.name}".strip()


@dataclass(frozen=True, eq=False)
class Screen:
    image: np.ndarray  # [SIZE, SIZE, 3] uint8
    elements: tuple[Element, ...]

    def targets(self) -> list[Element]:
        """The elements that questions ask for."""
        return [element for element in self.elements if element.click]


@cache
def _outlines() -> dict[str, np.ndarray]:
    """The corners [N, 2] of each icon on the unit square."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    star_angle = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    star_radius = np.resize((1.0, 0.42), 10)
    heart_y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    outer_arc = np.linspace(-2.5, 2.5, 32)  # the moon's two arcs
    inner_arc = np.linspace(1.9, -1.9, 32)
    moon_x = np.append(-np.cos(outer_arc), 0.45 - 0.85 * np.cos(inner_arc))
    moon_y = np.append(np.sin(outer_arc), 0.66 * np.sin(inner_arc))
    curves = {  # x and y from -1 to 1, y upwards
        "circle": (np.sin(angle), np.cos(angle)),
        "star": (star_radius * np.sin(star_angle), star_radius * np.cos(star_angle)),
        "heart": (np.sin(angle) ** 3, heart_y / 15 + 0.1),
        "moon": (moon_x, moon_y),
    }
    polygons = {  # x and y of each corner in percent, y downwards
        "square": "10 10 90 10 90 90 10 90",
        "triangle": "50 3 100 95 0 95",
        "plus": "34 0 66 0 66 34 100 34 100 66 66 66 66 100 34 100 34 66 0 66 0 34 34 34",
        "arrow": "0 34 50 34 50 4 100 50 50 96 50 66 0 66",
    }
    outlines = {name: np.stack([0.5 + 0.5 * x, 0.5 - 0.5 * y], 1) for name, (x, y) in curves.items()}
    for name, corners in polygons.items():
        outlines[name] = np.array(corners.split(), float).reshape(-1, 2) / 100
    return outlines


@cache
def _button(label: str, font_size: int, domain_name: str) -> Image.Image:
    """The RGBA picture of a text button."""
    domain = DOMAINS[domain_name]
    font = ImageFont.load_default(font_size * SCALE)
    width, height = round(font.getlength(label) / SCALE) + 8, font_size + 5
    sprite = Image.new("RGBA", (width * SCALE, height * SCALE))
    draw = ImageDraw.Draw(sprite)
    corners = (0, 0, sprite.width - 1, sprite.height - 1)
    draw.rounded_rectangle(corners, 3 * SCALE, domain.button, domain.button, SCALE)
    draw.text((sprite.width / 2, sprite.height / 2), label, fill=domain.text, font=font, anchor="mm")
    return sprite.resize((width, height), Image.Resampling.BOX)


@cache
def _icon(shape: str, colour: str, side: int, domain_name: str) -> Image.Image:
    """The RGBA picture of an icon."""
    fill = DOMAINS[domain_name].icons[colour]
    sprite = Image.new("RGBA", (side * SCALE, side * SCALE))
    corners = _outlines()[shape] * (sprite.width - 1, sprite.height - 1)
    ImageDraw.Draw(sprite).polygon(corners.flatten().tolist(), fill, fill, width=6)
    return sprite.resize((side, side), Image.Resampling.BOX)


@cache
def _switch(is_on: bool) -> Image.Image:
    """The RGBA picture of a switch, whose knob is at the right if it is on."""
    width, height = SWITCH
    sprite = Image.new("RGBA", (width * SCALE, height * SCALE))
    draw = ImageDraw.Draw(sprite)
    track = "#3c4657" if is_on else "#b4bac4"
    draw.rounded_rectangle((0, 0, sprite.width - 1, sprite.height - 1), sprite.height // 2, fill=track)
    x = sprite.width - sprite.height if is_on else 0
    draw.ellipse((x + SCALE, SCALE, x + sprite.height - SCALE, sprite.height - SCALE), fill="#ffffff")
    return sprite.resize((width, height), Image.Resampling.BOX)


def _random_items(rng, count: int) -> list[tuple]:
    """`count` items (name, colour, size), half of them texts. No text occurs twice, and no icon twice in one colour.

    Icons are of three shapes only, so that a shape alone is often ambiguous."""
    texts = rng.choice(len(LABELS), count // 2, replace=False)
    shapes = rng.permutation(len(ICONS))[:3]
    pairs = rng.choice(len(shapes) * len(COLOURS), count - count // 2, replace=False)
    items = [(LABELS[i], "", int(rng.integers(11, 13))) for i in texts]
    for pair in pairs:
        shape, colour = divmod(int(pair), len(COLOURS))
        items.append((ICONS[shapes[shape]], COLOURS[colour], int(rng.choice((14, 18, 22)))))
    return items


def draw_screen(domain_name: str, split: str, index: int, seed=0, erased=False) -> Screen:
    """Screen number `index` of a split; the same arguments give the same screen.

    erased: its switches are not drawn. The correct click stays where they would be, and all else is the same."""
    domain = DOMAINS[domain_name]
    rng = np.random.default_rng([SPLITS.index(split), domain.number, index, seed])
    switch_width = GAP + SWITCH[0] if domain.switches else 0
    boxes = None
    while boxes is None:
        items = _random_items(rng, int(rng.integers(*domain.num_names, endpoint=True)))
        sprites = []
        for name, colour, size in items:
            sprite = _icon(name, colour, size, domain_name) if colour else _button(name, size, domain_name)
            sprites.append(sprite)
        sizes = [(sprite.width + switch_width, sprite.height) for sprite in sprites]
        boxes = place_in_lines(rng, sizes) if domain.switches else place_freely(rng, sizes)

    image = Image.new("RGB", (SIZE, SIZE), domain.background)
    elements = []
    for (name, colour, _), sprite, (left, top, right, bottom) in zip(items, sprites, boxes):
        image.paste(sprite, (left, top), sprite)
        box = (left, top, left + sprite.width, bottom)
        click = box
        if domain.switches:
            switch = _switch(is_on=rng.integers(2) == 0)
            x = right - SWITCH[0]
            y = (top + bottom - SWITCH[1]) // 2
            click = (x, y, right, y + SWITCH[1])
            if not erased:
                image.paste(switch, (x, y), switch)
                elements.append(Element("switch", "", click, None))
        elements.append(Element(name, colour, box, click))
    return Screen(np.asarray(image), tuple(elements))
