"""The tiny world: screens, questions about them, and word problems."""

import re

import numpy as np
import pytest

from data import questions, screens
from data.questions import is_hit
from data.screens import DOMAINS, SPLITS, Element, Screen, draw_screen


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_screen_is_a_function_of_domain_split_index_and_seed(domain):
    """So no two splits share one."""
    places = [(domain, split, index, seed) for split in SPLITS for index in range(6) for seed in range(2)]
    images = {draw_screen(*place).image.tobytes() for place in places}
    assert len(images) == len(places)
    assert draw_screen(*places[7]).image.tobytes() in images


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_instruction_names_exactly_one_element_and_its_answer_is_a_hit(domain):
    rng = np.random.default_rng(0)
    for index in range(12):
        screen = draw_screen(domain, "train", index)
        targets = screen.targets()
        for target in targets:
            instruction = questions.referring_sample(target)["instruction"]
            point = questions.parse_point(instruction.removeprefix("what is at "))
            assert [other for other in targets if is_hit(point, other.click)] == [target]
            for by_colour in (False, True):
                sample = questions.grounding_sample(screen, target, rng, by_colour)
                _, *named = sample["instruction"].split()
                assert [other for other in targets if {*named} <= {other.name, other.colour}] == [target]
                assert sample["bbox"] == target.click
                assert is_hit(questions.parse_point(sample["answer"]), target.click)


def test_right_and_bottom_edges_of_a_box_are_outside():
    points = [(2, 3), (5, 3), (2, 7), None]
    assert [is_hit(point, (2, 3, 5, 7)) for point in points] == [True, False, False, False]


def test_a_switch_is_right_of_its_name_and_erasing_it_changes_nothing_else():
    """So what the erased screens show is due to the switch."""
    for index in range(20):
        screen = draw_screen("new", "test", index)
        erased = draw_screen("new", "test", index, erased=True)
        assert erased.targets() == screen.targets() == list(erased.elements)
        changed = (screen.image != erased.image).any(-1)
        for element in screen.elements:
            left, top, right, bottom = element.bbox
            assert changed[top:bottom, left:right].any() == (element.name == "switch")
            if element.name != "switch":
                assert element.click[0] - right >= screens.GAP
            changed[top:bottom, left:right] = False
        assert not changed.any()


def test_what_is_right_of_a_name_begins_there_and_shares_half_the_shorter_ones_height():
    boxes = {"a": (0, 0, 9, 9), "b": (9, 4, 20, 30), "c": (21, 5, 30, 15), "d": (60, 0, 70, 9), "e": (8, 0, 12, 9)}
    elements = tuple(Element(name, "", box, box) for name, box in boxes.items())
    samples = questions.samples_of_kind(Screen(np.zeros(0), elements), "what_is_right_of", np.random.default_rng(0))
    assert [sample["instruction"] for sample in samples] == [f"what is right of {name}" for name in "abe"]
    assert [sample["answer"] for sample in samples] == ["b", "c", "d"]


def test_word_problems_of_the_test_are_new_sentence_pairs_and_new_numbers():
    """So nobody can answer them from memory."""
    sentences, numbers = {}, {}
    for split in SPLITS:
        stories = [questions.word_problem(split, i)["instruction"].partition(" has ")[2] for i in range(600)]
        sentences[split] = {re.sub(r"\d+", "", story.partition(" then ")[2]) for story in stories}
        triples = [tuple(re.findall(r"\d+", story)) for story in stories]
        numbers[split] = {triple for triple in triples if len(triple) == 3}  # one that doubles has two
    assert len(numbers["test"]) > 20
    for split in {*SPLITS} - {"test"}:
        assert not sentences["test"] & sentences[split]
        assert not numbers["test"] & numbers[split]
