"""Makes questions about screens, and word problems, which stand in for GSM8K; and reads the answers.

grounding      click wifi                  <x3> <y5>      where is a name?
referring      what is at <x3> <y5>        wifi           which name does a click there act on?
relations      what is right of wifi       red moon       and where is that: click right of wifi
word problems  nina has 7 apples then finds 5 then eats 3 how many     12 9

A question with its answer is a *sample*, {"instruction", "answer"}; a click also has the "bbox" to hit. A *hint* in
front of a question says where to click: <x3> <y5> click wifi.
"""

import re
from functools import lru_cache
from operator import add, sub

import numpy as np

from data.screens import SIZE, SPLITS, Box, Element, Screen

BINS = 16  # coordinate tokens per axis
BIN = SIZE // BINS  # pixels per coordinate token
VERBS = "click tap press select".split()
KINDS = "click", "what_is_at", "what_is_right_of", "click_right_of"  # of questions about a screen
OTHER_KINDS = KINDS[1:]  # all but a plain click, which is the new task
Point = tuple[float, float]  # x, y in pixels

# ---- Places ----------------------------------------------------------------------------------------------------------


def centre_bins(bbox: Box) -> tuple[int, int]:
    """The (x, y) coordinate bins of a box's centre."""
    left, top, right, bottom = bbox
    return (left + right) // (2 * BIN), (top + bottom) // (2 * BIN)


def place(box: Box) -> str:
    """The bins of a box's centre, as in a question or an answer: '<x3> <y5>'."""
    x, y = centre_bins(box)
    return f"<x{x}> <y{y}>"


def parse_point(answer: str) -> Point | None:
    """'<x3> <y5>' -> that point in pixels, the centre of its bins; None if the answer is not a point."""
    bins = re.fullmatch(r"<x(\d+)> <y(\d+)>", answer)
    if not bins:
        return None
    x, y = (int(i) for i in bins.groups())
    return (x + 0.5) * BIN, (y + 0.5) * BIN


def is_hit(point: Point | None, bbox: Box) -> bool:
    """ScreenSpot's rule: a point inside the target box, right and bottom edges excluded; None is a miss."""
    left, top, right, bottom = bbox
    return point is not None and left <= point[0] < right and top <= point[1] < bottom


# ---- Questions about a screen ----------------------------------------------------------------------------------------


def description(screen: Screen, element: Element, by_colour=False) -> str:
    """What a question calls an element: its name, and its colour, too, if another target has the same name.

    by_colour: the colour alone, if no other target has it."""
    names = [target.name for target in screen.targets()]
    colours = [target.colour for target in screen.targets()]
    if by_colour and element.colour and colours.count(element.colour) == 1:
        return element.colour
    return element.name if names.count(element.name) == 1 else element.full_name()


def random_verb(rng) -> str:
    return VERBS[rng.integers(len(VERBS))]


def grounding_sample(screen: Screen, element: Element, rng, by_colour=False) -> dict:
    """Asks for a click: a sample whose `bbox` is where the click is correct, and `elsewhere` the place of another."""
    name = description(screen, element, by_colour)
    targets = screen.targets()
    next_target = targets[(targets.index(element) + 1) % len(targets)]
    return {
        "bbox": element.click,
        "instruction": f"{random_verb(rng)} {name}",
        "answer": place(element.click),
        "elsewhere": place(next_target.click),
    }


def click_right_of(sample: dict) -> dict:
    """The same click, asked for as pretraining asked for it: *click right of wifi*."""
    return sample | {"instruction": sample["instruction"].replace(" ", " right of ", 1)}


def with_hint(sample: dict, right=True) -> dict:
    """The same click, with a place in front of the question: the correct one, or that of another target."""
    hint = sample["answer"] if right else sample["elsewhere"]
    return sample | {"instruction": f"{hint} {sample['instruction']}"}


def referring_sample(element: Element) -> dict:
    """Gives a point, and asks for the name of what a click there acts on."""
    return {"instruction": f"what is at {place(element.click)}", "answer": element.full_name()}


def right_neighbour(screen: Screen, element: Element) -> Element | None:
    """The nearest element that begins right of this one and overlaps it vertically by at least half the height of the
    shorter one."""
    _, top, right, bottom = element.bbox
    candidates = []
    for other in screen.elements:
        other_left, other_top, _, other_bottom = other.bbox
        overlap = min(bottom, other_bottom) - max(top, other_top)
        if other_left >= right and 2 * overlap >= min(bottom - top, other_bottom - other_top):
            candidates.append(other)
    return min(candidates, key=lambda other: other.bbox[0], default=None)


def neighbours(screen: Screen) -> list[tuple[Element, Element]]:
    """Each target with what is right of it, if anything is."""
    pairs = [(target, right_neighbour(screen, target)) for target in screen.targets()]
    return [(target, neighbour) for target, neighbour in pairs if neighbour]


def relation_sample(screen: Screen, target: Element, neighbour: Element, kind: str, rng) -> dict:
    """Asks for the name of what is right of a target, which gives no place away; or for a click on it."""
    name = description(screen, target)
    if kind == "what_is_right_of":
        return {"instruction": f"what is right of {name}", "answer": neighbour.full_name()}
    box = neighbour.click or neighbour.bbox  # of a switch
    return {"instruction": f"{random_verb(rng)} right of {name}", "answer": place(box), "bbox": box}


