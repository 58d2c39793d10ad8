"""A file of prompts in, a file of answers out: of a base model, alone or with an adapter at any gamma.

    write_answers("prompts.jsonl", "answers.jsonl", "Qwen/Qwen2.5-VL-7B-Instruct", "runs/image_lora/adapter.pt", 0.8)

Each line of a file is an example, as finetune.py shows it. In a file of prompts, it needs no completion.
"""

import json
import random
import re
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import PIL.Image
from datasets import Dataset, Features, Image, Value
from partial_lora import MARK, load_partial_lora, visual_ids
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from trl import prepare_multimodal_messages

import imagelora

TURNS = [{"role": Value("string"), "content": Value("string")}]
FEATURES = Features({"images": [Image(mode="RGB")], "prompt": TURNS, "completion": TURNS})
LOOP = re.compile(r"(.{4,200}?)\1{3}", re.DOTALL)  # a piece of text, four times in a row


# 1. Files of examples
def read_examples(files: list, required=("prompt", "completion")) -> list[dict]:
    """The lines of these files, each with its `source`. Stops at the first line that is no example."""
    examples = []
    for file in map(Path, files):
        before = len(examples)
        for number, line in enumerate(read_lines(file), start=1):
            if line.strip():
                source = f"{file}, line {number}"
                try:
                    examples.append(checked_line(line, file.parent, required) | {"source": source})
                except ValueError as error:
                    raise SystemExit(f"{source}: {error}; correct the line") from None
        if len(examples) == before:
            raise SystemExit(f"{file} is empty; write an example on each line")
    return examples


def read_lines(file) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{file} cannot be read ({error}); give a text file in UTF-8") from None


def checked_line(line: str, folder: Path, required) -> dict:
    """The example of this line, with absolute paths. ValueError says what is wrong with it."""
    try:
        example = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON ({error.msg} at character {error.pos + 1})") from None
    if not isinstance(example, dict):
        raise ValueError("a line must be a JSON object")
    unknown = sorted(example.keys() - FEATURES.keys())
    if unknown:
        raise ValueError(f"a line has 'images', 'prompt' and 'completion', but this one {unknown}")
    example = {"images": [], "prompt": [], "completion": []} | example
    for key in ("prompt", "completion"):
        check_turns(key, example[key])
    if "prompt" in required and [turn["role"] for turn in example["prompt"][-1:]] != ["user"]:
        raise ValueError("a prompt must end with the user's turn")
    if "completion" in required and [turn["role"] for turn in example["completion"]] != ["assistant"]:
        raise ValueError("a completion must be one turn of the assistant")
    images = example["images"]
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f"'images' must be a list of paths, not {images!r}")
    example["images"] = [str((folder / path).resolve()) for path in images]
    for path in example["images"]:
        try:
            with PIL.Image.open(path) as picture:  # reads its header only
                mode = picture.mode
        except OSError:
            raise ValueError(f"{path} cannot be opened as a picture") from None
        if mode.startswith(("I", "F")):
            raise ValueError(f"{path} has over 8 bits and would turn white; save it with 8")
    return example


