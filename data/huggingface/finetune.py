"""Fine-tune a Hugging Face vision-language model with Image-LoRA, LoRA or Partial LoRA. An example to copy and change.

    python finetune.py --method image_lora --model Qwen/Qwen2.5-VL-7B-Instruct --learning_rate 8e-4 \\
        --train_files train.jsonl --output_dir runs/image_lora

Each line of a file is an example, of which only the completion is learned. Its images come before the first question,
and their paths are relative to the file:

    {"images": ["page.png"], "prompt": [{"role": "user", "content": "Where is the search box?"}],
     "completion": [{"role": "assistant", "content": "(412, 88)"}]}
"""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import PIL.Image
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Image
from partial_lora import MARK, VisualTokens, visual_ids
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
    train_files: list[str] = HfArg(help="what is learned, an example a line")
    eval_files: list[str] | None = HfArg(default=None, help="their loss is measured, by default after each epoch")
    r: int = HfArg(default=8, help="rank; alpha is 2 r")
    num_heads: int | None = HfArg(default=None, help="how many heads Image-LoRA adapts, the best by the probe (or all)")
    learning_rate: float = HfArg(help="TRL's default is for full fine-tuning, so give one")
    max_length: int | None = HfArg(default=None, help="TRL's default would cut answers off")
    bf16: bool | None = HfArg(default=False, help="TRL's default, autocast, would round the adapter")

    def __post_init__(self):
        if self.eval_files and self.eval_strategy == "no":
            self.eval_strategy = "epoch"
        super().__post_init__()
        self.model_init_kwargs = {"dtype": "bfloat16"} | (self.model_init_kwargs or {})


def read_examples(files: list[str]) -> Dataset:
    """The lines of these files. (load_dataset() could take answers for dates.) Pixels are read when they are needed."""
    examples = []
    for file in map(Path, files):
        for number, line in enumerate(file.open(encoding="utf-8-sig"), start=1):
            if line.strip():
                # A column that the first example lacks would be missing from all.
                example = {"images": [], "prompt": [], "completion": []} | json.loads(line)
                example["source"] = f"{file}, line {number}"
                if not all(isinstance(turn["content"], str) for turn in example["prompt"] + example["completion"]):
                    raise SystemExit(f"{example['source']}: a turn's content must be a text; images go into 'images'")
                example["images"] = [str((file.parent / path).resolve()) for path in example["images"]]
                if any(PIL.Image.open(path).mode.startswith(("I", "F")) for path in example["images"]):
                    raise SystemExit(f"{example['source']}: an image of over 8 bits would turn white; save it with 8")
                examples.append(example)
    return Dataset.from_list(examples).cast_column("images", [Image(mode="RGB")])