def samples_of_kind(screen: Screen, kind: str, rng) -> list[dict]:
    """A question of one of KINDS about each target. The last two leave out targets with nothing on their right."""
    if kind == "click":
        return [grounding_sample(screen, target, rng) for target in screen.targets()]
    if kind == "what_is_at":
        return [referring_sample(target) for target in screen.targets()]
    samples = []
    for target, neighbour in neighbours(screen):
        samples.append(relation_sample(screen, target, neighbour, kind, rng))
        if kind == "click_right_of":
            random_verb(rng)  # draws once more, as it did when the base models were trained
    return samples


def all_samples(screens: list[Screen], kind="click") -> list[tuple[int, dict]]:
    """The questions of a kind about all screens, as pairs (number of the screen, sample).

    kind: one of KINDS, or a function of a screen and a random generator that makes the samples of a task of its own."""
    rng = np.random.default_rng(0)
    pairs = []
    for i, screen in enumerate(screens):
        samples = kind(screen, rng) if callable(kind) else samples_of_kind(screen, kind, rng)
        pairs += [(i, sample) for sample in samples]
    return pairs


def random_sample(screen: Screen, kind: str, rng) -> dict | None:
    """A question of one of OTHER_KINDS about a random element. None if there is nothing right of any name."""
    if kind == "what_is_at":
        element = screen.elements[rng.integers(len(screen.elements))]
        return {"instruction": f"what is at {place(element.bbox)}", "answer": element.full_name()}
    pairs = neighbours(screen)
    return relation_sample(screen, *pairs[rng.integers(len(pairs))], kind, rng) if pairs else None


def random_samples(screen: Screen, count: int, rng, refer=0.0, by_colour=0.0, distinct=False) -> list[dict]:
    """`count` random questions about a screen, with their answers.

    refer: share of them that give a point and ask for the name. by_colour: share of the others that may name an icon by
    its colour alone. distinct: each target is asked for once before one is asked for again."""
    targets = screen.targets()
    samples = []
    if distinct:
        order = rng.permutation(len(targets))
    for i in range(count):
        target = targets[order[i % len(targets)] if distinct else rng.integers(len(targets))]
        if rng.random() < refer:
            samples.append(referring_sample(target))
        else:
            samples.append(grounding_sample(screen, target, rng, rng.random() < by_colour))
    return samples


def neighbour_samples(screen: Screen, rng) -> list[dict]:
    """What is right of each target, and where that is, in random order."""
    samples = samples_of_kind(screen, "what_is_right_of", rng) + samples_of_kind(screen, "click_right_of", rng)
    return rng.permutation(samples).tolist()


def old_samples(screen: Screen, count: int, rng) -> list[dict]:
    """`count` random questions about a screen without switches, up to half of them about what is right of a name."""
    about_right = neighbour_samples(screen, rng)[: count // 2]
    samples = random_samples(screen, count - len(about_right), rng, refer=0.4, distinct=True)
    return rng.permutation(samples + about_right).tolist()


# ---- Word problems ---------------------------------------------------------------------------------------------------

PEOPLE = "tom nina ali rosa liam mei".split()
THINGS = "apples books coins cards pens shells".split()
ACTIONS = [  # (sentence, f): f(the number so far, the number in the sentence) is the new number
    ("gets {} more", add),
    ("finds {}", add),
    ("buys {}", add),
    ("loses {}", sub),
    ("eats {}", sub),
    ("sells {}", sub),
    ("doubles them", lambda number, _: 2 * number),
]
MAX_MIDDLE = 20  # the largest intermediate result
MAX_NUMBER = 2 * MAX_MIDDLE  # no number in any problem is larger


@lru_cache(4096)  # an evaluation asks for the same problems each time
def word_problem(split: str, index: int) -> dict:
    """Problem number `index` of a split; the same arguments give the same problem.

    Test problems use pairs of sentences and triples of numbers that no training problem uses."""
    rng = np.random.default_rng([SPLITS.index(split), 1000, index])
    while True:
        i, j = rng.integers(len(ACTIONS), size=2).tolist()
        a, b, c = rng.integers(1, (13, 10, 10)).tolist()
        # One pair of sentences in 7 and one triple of numbers in 5 are the test split's.
        test_pair = (i - j) % len(ACTIONS) == 2
        test_triple = (a + 2 * b + 3 * c) % 5 == 0
        if test_pair != (split == "test") or test_triple != (split == "test"):
            continue
        first_sentence, first_action = ACTIONS[i]
        second_sentence, second_action = ACTIONS[j]
        middle = first_action(a, b)
        result = second_action(middle, c)
        if 0 <= middle <= MAX_MIDDLE and 0 <= result:
            break
    person = PEOPLE[rng.integers(len(PEOPLE))]
    thing = THINGS[rng.integers(len(THINGS))]
    story = f"{person} has {a} {thing} then {first_sentence.format(b)} then {second_sentence.format(c)}"
    return {"instruction": f"{story} how many", "answer": f"{middle} {result}"}
