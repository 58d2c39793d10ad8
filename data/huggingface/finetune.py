"""Fine-tune a Hugging Face vision-language model with Image-LoRA, LoRA or Partial LoRA. An example to copy and change.

    python finetune.py --method image_lora --model Qwen/Qwen2.5-VL-7B-Instruct --learning_rate 8e-4 \\
        --train_files train.jsonl --output_dir runs/image_lora

Only the completion of a line is learned. Images, whose paths are relative to the file, come before the first question:

    {"images": ["page.png"], "prompt": [{"role": "user", "content": "Where is the search box?"}],
     "completion": [{"role": "assistant", "content": "(412, 88)"}]}

own_answers() writes such a file, so that training keeps what the base model knows.
"""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Image
from partial_lora import VisualTokens
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.hf_argparser import HfArg
from trl import SFTConfig, SFTTrainer, TrlParser, prepare_multimodal_messages

import imagelora


@dataclass(kw_only=True)
class Options(SFTConfig):
    method: Literal["image_lora", "lora", "partial_lora"]
    model: str = HfArg(help="name or folder of the base model")
    train_files: list[str] = HfArg(help="what is learned, a conversation a line")
    eval_files: list[str] | None = HfArg(default=None, help="their loss is measured, by default after each epoch")
    r: int = HfArg(default=8, help="rank; alpha is 2 r")
    num_heads: int | None = HfArg(default=None, help="how many heads Image-LoRA adapts, the best by the probe (or all)")
    learning_rate: float = HfArg(help="TRL's default is for full fine-tuning, so give one")
    max_length: int | None = HfArg(default=None, help="TRL's default would cut answers off")
    bf16: bool | None = HfArg(default=False, help="TRL's default, autocast, would round the adapter")


def read(files: list[str]) -> Dataset:
    """The lines of these files. (load_dataset() could take answers for dates.) Images are read when they are needed."""
    examples = []
    for file in map(Path, files):
        for line in filter(str.strip, file.open(encoding="utf-8-sig")):
            example = json.loads(line)
            example["images"] = [str((file.parent / path).resolve(strict=True)) for path in example["images"]]
            examples.append(example)
    return Dataset.from_list(examples).cast_column("images", [Image(mode="RGB")])


def main(arguments: list[str] | None = None) -> SFTTrainer:
    (args,) = TrlParser(Options, usage="%(prog)s OPTIONS (--help lists them)").parse_args_and_config(arguments)
    if any(Path(args.output_dir).glob("*")) and not args.resume_from_checkpoint:
        raise SystemExit(f"{args.output_dir} holds an earlier run; choose another --output_dir")
    if args.eval_files and args.eval_strategy == "no":
        args.eval_strategy = "epoch"
    train, evaluation = read(args.train_files), read(args.eval_files) if args.eval_files else None
    args.model_init_kwargs = {"dtype": "bfloat16"} | (args.model_init_kwargs or {})
    targets = r".*(language|text)_model\.layers\..*\.[qkvo]_proj"  # of the decoder; vision towers have them, too
    lora = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=targets) if args.method != "image_lora" else None
    trainer = SFTTrainer(args.model, args, None, train, evaluation, peft_config=lora)
    model, tokenizer, say = trainer.model, trainer.processing_class.tokenizer, trainer.accelerator.print

    batch = trainer.data_collator([train[0]])  # we show it, because a chat template can leave tokens out
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    shown = (ids != ids.roll(1)) | (ids != model.config.image_token_id)  # of each image one placeholder
    text, learned = tokenizer.decode(ids[shown]), tokenizer.decode(labels[shown & (labels != -100)])
    say(f"The first example: {text!r}\nWhat is learned of it: {learned!r}")
    begin = tokenizer.decode(tokenizer("").input_ids)
    ends = tokenizer.batch_decode(torch.tensor(model.generation_config.eos_token_id).view(-1, 1))
    if not (text.startswith(begin) and learned.rstrip().endswith(tuple(ends))):
        raise SystemExit(f"It must begin with {begin!r} and end with one of {ends}; mend it by --chat_template_path")

    if args.method == "partial_lora":
        VisualTokens(model)
    elif args.method == "image_lora":
        heads = None  # all of them
        if args.num_heads is not None:
            if args.gradient_checkpointing:
                model.train().gradient_checkpointing_enable({"use_reentrant": False})
            batches = (batch for batch in trainer.get_train_dataloader() if "pixel_values" in batch)
            scores = imagelora.score_heads(model, islice(batches, 16))
            # All processes take the heads of the first one, because each of them rounds in its own way.
            (heads,) = broadcast_object_list([imagelora.select_heads(scores, args.num_heads)])
            say(f"{args.num_heads} heads, the best of {scores.numel()} by the probe: {heads}")
        model._keys_to_ignore_on_save = list(model.state_dict())  # so checkpoints hold the adapter alone, as PEFT's do
        adapter = imagelora.attach(model, r=args.r, lora_alpha=2 * args.r, heads=heads)  # in float32

    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.method == "image_lora":
        adapter.save(Path(args.output_dir, "adapter.pt"))
    else:
        trainer.save_model()
    return trainer


def own_answers(base, image_file, question_file, output_file, one_in=8, max_new_tokens=128, seed=0) -> None:
    """Learning without Forgetting (arXiv 1606.09282): the base model answers a question about one line in eight."""
    lines = read([image_file]).cast_column("images", [Image(decode=False)]).shuffle(seed).shard(one_in, 0)
    questions = [line.strip() for line in Path(question_file).open(encoding="utf-8-sig") if line.strip()]
    processor = AutoProcessor.from_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto", device_map="auto")
    # The base's other settings may sample or penalize repetition. A generated placeholder would count as an image.
    settings = {"eos_token_id": model.generation_config.eos_token_id, "suppress_tokens": [model.config.image_token_id]}
    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, **settings)
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with open(output_file, "x", encoding="utf-8", buffering=1) as file:
        for i, line in enumerate(tqdm(lines)):
            # Earlier turns may be the new task's, so only a system prompt stays.
            prompt = [turn for turn in line.get("prompt") or [] if turn["role"] == "system"]
            prompt.append({"role": "user", "content": questions[i % len(questions)]})
            images = [image["path"] for image in line["images"]]
            inputs = processor.apply_chat_template(prepare_multimodal_messages(prompt, images), **template)
            tokens = model.generate(**inputs.to(model.device, model.dtype))[0, inputs["input_ids"].shape[1] :]
            answer = processor.decode(tokens[:-1]).strip()
            if answer and len(tokens) < max_new_tokens:
                example = {"images": images, "prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
                file.write(json.dumps(example, ensure_ascii=False) + "\n")
            else:
                tqdm.write(f"Left out, because it is empty or was cut off: {answer!r}")


if __name__ == "__main__":
    main()
