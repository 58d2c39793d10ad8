"""Asks a model as finetune.py trains it: with the same chat template, the same ids and the same pixels."""

import re
from contextlib import AbstractContextManager

import torch
from examples import as_dataset
from peft.helpers import rescale_adapter_scale
from tqdm import tqdm
from trl import apply_chat_template, prepare_multimodal_messages

PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
LOOP = re.compile(r"(.{4,200}?)\1{3}", re.DOTALL)  # a piece of text, four times in a row


def answer(model, processor, examples: list[dict], max_new_tokens=64, batch_size=8) -> list[str]:
    """The greedy answer to each prompt, of a model with any of the three adapters or none, without spaces around it."""
    return [text for text, _ in generate(model, processor, examples, max_new_tokens, batch_size)]


def at_gamma(model, gamma: float) -> AbstractContextManager:
    """A context in which the adapter's update is multiplied by gamma. 1 is as trained, and 0 is the base model."""
    if hasattr(model, "image_lora"):
        return model.image_lora.scaled(gamma)
    return rescale_adapter_scale(model, gamma)


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
    for example, (text, has_ended) in zip(asked, generate(model, processor, asked, max_new_tokens)):
        if has_ended and text and not LOOP.search(text):
            own.append(example | {"completion": [{"role": "assistant", "content": text}]})
    print(f"{len(own)} of {len(asked)} answers can be learned")
    return own


def generate(model, processor, examples: list[dict], max_new_tokens: int, batch_size=8) -> list[tuple[str, bool]]:
    """Each answer, and whether it has ended. It keeps special tokens, such as those that mark a box."""
    ends = model.generation_config.eos_token_id  # one or a list
    # The base's own settings may sample or penalize repetition. A generated placeholder would count as an image.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    greedy["suppress_tokens"] = sorted({getattr(model.config, name, None) for name in PLACEHOLDERS} - {None})
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
            text = processor.decode(row[: is_end.int().argmax()] if is_end.any() else row).strip()
            answers.append((text.removeprefix(opening.strip()).strip(), bool(is_end.any())))
    return answers


def as_in_training(processor, prompt: list[dict], pictures: list) -> tuple[str, str]:
    """The prompt as TRL shows it in training, and what the chat template writes between it and an answer. In Qwen3.5,
    for example, that is the end of an empty thought."""
    completion = prepare_multimodal_messages([{"role": "assistant", "content": "ANSWER"}])
    turns = {"prompt": prepare_multimodal_messages(prompt, pictures), "completion": completion}
    texts = apply_chat_template(turns, processor)
    return texts["prompt"], texts["completion"].partition("ANSWER")[0]
