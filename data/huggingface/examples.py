"""Reads files of examples, as finetune.py learns them. Each line is one:

    {"images": ["page.png"], "prompt": [{"role": "user", "content": "Where is the search box?"}],
     "completion": [{"role": "assistant", "content": "(412, 88)"}]}

Its images come before the first question, and their paths are relative to the file."""

import json
from pathlib import Path

import PIL.Image
from datasets import Dataset, Features, Image, Value

TURNS = [{"role": Value("string"), "content": Value("string")}]
FEATURES = Features({"images": [Image(mode="RGB")], "prompt": TURNS, "completion": TURNS})


def read_examples(*files) -> list[dict]:
    """The examples of these files, each with its `source`. Stops at the first line that is none."""
    examples = []
    for file in map(Path, files):
        lines = file.read_text(encoding="utf-8-sig").split("\n")
        numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
        if not numbers:
            raise SystemExit(f"{file} is empty; write an example on each line")
        for number in numbers:
            source = f"{file}, line {number}"
            try:
                examples.append(checked(json.loads(lines[number - 1]), file.parent) | {"source": source})
            except (ValueError, OSError) as error:  # of json, of checked() and of PIL
                raise SystemExit(f"{source}: {error}; correct the line") from None
    return examples


def checked(example: dict, folder: Path) -> dict:
    """The example with absolute paths. ValueError says what is wrong with it."""
    if not isinstance(example, dict) or example.keys() | {"images"} != FEATURES.keys():
        raise ValueError("an example has a 'prompt', a 'completion' and perhaps 'images', and no other key")
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        turns = example[key] if isinstance(example[key], list) else []
        texts = [t["content"] for t in turns if isinstance(t, dict) and t.keys() == {"role", "content"}]
        are_right = len(texts) == len(turns) > 0 and all(isinstance(text, str) for text in texts)
        if not are_right or turns[-1]["role"] != role:
            raise ValueError(
                f"'{key}' must be a list of turns that ends with {{'role': '{role}', 'content': 'a text'}}"
            )
    images = example.get("images", [])
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f"'images' must be a list of paths, not {images!r}")
    images = [str((folder / path).resolve()) for path in images]
    for path in images:
        if PIL.Image.open(path).mode.startswith(("I", "F")):  # reads its header only
            raise ValueError(f"{path} has over 8 bits and would turn white; save it with 8")
    return example | {"images": images}


def as_dataset(examples: list[dict]) -> Dataset:
    """What TRL gets of them. Pictures are read, turned upright and made RGB when they are needed."""
    return Dataset.from_list([{key: example.get(key, []) for key in FEATURES} for example in examples], FEATURES)
