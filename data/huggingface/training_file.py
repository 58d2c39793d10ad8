"""Reads the training file of tune.py, finds what is wrong with its lines, and makes batches of its examples.

Each line is one example. Only its completion is learned. Images are placed before the user's first message, and their
paths are relative to the file's folder. Examples without an image ("images": []) are useful to LoRA only, because the
other two methods get no gradient from them.

    {"images": ["page.png"],
     "prompt": [{"role": "user", "content": "Where is the search box?"}],
     "completion": [{"role": "assistant", "content": "(412, 88)"}]}
"""

import json
from pathlib import Path

from datasets import Dataset
from PIL import Image, ImageOps
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


class Collator(DataCollatorForVisionLanguageModeling):
    """Makes a batch of rows. Their turns are JSON, because a dataset would read the answer "[412, 88]" as a list."""

    def torch_call(self, rows: list[dict]) -> dict:
        examples = []
        for row in rows:
            turns = {name: json.loads(row[name]) for name in ("prompt", "completion")}
            examples.append({"images": [open_image(path) for path in row["images"]]} | turns)
        return super().torch_call(examples)


def open_image(path: str) -> Image.Image:
    image = Image.open(path)
    several = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"  # MPO: a phone's photo, with previews
    if several or image.mode in ("F", "I"):
        raise ValueError(f"{path} has several frames or 32 bits a pixel; save one frame with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel; convert() alone would make nearly all of them 255
        image = image.point(lambda value: value * (1 / 256))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_examples(file: str) -> Dataset:
    rows = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
        place = f"{file}, line {number}"
        try:
            if line.strip():
                example = json.loads(line, object_pairs_hook=object_of)
                rows.append(row_of(example, Path(file).parent) | {"place": place})
        except Exception as error:
            raise ValueError(f"{place}: {type(error).__name__}: {error}") from None
    if not rows:
        raise ValueError(f"{file} is empty")
    return Dataset.from_list(rows)


def check_examples(examples: Dataset, collate: Collator, placeholders: set[int], num_workers: int) -> None:
    """Makes each example a batch once, so that a bad line is found now and not after hours."""

    def check(row):
        try:
            if not placeholders.isdisjoint(collate.processor.tokenizer(row["prompt"] + row["completion"])["input_ids"]):
                raise ValueError("a text contains the placeholder of an image; leave it out, it is added for you")
            if (collate([row])["labels"] == -100).all():
                raise ValueError("no token of the completion is left to learn; raise --max_length or leave it out")
        except Exception as error:
            raise ValueError(f"{row['place']}: {type(error).__name__}: {error}") from None

    examples.map(check, num_proc=num_workers or None, desc="checking", new_fingerprint="checked")


def object_of(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice in {dict(pairs)!r:.80}")
    return dict(pairs)


def row_of(example: dict, folder: Path) -> dict:
    if not isinstance(example, dict) or sorted(example) != ["completion", "images", "prompt"]:
        raise ValueError(f"a line needs the keys images, prompt and completion, and no others; got {example!r:.80}")
    json.dumps(example, ensure_ascii=False).encode()  # raises for half a surrogate pair, such as \ud83d alone
    if not all(isinstance(value, list) for value in example.values()) or {*map(type, example["images"])} - {str}:
        raise ValueError(f"images must be a list of paths, prompt and completion lists of turns; got {example!r:.80}")
    turns = example["prompt"] + example["completion"]
    for turn in turns:
        if not isinstance(turn, dict) or sorted(turn) != ["content", "role"] or {*map(type, turn.values())} != {str}:
            raise ValueError(f"a turn needs a role and a content, which are strings, and no more; got {turn!r:.80}")
    # If the assistant also had the turn before the completion, TRL would learn the end of that turn, too.
    if len(example["completion"]) != 1 or [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
        raise ValueError("a completion must be one turn of the assistant, after one of the user that ends the prompt")
    if not turns[-1]["content"].strip():
        raise ValueError("the completion is empty")
    row = {"images": [str(folder / path) for path in example["images"]]}
    return row | {name: json.dumps(example[name], ensure_ascii=False) for name in ("prompt", "completion")}
