"""Small tasks made by rule from our own word lists: for tests, first looks and models too small for world knowledge."""

from __future__ import annotations

import random
import string

from transfer.function_vectors.tasks import Pair, Task

_WORDS = """
apple bread chair dance eagle field glass house island jacket kettle lemon mirror number ocean paper
queen river stone table uncle violin window yellow zebra anchor basket candle desert engine forest garden
hammer insect jungle kitchen ladder market needle orange pencil quarry rocket saddle tunnel umbrella valley
winter yogurt barrel cotton dragon fabric guitar harbor iron journal kingdom lantern meadow napkin oyster
pillow rabbit silver ticket unicorn village whistle
"""
WORDS = tuple(_WORDS.split())
IRREGULAR = {"knife": "knives", "child": "children", "mouse": "mice", "foot": "feet", "leaf": "leaves"}
_CYCLES = """
January February March April May June July August September October November December
Monday Tuesday Wednesday Thursday Friday Saturday Sunday
"""
CYCLES = tuple(line.split() for line in _CYCLES.strip().splitlines())


def rule_tasks(seed: int = 0) -> list[Task]:
    """Nine tasks with instructions in words.

    Args:
        seed: Of the lists that the extractive tasks choose from.
    """
    rng = random.Random(seed)
    lists = [rng.sample(WORDS, 3) for _ in range(100)]

    def chosen(place: int) -> list[tuple[str, str]]:
        return [(", ".join(words), words[place]) for words in lists]

    cyclic = [(cycle[i], cycle[(i + 1) % len(cycle)]) for cycle in CYCLES for i in range(len(cycle))]
    letters = string.ascii_lowercase
    following = [(a, b) for a, b in zip(letters, letters[1:], strict=False)]
    following += [(str(i), str(i + 1)) for i in range(1, 30)] + cyclic
    plurals = [(w, w + "s") for w in WORDS if w[-1] not in "shxyz"] + list(IRREGULAR.items())
    made: dict[str, tuple[list[tuple[str, str]], tuple[str, ...]]] = {
        "copy": ([(w, w) for w in WORDS], ("Repeat the word.", "Write the same word again.")),
        "capitalize": ([(w, w.capitalize()) for w in WORDS], ("Begin the word with a capital letter.",)),
        "uppercase": ([(w, w.upper()) for w in WORDS], ("Write the word in capital letters.",)),
        "first_letter": ([(w, w[0]) for w in WORDS], ("Give the first letter of the word.",)),
        "plural": (plurals, ("Give the plural of the word.", "Write the word for more than one of these.")),
        "next_item": (following, ("Say what comes next.", "Name the item that follows.")),
        "previous_item": ([(b, a) for a, b in following], ("Say what comes before.",)),
        "first_of_three": (chosen(0), ("Give the first word of the list.",)),
        "last_of_three": (chosen(2), ("Give the last word of the list.",)),
    }
    return [
        Task(name, tuple(Pair(*p) for p in dict(pairs).items()), instructions)
        for name, (pairs, instructions) in made.items()
    ]
