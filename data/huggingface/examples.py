"""Reads files of examples, and asks a model about them as finetune.py trains it. Each line of a file is one:

    {"images": ["page.png"], "prompt": [{"role": "user", "content": "Where is the search box?"}],
     "completion": [{"role": "assistant", "content": "(412, 88)"}]}

Its images come before the first question, and their paths are relative to the file."""

import json
import re
from pathlib import Path

import PIL.Image
import torch
from datasets import Dataset, Features, Image, Value
from tqdm import tqdm
from trl import apply_chat_template, prepare_multimodal_messages

TURNS = [{"role": Value("string"), "content": Value("string")}]
FEATURES = Features({"images": [Image(mode="RGB")], "prompt": TURNS, "completion": TURNS})
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
LOOP = re.compile(r"(.{4,200}?)\1{3}", re.DOTALL)  # a piece of text, four times in a row


def read_examples(*files) -> list[dict]:
    """The examples of these files, each with its `source`. Stops at the first line that is none."""
    examples = []
    for file in map(Path, files):
        lines = file.read_text(encoding="utf-8-sig").split("\n")
        if not any(line.strip() for line in lines):
            raise SystemExit(f"{file} is empty; write an example on each line")
        for number, line in enumerate(lines, start=1):
            source = f"{file}, line {number}"
            try:
                if line.strip():
                    examples.append(checked(json.loads(line), file.parent) | {"source": source})
            except (ValueError, OSError) as error:  # of json, of checked() and of PIL
                raise SystemExit(f"{source}: {error}; correct the line") from None
    return examples


def checked(example: dict, folder: Path) -> dict:
    """The example with absolute paths. ValueError says what is wrong with it."""
    if not isinstance(example, dict) or example.keys() | {"images"} != FEATURES.keys():
        raise ValueError("an example has a 'prompt', a 'completion' and perhaps 'images', and no other key")
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        turns = example[key] if isinstance(example[key], list) else []
        if not turns or not all(map(is_turn, turns)) or turns[-1]["role"] != role:
            raise ValueError(
                f"'{key}' must be a list of turns with a 'role' and a text as 'content', the last {role}'s"
            )
    images = example.get("images", [])
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f"'images' must be a list of paths, not {images!r}")
    images = [str((folder / path).resolve()) for path in images]
    for path in images:
        if PIL.Image.open(path).mode.startswith(("I", "F")):  # reads its header only
            raise ValueError(f"{path} has over 8 bits and would turn white; save it with 8")
    return example | {"images": images}


def is_turn(turn) -> bool:
    return isinstance(turn, dict) and turn.keys() == TURNS[0].keys() and isinstance(turn["content"], str)


def as_dataset(examples: list[dict]) -> Dataset:
    """What TRL gets of them. Pictures are read, turned upright and made RGB when they are needed."""
    return Dataset.from_list([{key: example.get(key, []) for key in FEATURES} for example in examples], FEATURES)


def answer(model, processor, examples: list, max_new_tokens=64, batch_size=8, keep_cut_off=True) -> list[str]:
    """The greedy answer to each prompt, of a model with any of the three adapters or none, without spaces around it.

    It keeps special tokens, such as those that mark a box. If keep_cut_off is false, an answer that did not end within
    max_new_tokens becomes an empty one."""
    ends = model.generation_config.eos_token_id  # one or a list
    # The base's own settings may sample or penalize repetition. A generated placeholder would count as an image.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    placeholders = {getattr(model.config, name, None) for name in PLACEHOLDERS} - {None}
    greedy["suppress_tokens"] = sorted(placeholders.union(model.generation_config.suppress_tokens or []))
    answers = []
    for start in tqdm(range(0, len(examples), batch_size), "Answering"):
        batch = examples[start : start + batch_size]
        images = list(as_dataset(batch)["images"])
        texts = [as_in_training(processor, example["prompt"], pictures) for example, pictures in zip(batch, images)]
        prompts = [prompt for prompt, _ in texts]
        options = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
        inputs = processor(images=images if any(images) else None, text=prompts, **options)
        output = model.generate(**inputs.to(model.device, model.dtype), **greedy, max_new_tokens=max_new_tokens)
        for (_, opening), row in zip(texts, output[:, inputs["input_ids"].shape[1] :]):
            is_end = torch.isin(row.cpu(), torch.tensor(ends))
            end = is_end.int().argmax()  # 0 if there is none
            if keep_cut_off and not is_end.any():
                end = len(row)
            text = processor.decode(row[:end]).strip()
            answers.append(text.removeprefix(opening.strip()).strip())
    return answers


def as_in_training(processor, prompt: list[dict], pictures: list) -> tuple[str, str]:
    """The prompt as TRL shows it in training, and what the chat template writes between it and an answer. In Qwen3.5,
    for example, that is the end of an empty thought."""
    completion = prepare_multimodal_messages([{"role": "assistant", "content": "ANSWER"}])
    turns = {"prompt": prepare_multimodal_messages(prompt, pictures), "completion": completion}
    texts = apply_chat_template(turns, processor)
    return texts["prompt"], texts["completion"].partition("ANSWER")[0]


def own_answers(model, processor, examples: list[dict], questions: list[str], one_in=8, max_new_tokens=64) -> list:
    """Learning without Forgetting (arXiv 1606.09282): what a base model answers to other questions, to train on, too.

    It is asked about one image in `one_in`. Answers that are empty, cut off or repeat themselves are left out."""
    asked = []
    for example in [example for example in examples if example["images"]][::one_in]:
        # Earlier turns may be the new task's, so only a system prompt stays.
        prompt = [turn for turn in example["prompt"] if turn["role"] == "system"]
        prompt.append({"role": "user", "content": questions[len(asked) % len(questions)]})
        asked.append({"images": example["images"], "prompt": prompt})
    own = []
    for example, text in zip(asked, answer(model, processor, asked, max_new_tokens, keep_cut_off=False)):
        if text and not LOOP.search(text):
            own.append(example | {"completion": [{"role": "assistant", "content": text}]})
    print(f"{len(own)} of {len(asked)} answers can be learned")
    return own
