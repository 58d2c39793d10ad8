"""Reads the training file of tune.py, finds what is wrong with its lines, and makes batches of its examples.

Each line is one example, and what the assistant says in its completion is learned. Image paths are relative to the
file's folder. Examples without an image ("images": []) are useful to LoRA only, because the other two methods get no
gradient from them.

    {"images": ["page.png"],
     "prompt": [{"role": "user", "content": "Where is the search box?"}],
     "completion": [{"role": "assistant", "content": "(412, 88)"}]}

Here the image stands before the question. To say where images stand, write the content of every turn as parts:

    {"role": "user", "content": [{"type": "text", "text": "Where is the search box?"}, {"type": "image"}]}
"""

import json
from pathlib import Path

from datasets import Dataset
from PIL import Image, ImageOps
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

IMAGE = {"type": "image"}  # a part of a turn, where an image stands


class Collator(DataCollatorForVisionLanguageModeling):
    """Makes a batch of rows. Their turns are JSON, because a dataset would read the answer "[412, 88]" as a list."""

    def torch_call(self, rows: list[dict]) -> dict:
        examples = []
        for row in rows:
            images = [open_image(path) for path in row["images"]]
            prompt = json.loads(row["prompt"])
            completion = json.loads(row["completion"])
            examples.append({"images": images, "prompt": prompt, "completion": completion})
        return super().torch_call(examples)


def open_image(path: str) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits a pixel; convert() alone would make nearly all of them 255
        image = image.point(lambda value: value * (1 / 256))
    return image.convert("RGB")


def read_examples(file: str, collate: Collator, placeholders: set[int], share=(0, 1), num_proc=None) -> Dataset:
    """The examples of a file. Each becomes a batch once, so that a bad line is found now and not after hours.

    placeholders: the token ids that stand for images. share (i, n): this is process i of n, which share this work; None
    skips it. num_proc: the number of workers for it."""
    rows = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
        place = f"{file}, line {number}"
        try:
            rows += [row | {"place": place} for row in rows_of(json.loads(line), Path(file).parent)]
        except Exception as error:
            raise ValueError(f"{place}: {type(error).__name__}: {error}") from None
    if not rows:
        raise ValueError(f"{file} is empty")
    examples = Dataset.from_list(rows)

    def try_row(row):
        try:
            if not placeholders.isdisjoint(collate.processor.tokenizer(row["text"])["input_ids"]):
                raise ValueError("a text contains the placeholder of an image; leave it out, it is added for you")
            if (collate([row])["labels"] == -100).all():
                raise ValueError("no token of the completion is left to learn")
        except Exception as error:
            raise ValueError(f"{row['place']}: {type(error).__name__}: {error}") from None

    if share is not None:
        index, count = share
        mine = examples.select(range(index, len(rows), count))
        mine.map(try_row, num_proc=num_proc, desc=f"checking {file}", new_fingerprint="tried")
    return examples


def rows_of(example: dict, folder: Path) -> list[dict]:
    """A row for each of the assistant's turns in the completion; the turns before it become its prompt."""
    keys = ["images", "prompt", "completion"]
    if not isinstance(example, dict) or sorted(example) != sorted(keys):
        raise ValueError(f"a line needs the keys {', '.join(keys)} and no others; got {example!r:.80}")
    images = [str(folder / path) for path in example["images"]]
    turns = example["prompt"] + example["completion"]
    parts = [parts_of(turn) for turn in turns]
    num_images = [turn_parts.count(IMAGE) for turn_parts in parts]  # in each turn
    texts = [" ".join(part["text"] for part in turn_parts if part != IMAGE) for turn_parts in parts]
    users = [turn["content"] for turn in turns if turn["role"] == "user"]
    has_strings = any(isinstance(content, str) for content in users)
    if has_strings and len(users) > 1 and (len(images) > 1 or any(num_images)):
        raise ValueError("a string does not say which images stand in its turn; write all turns as parts")
    if any(num_images) and sum(num_images) != len(images):
        raise ValueError(f"{sum(num_images)} parts are images, but images names {len(images)} files")
    rows = []
    for i in range(len(example["prompt"]), len(turns)):
        if turns[i]["role"] == "assistant":
            if i == 0 or not texts[i].strip():
                raise ValueError("a turn of the assistant in the completion is empty, or no turn comes before it")
            shown = images[: sum(num_images[:i])] if any(num_images) else images
            row = {"images": shown, "prompt": json.dumps(turns[:i]), "completion": json.dumps([turns[i]])}
            rows.append(row | {"text": " ".join(texts)})
    if not rows:
        raise ValueError("no turn of the completion is the assistant's, so there is nothing to learn")
    return rows


def parts_of(turn: dict) -> list[dict]:
    """The content of a turn as a list of parts."""
    content = turn.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [part for part in parts if part != IMAGE] if isinstance(parts, list) else [{}]
    if "role" not in turn or any(part != {"type": "text", "text": part.get("text")} for part in texts):
        form = 'a string, or parts like {"type": "text", "text": "a cat"} and {"type": "image"}'
        raise ValueError(f"a turn needs a role and a content, which is {form}; got {turn!r:.80}")
    return parts