def check_turns(key: str, turns) -> None:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"'{key}' must be a list of turns such as {{'role': 'user', 'content': 'a text'}}")
    for turn in turns:
        if turn.keys() != {"role", "content"} or not isinstance(turn["content"], str):
            raise ValueError("a turn has a role and a content, which must be a text; images go into 'images'")
        if turn["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"a role is 'system', 'user' or 'assistant', not {turn['role']!r}")


def as_dataset(examples: list[dict]) -> Dataset:
    """What TRL gets of them: images, prompt and completion. Pixels are read when they are needed."""
    return Dataset.from_list([{key: example[key] for key in FEATURES} for example in examples], features=FEATURES)


# 2. Answers
def write_answers(
    prompt_file,
    output_file,
    base,
    adapter=None,
    gamma=1.0,
    processor=None,
    dtype="bfloat16",
    max_new_tokens=128,
    batch_size=8,
) -> list[dict]:
    """Writes the greedy answers to a file of prompts, in their order, and returns the lines. If the output file is
    there already, it goes on where that ends. A line also says who answered, and whether the answer was cut off.

    `adapter` is a file of Image-LoRA, or a folder of LoRA or Partial LoRA. `processor` is the folder with the chat
    template, if that is not the base model's."""
    if adapter is None and gamma != 1:
        raise SystemExit("gamma is the strength of an adapter; give one, or leave gamma out")
    settings = {"base": str(base), "adapter": adapter and str(adapter), "processor": str(processor or base)}
    settings |= {"gamma": gamma, "dtype": dtype, "max_new_tokens": max_new_tokens}
    prompts = read_examples([prompt_file], required=["prompt"])
    unanswered = [settings | {"images": prompt["images"], "prompt": prompt["prompt"]} for prompt in prompts]
    answers = read_answers(output_file, unanswered)
    if len(answers) < len(prompts):
        model, processor = load_model(settings)
        with at_gamma(model, gamma), open(output_file, "a", encoding="utf-8", buffering=1) as file:
            for start in tqdm(range(len(answers), len(prompts), batch_size), "Answering"):
                batch = slice(start, start + batch_size)
                for line, (text, cut_off) in zip(unanswered[batch], generate(model, processor, prompts[batch])):
                    answer = line | {"completion": [{"role": "assistant", "content": text}], "cut_off": cut_off}
                    file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                    answers.append(answer)
    num_cut_off = sum(answer["cut_off"] for answer in answers)
    print(f"{len(answers)} answers are in {output_file}; {num_cut_off} were cut off at {max_new_tokens} tokens")
    return answers


def read_answers(file, unanswered: list[dict]) -> list[dict]:
    """The answers that an earlier start has written to the first of these lines."""
    if not Path(file).exists():
        return []
    *lines, rest = Path(file).read_text(encoding="utf-8").split("\n")
    try:
        answers = [json.loads(line) for line in lines]
        is_ours = len(answers) <= len(unanswered) and all(a | u == a for a, u in zip(answers, unanswered))
    except (ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise SystemExit(f"{file} has other lines than answers of this model to these prompts; choose another file")
    if rest:
        raise SystemExit(f"the last line of {file} is torn; delete it, and start again to go on")
    return answers


def load_model(settings: dict) -> tuple:
    """The model, which will answer greedily, and its processor."""
    processor = AutoProcessor.from_pretrained(settings["processor"])
    processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    model = AutoModelForImageTextToText.from_pretrained(settings["base"], dtype=settings["dtype"], device_map="auto")
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise SystemExit(f"the generation config of {settings['base']} names no end (eos_token_id); add it")
    # The base's other settings may sample or penalize repetition. A generated placeholder would count as an image.
    model.generation_config = GenerationConfig(
        eos_token_id=ends,
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=visual_ids(model.config),
        max_new_tokens=settings["max_new_tokens"],
    )
    if settings["adapter"] is None:
        return model, processor
    path = Path(settings["adapter"])
    if path.is_file():
        imagelora.load(model, path)
    elif not (path / "adapter_config.json").exists():
        raise SystemExit(f"{path} is neither a file of Image-LoRA nor a folder of LoRA or Partial LoRA")
    elif MARK in (path / "adapter_config.json").read_text():
        model = load_partial_lora(model, path)
    else:
        model = PeftModel.from_pretrained(model, path)
    return model, processor


def at_gamma(model, gamma: float) -> AbstractContextManager:
    """A context in which the adapter's update is multiplied by gamma. 1 is as trained, and 0 is the base model."""
    if hasattr(model, "image_lora"):
        return model.image_lora.scaled(gamma)
    if isinstance(model, PeftModel):
        return rescale_adapter_scale(model, gamma)
    return nullcontext()


def generate(model, processor, prompts: list[dict]) -> list[tuple[str, bool]]:
    """The text of each answer, with its special tokens but without its end; and whether it was cut off."""
    images = list(as_dataset(prompts)["images"])  # decoded as in training
    texts = []
    for prompt, pictures in zip(prompts, images):
        turns = prepare_multimodal_messages(prompt["prompt"], pictures)
        texts.append(processor.apply_chat_template(turns, add_generation_prompt=True))
    begin = processor.tokenizer.bos_token
    inputs = processor(
        images=images if any(images) else None,
        text=texts,
        add_special_tokens=begin is None or not texts[0].startswith(begin),  # some templates write the begin themselves
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    rows = model.generate(**inputs.to(model.device, model.dtype))[:, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    answers = []
    for tokens in rows:
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        answers.append((processor.decode(tokens[:end]).strip(), end is None))
    return answers


# 3. Own answers
def own_answers(base, image_file, question_file, output_file, one_in=8, seed=0, **options) -> None:
    """Learning without Forgetting (arXiv 1606.09282): the base model answers a question about one image in `one_in`.

    If it is stopped, start it again to go on. OUTPUT.prompts.jsonl has what is asked, and OUTPUT.answers.jsonl all
    answers. The output file has those to train on: empty ones, ones that were cut off, and loops are left out. The
    options are those of write_answers()."""
    output_file = Path(output_file)
    if output_file.exists():
        raise SystemExit(f"{output_file} is there already; choose another file")
    examples = [example for example in read_examples([image_file], required=[]) if example["images"]]
    questions = [line.strip() for line in read_lines(question_file) if line.strip()]
    if not examples or not questions:
        raise SystemExit(f"{image_file} must have images, and {question_file} a question on each line")
    random.Random(seed).shuffle(examples)
    prompt_file = output_file.with_suffix(".prompts.jsonl")
    with open(prompt_file, "w", encoding="utf-8") as file:
        for i, example in enumerate(examples[::one_in]):
            # Earlier turns may be the new task's, so only a system prompt stays.
            prompt = [turn for turn in example["prompt"] if turn["role"] == "system"]
            prompt.append({"role": "user", "content": questions[i % len(questions)]})
            file.write(json.dumps({"images": example["images"], "prompt": prompt}, ensure_ascii=False) + "\n")
    answers = write_answers(prompt_file, output_file.with_suffix(".answers.jsonl"), base, **options)
    left_out = Counter()
    with open(output_file, "w", encoding="utf-8") as file:
        for answer in answers:
            reason = reason_to_leave_out(answer)
            if reason is None:
                file.write(json.dumps({key: answer[key] for key in FEATURES}, ensure_ascii=False) + "\n")
            else:
                left_out[reason] += 1
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    print(f"{len(answers) - left_out.total()} answers are in {output_file}; left out: {reasons or 'none'}")


def reason_to_leave_out(answer: dict) -> str | None:
    """Why an answer would teach nothing good; None if it would."""
    text = answer["completion"][0]["content"]
    if answer["cut_off"]:
        return "cut off"
    if not text:
        return "empty"
    if LOOP.search(text):
        return "in a loop"
    return None
