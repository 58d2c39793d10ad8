"""Let the base model answer general questions about your images, so that training keeps what it knows.

    python -m data.huggingface.own_answers --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --train_file train.jsonl --questions questions.txt --output_file own.jsonl
    cat train.jsonl own.jsonl > mixed.jsonl

This is Learning without Forgetting (arXiv 1606.09282), which needs neither old data nor labels: the base model answers
random questions about random images of the training file, and its answers become lines for finetune.py. Write one
question on each line of questions.txt. An example to copy and change, together with finetune.py."""

import itertools
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm
from transformers.hf_argparser import HfArg
from trl import apply_chat_template, prepare_multimodal_messages

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
    seed: int = HfArg(default=0, help="chooses the questions and the images")


def read_questions(file: str, placeholder: str) -> list[str]:
    questions = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
        try:
            questions.append(line.decode().strip())
            if placeholder in questions[-1]:
                raise ValueError(f"a question contains {placeholder}; leave it out, because it is added for the image")
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
    if not any(questions):
        raise ValueError(f"{file} holds no question; write one on each line")
    return [question for question in questions if question]


def greedy_answers(model, processor, paths: list[str], prompts: list[list[dict]], max_new_tokens: int) -> list:
    """The model's answer to each prompt about its image, or None if max_new_tokens cut it off."""
    read_image = datasets.Image(mode="RGB").decode_example  # as in training: turned upright, and in three colours
    images = [[read_image({"path": path, "bytes": None})] for path in paths]
    examples = [{"prompt": prepare_multimodal_messages(prompt, image)} for prompt, image in zip(prompts, images)]
    text = [apply_chat_template(example, processor)["prompt"] for example in examples]
    padding = {"padding": True, "padding_side": "left", "add_special_tokens": False}  # as TRL will do it in training
    inputs = processor(images=images, text=text, return_tensors="pt", **padding).to(model.device, model.dtype)
    # A generated placeholder would count as an image, so we forbid it. A base may come with a penalty for repetition,
    # as Qwen2.5-VL does, and then would not answer greedily.
    greedy = {"do_sample": False, "repetition_penalty": 1.0, "suppress_tokens": [model.config.image_token_id]}
    output = model.generate(**inputs, **greedy, max_new_tokens=max_new_tokens)
    output = output[:, inputs["input_ids"].shape[1] :].cpu()
    has_ended = torch.isin(output, torch.tensor(model.generation_config.eos_token_id)).any(1)
    answers = processor.batch_decode(output, skip_special_tokens=True)
    return [answer.strip() if ended else None for answer, ended in zip(answers, has_ended)]


def main(arguments: list[str] | None = None) -> None:
    parser = transformers.HfArgumentParser(Options, usage="%(prog)s OPTIONS (--help lists them)")
    (options,) = parser.parse_args_into_dataclasses(arguments)
    if Path(options.output_file).exists():
        parser.error(f"{options.output_file} is there already; remove it, or choose another --output_file")
    processor = load_processor(options.model)
    image_token_id = transformers.AutoConfig.from_pretrained(options.model).image_token_id
    placeholder = processor.tokenizer.convert_ids_to_tokens(image_token_id)
    try:
        train = read_file(options.train_file, "own_answers", placeholder)
        questions = read_questions(options.questions, placeholder)
    except (ValueError, OSError) as error:
        parser.error(f"{error}")

    # Each image once. A system prompt, which stands before the image, is kept, because what is learned depends on it.
    system = {}
    for images, prompt in zip(train.data["images"].to_pylist(), train["prompt"]):
        system |= {image["path"]: [turn for turn in prompt if turn["role"] == "system"] for image in images}
    pairs = list(itertools.product(system, questions))
    count = max(1, round(options.share * len(train)))
    pairs = random.Random(options.seed).sample(pairs, min(count, len(pairs)))

    model = transformers.AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", device_map="auto")
    folder = Path(options.output_file).parent.resolve()  # because ".." does not lead back through a symbolic link
    lines, cut_off = [], 0
    for start in tqdm(range(0, len(pairs), options.batch_size), unit="batch"):
        batch = pairs[start : start + options.batch_size]
        paths = [path for path, _ in batch]
        prompts = [[*system[path], {"role": "user", "content": question}] for path, question in batch]
        answers = greedy_answers(model, processor, paths, prompts, options.max_new_tokens)
        for path, prompt, answer in zip(paths, prompts, answers):
            if answer is None:  # it would teach the model to stop in the middle
                cut_off += 1
            elif answer and placeholder not in answer:  # finetune.py refuses both
                completion = [{"role": "assistant", "content": answer}]
                example = {"images": [os.path.relpath(path, folder)], "prompt": prompt, "completion": completion}
                lines.append(json.dumps(example, ensure_ascii=False) + "\n")

    left_out = f"{cut_off} of {len(pairs)} answers were left out, because --max_new_tokens cut them off"
    if not lines:
        parser.error(f"no answer is left: {left_out}, and the others were empty")
    ends = Path(options.train_file).read_bytes().endswith(b"\n")  # if not, cat would join two lines
    folder.mkdir(parents=True, exist_ok=True)
    with open(options.output_file, "x", encoding="utf-8") as file:
        file.write(("" if ends else "\n") + "".join(lines))
    print(f"{options.output_file} holds {len(lines)} answers. {left_out}.")


if __name__ == "__main__":
    main()
