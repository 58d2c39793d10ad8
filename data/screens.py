"""Synthetic screens for GUI grounding, drawn with Pillow: 128 x 128 pixels, text buttons and icons. Domains:

source     light screens, elements anywhere; the only domain whose questions the base model is pretrained on
switches   a name a line, its switch anywhere right of it; the correct click is on the *switch*
dark       the source task in a dark palette whose ground and buttons pretraining never draws
night      another dark palette, shown to the vision encoder in random tints; nothing else is done with it
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import SPLITS

SIZE = 128  # pixels, width and height of a screen
BINS = 16  # coordinate tokens per axis
BIN = SIZE // BINS  # pixels per coordinate token
LABELS = "wifi sound light sync lock mail maps news photo clock files music games notes home help".split()
ICONS = "circle square triangle star heart plus moon arrow".split()
VERBS = "click tap press select".split()
COLOURS = "red yellow green blue purple brown".split()
LIGHT = dict(zip(COLOURS, "#dc2828 #e6b40a #28a046 #2864e6 #9637c8 #8c5528".split()))
DARK = dict(zip(COLOURS, "#ff6e64 #ffe16e #78e68c #78aaff #d28cff #c8966e".split()))
SWITCH = (16, 10)  # pixels, its size
GAP = 6  # pixels between a name and its switch, at least
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive


def place_freely(rng, sizes: list[tuple]) -> list[Box] | None:
    """Random boxes, 3 pixels or more apart, or None after too many attempts."""
    boxes, taken = [], np.zeros((SIZE, SIZE), bool)
    for width, height in sizes:
        for _ in range(40):
            x, y = int(rng.integers(1, SIZE - width)), int(rng.integers(1, SIZE - height))
            if not taken[max(y - 3, 0) : y + height + 3, max(x - 3, 0) : x + width + 3].any():
                break
        else:
            return None
        taken[y : y + height, x : x + width] = True
        boxes.append((x, y, x + width, y + height))
    return boxes


def place_in_lines(rng, sizes: list[tuple]) -> list[Box]:
    """A box a line, each starting near the left edge and ending anywhere right of its size."""
    height = SIZE // len(sizes)  # of a line
    boxes = []
    for line, (width, h) in enumerate(sizes):
        x, y = int(rng.integers(1, 9)), line * height + int(rng.integers(1, height - h))
        boxes.append((x, y, int(rng.integers(x + width, SIZE)), y + h))
    return boxes


class Domain(NamedTuple):
    """A kind of screen: its colours, and what stands on it."""

    number: int  # in the random seeds of its screens
    background: str
    button: str
    text: str
    icons: dict[str, str]  # colour -> what is drawn
    names: tuple[int, int] = (5, 7)  # on a screen, least and most
    layout: Callable = place_freely  # (rng, sizes) -> boxes, or None where it found no room
    switches: bool = False  # whether names have switches


_LIGHT = "#f5f6f8", "#dfe3ea", "#1e2430", LIGHT
DOMAINS = {
    "source": Domain(0, *_LIGHT),
    "switches": Domain(2, *_LIGHT, names=(4, 5), layout=place_in_lines, switches=True),
    "dark": Domain(3, "#0e3d44", "#17606b", "#e2f6f8", DARK),
    "night": Domain(5, "#14171c", "#303743", "#eef1f6", DARK),
}


@dataclass(frozen=True)
class Element:
    name: str  # a word of LABELS or ICONS, or "switch"
    colour: str  # of an icon; "" for text
    bbox: Box  # where it is drawn
    click: Box | None  # where a click on it belongs; None for what is never asked for

    def full_name(self) -> str:
        return f"{self.colour} {self.name}".strip()


@dataclass(frozen=True, eq=False)
class Screen:
    image: np.ndarray  # [SIZE, SIZE, 3] uint8
    elements: tuple[Element, ...]

    def targets(self) -> list[Element]:
        return [e for e in self.elements if e.click]


@cache
def _outlines() -> dict[str, np.ndarray]:
    """The corners [N, 2] of each icon on the unit square."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    tenth = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    radius = np.resize((1.0, 0.42), 10)
    heart = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    out = np.linspace(-2.5, 2.5, 32)  # on the moon's two arcs
    back = np.linspace(1.9, -1.9, 32)
    moon_x = np.append(-np.cos(out), 0.45 - 0.85 * np.cos(back))
    moon_y = np.append(np.sin(out), 0.66 * np.sin(back))
    curves = {  # from -1 to 1, upwards
        "circle": (np.sin(t), np.cos(t)),
        "star": (radius * np.sin(tenth), radius * np.cos(tenth)),
        "heart": (np.sin(t) ** 3, heart / 15 + 0.1),
        "moon": (moon_x, moon_y),
    }
    polygons = {  # x and y of each corner in percent
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
def _sprite(name: str, colour: str, size: int, domain: str) -> Image.Image:
    """A text, an icon or a switch, on or off, in RGBA: drawn once at 4 times its size and averaged down."""
    look, k = DOMAINS[domain], 4
    width, height = (size, size) if colour else SWITCH
    if name in LABELS:
        font = ImageFont.load_default(size * k)
        width, height = round(font.getlength(name) / k) + 8, size + 5
    sprite = Image.new("RGBA", (width * k, height * k))
    draw, right, bottom = ImageDraw.Draw(sprite), width * k - 1, height * k - 1
    if name in LABELS:
        draw.rounded_rectangle((0, 0, right, bottom), 3 * k, look.button, look.button, k)
        draw.text((width * k / 2, height * k / 2), name, fill=look.text, font=font, anchor="mm")
    elif colour:
        fill, corners = look.icons[colour], _outlines()[name] * (right, bottom)
        draw.polygon(corners.flatten().tolist(), fill, fill, width=6)
    else:
        track, x = ("#3c4657", (width - height) * k) if name == "on" else ("#b4bac4", 0)
        draw.rounded_rectangle((0, 0, right, bottom), height * k // 2, fill=track)
        draw.ellipse((x + k, k, x + (height - 1) * k, (height - 1) * k), fill="#ffffff")
    return sprite.resize((width, height), Image.Resampling.BOX)


def _contents(rng, count: int) -> list[tuple]:
    """`count` (name, colour, size), half of them text; names are unique, icons at least together with colour."""
    texts = rng.choice(len(LABELS), count // 2, replace=False)
    kinds = rng.permutation(len(ICONS))[:3]  # few, so often ambiguous without colour
    pairs = rng.choice(len(kinds) * len(COLOURS), count - count // 2, replace=False)
    items = [(LABELS[i], "", int(rng.integers(11, 13))) for i in texts]
    for kind, colour in (divmod(int(p), len(COLOURS)) for p in pairs):
        items.append((ICONS[kinds[kind]], COLOURS[colour], int(rng.choice((14, 18, 22)))))
    return items


def draw_screen(domain: str, split: str, index: int, seed=0, erased=False) -> Screen:
    """Screen number `index` of a split; the same arguments give the same screen.

    erased: its switches are not drawn; the correct click stays where they would be, and so does all else."""
    look = DOMAINS[domain]
    rng = np.random.default_rng([SPLITS.index(split), look.number, index, seed])
    more = GAP + SWITCH[0] if look.switches else 0  # width of a pair than of its name
    boxes = None
    while boxes is None:
        items = _contents(rng, int(rng.integers(*look.names, endpoint=True)))
        sprites = [_sprite(*item, domain) for item in items]
        boxes = look.layout(rng, [(sprite.width + more, sprite.height) for sprite in sprites])

    image, elements = Image.new("RGB", (SIZE, SIZE), look.background), []
    for (name, colour, _), sprite, (left, top, right, bottom) in zip(items, sprites, boxes):
        image.paste(sprite, (left, top), sprite)
        box = target = (left, top, left + sprite.width, bottom)
        if look.switches:
            toggle = _sprite(("on", "off")[rng.integers(2)], "", 0, domain)
            x, y = right - SWITCH[0], (top + bottom - SWITCH[1]) // 2
            target = (x, y, right, y + SWITCH[1])
            if not erased:
                image.paste(toggle, (x, y), toggle)
                elements.append(Element("switch", "", target, None))
        elements.append(Element(name, colour, box, target))
    return Screen(np.asarray(image), tuple(elements))


def centre_bins(bbox: Box) -> tuple[int, int]:
    """The (x, y) coordinate bins of a box's centre."""
    left, top, right, bottom = bbox
    return (left + right) // (2 * BIN), (top + bottom) // (2 * BIN)


def called(screen: Screen, element: Element, by_colour=False) -> str:
    """What a question calls an element: by its colour too where its name is ambiguous; by_colour: by that alone where
    it is enough."""
    names, colours = zip(*((e.name, e.colour) for e in screen.targets()))
    if by_colour and element.colour and colours.count(element.colour) == 1:
        return element.colour
    return element.name if names.count(element.name) == 1 else element.full_name()


def grounding(screen: Screen, element: Element, rng, by_colour=False) -> dict:
    """A sample with ScreenSpot's names (bbox, instruction, data_type) and the `answer` to train on."""
    name = called(screen, element, by_colour)
    x, y = centre_bins(element.click)
    return {
        "bbox": element.click,
        "name": element.name,
        "instruction": f"{VERBS[rng.integers(len(VERBS))]} {name}",
        "data_type": "icon" if element.colour else "text",
        "answer": f"<x{x}> <y{y}>",
    }


def referring(element: Element) -> dict:
    """The question the other way round: a point is given, what a click there acts on is asked."""
    x, y = centre_bins(element.click)
    return {"instruction": f"what is at <x{x}> <y{y}>", "answer": element.full_name()}


def right_neighbour(screen: Screen, element: Element) -> Element | None:
    """The nearest element that begins right of this one and shares half the height of the lower of the two."""
    _, top, right, bottom = element.bbox
    beside = []
    for other in screen.elements:
        x, y, _, y_end = other.bbox
        if x >= right and 2 * (min(bottom, y_end) - max(top, y)) >= min(bottom - top, y_end - y):
            beside.append(other)
    return min(beside, key=lambda other: other.bbox[0], default=None)


def relations(screen: Screen) -> list[dict]:
    """What is right of each target that has something there: neither question nor answer is a place."""
    samples = []
    for target in screen.targets():
        if other := right_neighbour(screen, target):
            question = f"what is right of {called(screen, target)}"
            samples.append({"instruction": question, "answer": other.full_name()})
    return samples


def ask(screen: Screen, count: int, rng, refer: float, by_colour=0.0, distinct=False) -> list:
    """So many random samples. refer: share that give the point and ask for the name; by_colour: share that may name an
    icon by its colour alone; distinct: no target twice before each was asked for once."""
    targets, samples = screen.targets(), []
    if distinct:
        order = rng.permutation(len(targets))
    for j in range(count):
        target = targets[order[j % len(targets)] if distinct else rng.integers(len(targets))]
        if rng.random() < refer:
            samples.append(referring(target))
        else:
            samples.append(grounding(screen, target, rng, rng.random() < by_colour))
    return samples


def is_hit(point: tuple[float, float] | None, bbox: Box) -> bool:
    """ScreenSpot's rule: a point inside the target box, right and bottom edges excluded; None is a miss."""
    left, top, right, bottom = bbox
    return point is not None and left <= point[0] < right and top <= point[1] < bottom
