"""Fine-tune a Hugging Face vision-language model with Image-LoRA, LoRA or Partial LoRA. An example to copy and change.

    python -m data.huggingface.finetune --method image_lora --learning_rate 8e-4 --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --train_file train.jsonl --output_dir runs/image_lora

Each line of a file is a conversation, of which only the completion is learned. Images are put before the user's first
message, and their paths are relative to the file's folder:

    {"images": ["page.png"],
     "prompt": [{"role": "user", "content": "Where is the search box?"}],
     "completion": [{"role": "assistant", "content": "(412, 88)"}]}
"""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import datasets
import peft
import PIL.Image
import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers.hf_argparser import HfArg
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import imagelora

if __package__:  # python -m data.huggingface.finetune
    from data.huggingface.partial_lora import partial_lora
else:  # a copy of this file, beside a copy of partial_lora.py
    from partial_lora import partial_lora


@dataclass
class Options:
    method: Literal["image_lora", "lora", "partial_lora"]
    model: str = HfArg(help="name or folder of the base model")
    train_file: str = HfArg(help="what is learned, a conversation a line")
    eval_file: str | None = HfArg(default=None, help="its loss is measured when --eval_strategy says so")
    r: int = HfArg(default=8, help="rank; alpha is 2 r")
    num_heads: int | None = HfArg(default=None, help="how many heads Image-LoRA adapts, the best by the probe (or all)")


def load_processor(model: str) -> transformers.ProcessorMixin:
    """The model's processor. If its tokenizer begins a text with a BOS token and its chat template does not, as that of
    LLaVA-1.5, the template gets one, because TRL takes a template's text as it is."""
    processor = transformers.AutoProcessor.from_pretrained(model)
    tokenizer = processor.tokenizer
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    if tokenizer("a").input_ids[0] == tokenizer.bos_token_id and not text.startswith(tokenizer.bos_token):
        processor.chat_template = tokenizer.bos_token + processor.chat_template
    return processor


def read_file(file: str, method: str, placeholder: str) -> datasets.Dataset:
    """The examples of a file. Images are read when an example is needed."""
    examples = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
        try:
            if line.strip():
                examples.append(checked_example(json.loads(line), Path(file).parent, placeholder))
        except Exception as error:
            raise ValueError(f"{file}, line {number}: {type(error).__name__}: {error}") from None
    if not examples:
        raise ValueError(f"{file} holds no example")
    # Without images the loss never changes, so the first checkpoint would count as the best one.
    if method != "lora" and not any(example["images"] for example in examples):
        raise ValueError(f"no example of {file} has an image, as {method} needs")
    turns = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    features = {"images": [datasets.Image(mode="RGB")], "prompt": turns, "completion": turns}
    return datasets.Dataset.from_list(examples, datasets.Features(features))


def checked_example(example: dict, folder: Path, placeholder: str) -> dict:
    if sorted(example) != ["completion", "images", "prompt"]:
        raise ValueError("a line needs images, prompt and completion, and nothing else")
    turns = example["prompt"] + example["completion"]
    if len(example["completion"]) != 1 or [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
        raise ValueError("the prompt must end with a turn of the user; the completion is one turn of the assistant")
    if not all(isinstance(turn["content"], str) for turn in turns) or not turns[-1]["content"].strip():
        raise ValueError("the content of a turn must be a string, and that of the completion must not be empty")
    if any(placeholder in turn["content"] for turn in turns):
        raise ValueError(f"a text contains {placeholder}; leave it out, because it is added for each image")
    paths = [str(folder / path) for path in example["images"]]
    for path in paths:
        with PIL.Image.open(path) as image:  # reads no pixels yet
            if image.mode.startswith(("I", "F")):  # as RGB, most of its pixels would be white
                raise ValueError(f"{path} has more than 8 bits a channel; save it with 8")
    return example | {"images": paths}


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = transformers.HfArgumentParser((Options, SFTConfig), usage="%(prog)s OPTIONS (--help lists them)")
    # Two defaults of TRL do not fit: max_length would cut answers off, and bf16 means autocast, which rounds adapters.
    parser.set_defaults(max_length=None, bf16=False)
    options, args = parser.parse_args_into_dataclasses(arguments)
    if options.num_heads is not None and options.method != "image_lora":
        parser.error("--num_heads is for --method image_lora; leave it out")

    processor = load_processor(options.model)
    image_token_id = transformers.AutoConfig.from_pretrained(options.model).image_token_id
    placeholder = processor.tokenizer.convert_ids_to_tokens(image_token_id)
    try:
        train = read_file(options.train_file, options.method, placeholder)
        evaluation = read_file(options.eval_file, options.method, placeholder) if options.eval_file else None
    except (ValueError, OSError) as error:
        parser.error(f"{error}")
    # Labels are the tokens of the completion. All others are -100: the prompt, placeholders of images, and padding.
    collate = DataCollatorForVisionLanguageModeling(processor, args.max_length, completion_only_loss=True)

    model = transformers.AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.bfloat16)
    heads = None  # all of them
    if options.num_heads is not None:
        # The probe judges the heads on 16 batches of examples that have images.
        model.to(args.device)
        if args.gradient_checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        paths = train.data["images"]  # train["images"] would open them all
        examples = train.select([i for i in range(len(train)) if len(paths[i]) > 0]).shuffle(args.seed)
        batches = torch.utils.data.DataLoader(examples, args.per_device_train_batch_size, collate_fn=collate)
        scores = imagelora.score_heads(model, (batch.to(args.device) for batch in islice(batches, 16)))
        # All processes take the heads of the first one, because each of them rounds in its own way.
        (heads,) = broadcast_object_list([imagelora.select_heads(scores, options.num_heads)])
        print(f"{options.num_heads} heads, the best of {scores.numel()} by the probe: {heads}")

    transformers.set_seed(args.seed)  # because the matrix A starts at random
    if options.method == "image_lora":
        model._keys_to_ignore_on_save = list(model.state_dict())  # so checkpoints hold the adapter alone, as PEFT's do
        adapter = imagelora.attach(model, r=options.r, lora_alpha=2 * options.r, heads=heads)  # in float32
    elif options.method == "partial_lora":
        model = partial_lora(model, r=options.r, lora_alpha=2 * options.r)
    else:
        targets = r".*(language|text)_model.*\.[qkvo]_proj"  # of the decoder, because vision towers have them, too
        config = peft.LoraConfig(r=options.r, lora_alpha=2 * options.r, target_modules=targets)
        model = peft.get_peft_model(model, config)

    trainer = SFTTrainer(model, args, collate, train, evaluation, processor)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if options.method == "image_lora":
        adapter.save(Path(args.output_dir, "adapter.pt"))
    else:
        trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
