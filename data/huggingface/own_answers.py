"""Let the base model answer general questions about your images, so that training keeps what it knows.

    python -m data.huggingface.own_answers --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --train_file train.jsonl --questions questions.txt --output_file own.jsonl
    cat train.jsonl own.jsonl > mixed.jsonl

This is Learning without Forgetting (arXiv 1606.09282). Each new line is a random line of the training file, but with a
random question of questions.txt and the base model's answer to it. An example to copy, together with finetune.py and
partial_lora.py."""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.image_utils import load_image
from trl import prepare_multimodal_messages

if __package__:  # python -m data.huggingface.own_answers
    from data.huggingface.finetune import load_processor, read_file
else:  # a copy of this file, beside a copy of finetune.py
    from finetune import load_processor, read_file


@dataclass
class Options:
    model: str = HfArg(help="name or folder of the base model")
    train_file: str = HfArg(help="a file for finetune.py; the questions are about its images")
    questions: str = HfArg(help="a text file, a question a line")
    output_file: str = HfArg(help="the new file, best in the folder of the training file")
    share: float = HfArg(default=0.125, help="how many questions are asked, as a share of the training file's lines")
    max_new_tokens: int = HfArg(default=128, help="longer answers are left out")
    batch_size: int = HfArg(default=8, help="how many questions are answered at once")
    seed: int = HfArg(default=0, help="chooses the lines and the questions")


def greedy_answers(model, processor, examples: list[dict], max_new_tokens: int) -> list[str]:
    """The model's answer to the prompt of each example, or "" if max_new_tokens cut it off."""
    images = [[load_image(image["path"]) for image in example["images"]] for example in examples]  # upright, in RGB
    messages = [prepare_multimodal_messages(example["prompt"], own) for example, own in zip(examples, images)]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    padding = {"padding": True, "padding_side": "left", "add_special_tokens": False}  # as TRL does in training
    inputs = processor(images=images, text=text, return_tensors="pt", **padding).to(model.device, model.dtype)
    # We drop the base's other settings, because they may sample or penalize repetition.
    end = model.generation_config.eos_token_id or processor.tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=processor.tokenizer.pad_token_id)
    # A generated placeholder would count as an image, so we forbid it.
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, suppress_tokens=[model.config.image_token_id])
    output = output[:, inputs["input_ids"].shape[1] :].cpu()
    has_ended = torch.isin(output, torch.tensor(end)).any(1)
    answers = processor.batch_decode(output, skip_special_tokens=True)
    return [answer.strip() if ended else "" for answer, ended in zip(answers, has_ended)]


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(Options, usage="%(prog)s OPTIONS (--help lists them)")
    (options,) = parser.parse_args_into_dataclasses(arguments)
    folder = Path(options.output_file).parent.resolve()  # because ".." does not lead back through a symbolic link
    if Path(options.output_file).exists() or not folder.is_dir():
        parser.error(f"{options.output_file} is there already, or its folder is missing; choose another --output_file")
    processor = load_processor(options.model)
    image_token_id = AutoConfig.from_pretrained(options.model).image_token_id
    placeholder = processor.tokenizer.convert_ids_to_tokens(image_token_id)
    try:
        train = read_file(options.train_file, "own_answers", placeholder)
        text = Path(options.questions).read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(f"{error}")
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions or placeholder in text:
        parser.error(f"{options.questions} needs a question on each line, and none may contain {placeholder}")

    rng = random.Random(options.seed)
    examples = [example for example in train.data.to_pylist() if example["images"]]  # with paths; train has pixels
    rng.shuffle(examples)
    examples = examples[: max(1, round(options.share * len(train)))]
    for example in examples:
        # Earlier turns may be the new task's, so only a system prompt stays.
        system = [turn for turn in example["prompt"] if turn["role"] == "system"]
        example["prompt"] = [*system, {"role": "user", "content": rng.choice(questions)}]

    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", device_map="auto")
    lines = []
    for batch in tqdm(torch.utils.data.DataLoader(examples, options.batch_size, collate_fn=list)):
        answers = greedy_answers(model, processor, batch, options.max_new_tokens)
        for example, answer in zip(batch, answers):
            if answer:
                example["images"] = [os.path.relpath(image["path"], folder) for image in example["images"]]
                example["completion"][0]["content"] = answer
                lines.append(json.dumps(example, ensure_ascii=False) + "\n")

    if not lines:
        parser.error("no answer is left, because all were longer than --max_new_tokens, or empty")
    # The first line is empty, because cat would join it to a last line without a newline.
    Path(options.output_file).write_text("\n" + "".join(lines), encoding="utf-8")
    print(f"{len(lines)} answers; {len(examples) - len(lines)} others were longer than --max_new_tokens, or empty")


if __name__ == "__main__":
    main()
