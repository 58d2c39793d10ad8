"""Asks a model as finetune.py trains it: with the same chat template, the same ids and the same pixels.

    examples = read_examples("val.jsonl")
    with at_gamma(model, 0.8):
        texts = answer(model, processor, examples)

The model may have an Image-LoRA, a LoRA, a Partial LoRA or none."""

import re
from contextlib import AbstractContextManager

from examples import as_dataset
from peft.helpers import rescale_adapter_scale
from tqdm import tqdm
from trl import apply_chat_template, prepare_multimodal_messages

PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
LOOP = re.compile(r"(.{4,200}?)\1{3}", re.DOTALL)  # a piece of text, four times in a row


def answer(model, processor, examples: list[dict], max_new_tokens=64, batch_size=8) -> list[str]:
    """The greedy answer to each prompt, as text that can be compared with an example's completion, both stripped."""
    return [text for text, _ in generate(model, processor, examples, max_new_tokens, batch_size)]


def at_gamma(model, gamma: float) -> AbstractContextManager:
    """A context in which the adapter's update is multiplied by gamma. 1 is as trained, and 0 is the base model."""
    if hasattr(model, "image_lora"):
        return model.image_lora.scaled(gamma)
    return rescale_adapter_scale(model, gamma)


def own_answers(model, processor, examples: list[dict], questions: list[str], one_in=8, max_new_tokens=64) -> list:
    """Learning without Forgetting (arXiv 1606.09282): what a base model answers to other questions, to train on, too.

    It gets one of these questions about one image in `one_in`. Answers that are empty, that did not end within
    max_new_tokens or that repeat themselves are left out."""
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
    print(f"{len(own)} of {len(asked)} answers can be learned; the others were empty, too long or repeated themselves")
    return own


def generate(model, processor, examples: list[dict], max_new_tokens: int, batch_size=8) -> list[tuple[str, bool]]:
    """Each answer, and whether it has ended. It keeps special tokens, such as those that mark a box."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise ValueError("model.generation_config names no end of an answer; set its eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    # The base's own settings may sample or penalize repetition. A generated placeholder would count as an image.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    greedy["suppress_tokens"] = sorted({getattr(model.config, name, None) for name in PLACEHOLDERS} - {None})
    answers = []
    for start in tqdm(range(0, len(examples), batch_size), "Answering"):
        batch = examples[start : start + batch_size]
        images = list(as_dataset(batch)["images"])
        texts = [as_in_training(processor, example["prompt"], pictures) for example, pictures in zip(batch, images)]
        options = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
        prompts = [prompt for prompt, _ in texts]
        inputs = processor(images=images if any(images) else None, text=prompts, **options)
        inputs = inputs.to(model.device, model.dtype)
        output = model.generate(**inputs, **greedy, max_new_tokens=max_new_tokens)
        for (_, opening), tokens in zip(texts, output[:, inputs["input_ids"].shape[1] :].tolist()):
            end = next((i for i, token in enumerate(tokens) if token in ends), None)
            text = processor.decode(tokens[:end]).strip()
            answers.append((text.removeprefix(opening.strip()).strip(), end is not None))
    return answers


def as_in_training(processor, prompt: list[dict], pictures: list) -> tuple[str, str]:
    """The prompt as TRL gives it to the model in training, and what the template writes between it and an answer.
    For the template of Qwen3.5, for example, that is the end of an empty thought: "</think>"."""
    completion = prepare_multimodal_messages([{"role": "assistant", "content": "ANSWER"}])
    turns = {"prompt": prepare_multimodal_messages(prompt, pictures), "completion": completion}
    texts = apply_chat_template(turns, processor)
    return texts["prompt"], texts["completion"].partition("ANSWER")[0]
