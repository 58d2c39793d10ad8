"""Two-step word problems, the stand-in for GSM8K: pure text, answered by the intermediate and the final number.

    nina has 7 apples then finds 5 then eats 3 how many ?  12 9

Test problems use (first step, second step) sentence pairs and number triples that no training problem uses.
"""

from functools import lru_cache

import numpy as np

from data import SPLITS

NAMES = "tom nina ali rosa liam mei".split()
THINGS = "apples books coins cards pens shells".split()
STEPS = {  # sentence -> operation; {} is the number
    "gets {} more": lambda a, b: a + b,
    "finds {}": lambda a, b: a + b,
    "buys {}": lambda a, b: a + b,
    "loses {}": lambda a, b: a - b,
    "eats {}": lambda a, b: a - b,
    "sells {}": lambda a, b: a - b,
    "doubles them": lambda a, b: 2 * a,
}
MAX_MIDDLE = 20  # the largest intermediate result
MAX_NUMBER = 2 * MAX_MIDDLE  # no number in any problem is larger
_STEPS = tuple(STEPS)


@lru_cache(4096)  # those of an evaluation are asked for again
def word_problem(split: str, index: int, seed: int = 0) -> dict:
    """Problem number `index` of a split: {"instruction", "answer"}; the same arguments give the same problem."""
    rng = np.random.default_rng([SPLITS.index(split), 1000, index, seed])
    test = split == "test"
    while True:
        first, second = rng.integers(len(_STEPS), size=2).tolist()
        a, b, c = rng.integers(1, (13, 10, 10)).tolist()
        if ((first - second) % len(_STEPS) == 2) != test or ((a + 2 * b + 3 * c) % 5 == 0) != test:
            continue  # one sentence pair in 7 and one number triple in 5 are kept for the test split
        middle = STEPS[_STEPS[first]](a, b)
        result = STEPS[_STEPS[second]](middle, c)
        if 0 <= middle <= MAX_MIDDLE and 0 <= result:
            break
    name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
    steps = f"{_STEPS[first].format(b)} then {_STEPS[second].format(c)}"
    return {"instruction": f"{name} has {a} {thing} then {steps} how many", "answer": f"{middle} {result}"}