def check_examples(trainer: SFTTrainer, examples: Dataset) -> None:
    """Prepares each example as training will, shows the first one, and refuses those that would teach nonsense."""
    args, model, tokenizer = trainer.args, trainer.model, trainer.processing_class.tokenizer
    begin = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""
    ends = tokenizer.batch_decode(torch.tensor(model.generation_config.eos_token_id).view(-1, 1))
    for i in tqdm(range(args.process_index, len(examples), args.world_size), "Checking the examples"):
        example = examples[i]
        roles = [turn["role"] for turn in example["prompt"][-1:] + example["completion"]]
        if roles != ["user", "assistant"]:
            rule = "its prompt must end with the user's turn, and its completion be one turn of the assistant"
            raise SystemExit(f"{example['source']}: {rule}; correct the line")
        batch = trainer.data_collator([example])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        is_shown = (ids != ids.roll(1)) | (ids != model.config.image_token_id)  # one placeholder for each image
        text = tokenizer.decode(ids[is_shown])
        answer = tokenizer.decode(labels[is_shown & (labels != -100)])
        report = f"{example['source']}: the model gets {text!r}\nand learns {answer!r}"
        if i == 0:
            tqdm.write(report)
        if answer.strip() in ["", *ends] or model.config.image_token_id in labels:
            raise SystemExit(f"{report}, but it must learn an answer, and no image; correct the line, or the options")
        if not (text.startswith(begin) and answer.rstrip().endswith(tuple(ends))):
            rule = f"must begin with {begin!r} and end with one of {ends}"
            raise SystemExit(f"{report}, but it {rule}; give a --chat_template_path that does, and no --max_length")


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = TrlParser(Options, usage="%(prog)s OPTIONS (--help lists them)")
    (args,) = parser.parse_args_and_config(arguments)
    if any(Path(args.output_dir).glob("*")) and not args.resume_from_checkpoint:
        parser.error(f"{args.output_dir} holds an earlier run; choose another --output_dir, or resume that run")
    if args.num_heads is not None and args.method != "image_lora":
        parser.error("--num_heads is for --method image_lora; leave it out")
    if args.resume_from_checkpoint:
        config = Path(args.resume_from_checkpoint, "adapter_config.json")
        saved = "image_lora"
        if config.exists():
            saved = "partial_lora" if MARK in config.read_text() else "lora"
        if saved != args.method:  # PEFT would go on with a LoRA as Partial LoRA, and the reverse
            parser.error(f"{args.resume_from_checkpoint} is not of --method {args.method}; resume a checkpoint that is")
    train = read_examples(args.train_files)
    if args.method != "lora" and not any(train.cast_column("images", [Image(decode=False)])["images"]):
        parser.error(f"--method {args.method} learns from images alone, but no example in --train_files has one")
    evaluation = read_examples(args.eval_files) if args.eval_files else None
    targets = r".*(language|text)_model\.layers\..*\.[qkvo]_proj"  # of the decoder; vision towers have them, too
    lora = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=targets) if args.method != "image_lora" else None
    trainer = SFTTrainer(args.model, args, train_dataset=train, eval_dataset=evaluation, peft_config=lora)
    check_examples(trainer, train)
    if evaluation:
        check_examples(trainer, evaluation)

    model = trainer.model
    if args.method == "partial_lora":
        VisualTokens(model)
    elif args.method == "image_lora":
        heads = None  # all of them
        if args.num_heads is not None:
            if args.gradient_checkpointing:  # the Trainer begins with it only in train()
                model.train().gradient_checkpointing_enable({"use_reentrant": False})
            batches = (batch for batch in trainer.get_train_dataloader() if "pixel_values" in batch)
            scores = imagelora.score_heads(model, islice(batches, 16))
            # All processes take the heads of the first one, because each has batches of its own.
            (heads,) = broadcast_object_list([imagelora.select_heads(scores, args.num_heads)])
            trainer.accelerator.print(f"{args.num_heads} heads, the best of {scores.numel()} by the probe: {heads}")
        model._keys_to_ignore_on_save = list(model.state_dict())  # so checkpoints hold the adapter alone, as PEFT's do
        adapter = imagelora.attach(model, r=args.r, lora_alpha=2 * args.r, heads=heads)  # in float32

    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.method == "image_lora":
        adapter.save(Path(args.output_dir, "adapter.pt"))
    else:
        trainer.save_model()
    return trainer


def own_answers(base, image_file, question_file, output_file, one_in=8, max_new_tokens=128, seed=0) -> None:
    """Learning without Forgetting (arXiv 1606.09282): the base model answers a question about one image in `one_in`."""
    examples = read_examples([image_file]).cast_column("images", [Image(decode=False)]).shuffle(seed)
    examples = [example for example in examples if example["images"]][::one_in]
    questions = [line.strip() for line in Path(question_file).open(encoding="utf-8-sig") if line.strip()]
    processor = AutoProcessor.from_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto", device_map="auto")
    # The base's other settings may sample or penalize repetition. A generated placeholder would count as an image.
    settings = {"eos_token_id": model.generation_config.eos_token_id, "suppress_tokens": visual_ids(model.config)}
    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, **settings)
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with open(output_file, "x", encoding="utf-8", buffering=1) as file:  # writes each line at once
        for i, example in enumerate(tqdm(examples)):
            # Earlier turns may be the new task's, so only a system prompt stays.
            prompt = [turn for turn in example.get("prompt") or [] if turn["role"] == "system"]
            prompt.append({"role": "user", "content": questions[i % len(questions)]})
            images = [image["path"] for image in example["images"]]
            inputs = processor.apply_chat_template(prepare_multimodal_messages(prompt, images), **template)
            tokens = model.generate(**inputs.to(model.device, model.dtype))[0, inputs["input_ids"].shape[1] :]
            answer = processor.decode(tokens[:-1]).strip()  # with its special tokens, but without its end
            if answer and len(tokens) < max_new_tokens:
                example = {"images": images, "prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
                file.write(json.dumps(example, ensure_ascii=False) + "\n")
    num_answers = Path(output_file).read_text(encoding="utf-8").count("\n")
    print(f"{num_answers} of {len(examples)} answers; the others are left out, because they are empty or were cut off")


if __name__ == "__main__":
    main()
