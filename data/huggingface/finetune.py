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
from hashlib import sha256
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from answers import as_dataset, at_gamma, read_examples, read_lines
from datasets import Dataset
from partial_lora import VisualTokens, adapted_layers, decoder_pattern
from peft import LoraConfig
from tqdm import tqdm
from transformers.hf_argparser import HfArg
from trl import SFTConfig, SFTTrainer, TrlParser

import imagelora


@dataclass(kw_only=True)
class Options(SFTConfig):
    method: Literal["image_lora", "lora", "partial_lora"]
    model: str = HfArg(help="name or folder of the base model")
    train_files: list[str] = HfArg(help="what is learned, an example a line")
    eval_files: list[str] | None = HfArg(default=None, help="their loss is measured, by default after each epoch")
    check_examples: int | None = HfArg(default=None, help="how many examples of the files are prepared first (or all)")
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


def options_of(args: Options) -> dict:
    """What a run is: its options, the contents of its files, and the number of its processes."""
    options = args.to_dict() | {"world_size": args.world_size}
    for name in ("output_dir", "resume_from_checkpoint", "local_rank"):
        del options[name]  # these may differ when the run is resumed
    texts = ["\n".join(read_lines(file)) for file in args.train_files + (args.eval_files or [])]
    options["contents"] = [sha256(text.encode()).hexdigest() for text in texts]
    return json.loads(json.dumps(options))


def begin_run(file: Path, options: dict) -> None:
    """Writes the options into the run's folder, which must be new."""
    try:
        if any(file.parent.glob("*")):
            raise FileExistsError
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "x") as run:  # fails if another run began meanwhile
            json.dump(options, run, indent=1)
    except FileExistsError:
        raise SystemExit(f"{file.parent} is not empty; resume its run, or choose another --output_dir") from None


def resume_run(file: Path, options: dict, checkpoint: Path) -> dict:
    """What is in the run's folder: its options, which must be these, and the heads of the probe."""
    if not checkpoint.is_dir() or not file.exists() or checkpoint.resolve().parent != file.resolve().parent:
        raise SystemExit(f"{checkpoint} is no checkpoint of a run in {file.parent}; give both of the same run")
    run = json.loads(file.read_text())
    others = [name for name, value in options.items() if run.get(name) != value]
    if others:
        raise SystemExit(f"the run began with other options than these: {', '.join(others)}; give those of {file}")
    return run


def check_examples(trainer: SFTTrainer, dataset: Dataset, examples: list[dict]) -> None:
    """Prepares examples as training will, shows the first one, and refuses those that would teach nonsense."""
    args, model, tokenizer = trainer.args, trainer.model, trainer.processing_class.tokenizer
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise SystemExit(f"the generation config of {args.model} names no end of an answer (eos_token_id); add it")
    ends = tokenizer.batch_decode(torch.tensor(ends).view(-1, 1))
    begin = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""
    limit = len(examples) if args.check_examples is None else max(args.check_examples, 1)
    chosen = range(0, len(examples), ceil(len(examples) / limit))
    with_images = sum(len(example["images"]) > 0 for example in examples)
    trainer.accelerator.print(f"{len(examples)} examples, {with_images} with images; {len(chosen)} are prepared")
    for i in tqdm(chosen[args.process_index :: args.world_size], "Preparing examples"):
        source = examples[i]["source"]
        try:
            batch = trainer.data_collator([dataset[i]])
        except (OSError, SyntaxError) as error:  # PIL's
            raise SystemExit(f"{source}: a picture is torn ({error}); replace it") from None
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        is_shown = (ids != ids.roll(1)) | (ids != model.config.image_token_id)  # one placeholder for each image
        text = tokenizer.decode(ids[is_shown])
        answer = tokenizer.decode(labels[is_shown & (labels != -100)])
        report = f"{source}: the model gets {text!r}\nand learns {answer!r}"
        if i == 0:
            tqdm.write(report)
        if answer.strip() in ["", *ends] or model.config.image_token_id in labels:
            raise SystemExit(f"{report}, but it must learn an answer, and no image; correct the line, or the options")
        if not (text.startswith(begin) and answer.rstrip().endswith(tuple(ends))):
            rule = f"must begin with {begin!r} and end with one of {ends}"
            raise SystemExit(f"{report}, but it {rule}; give a --chat_template_path that does, and no --max_length")


def probe(trainer: SFTTrainer) -> dict:
    """The heads that the probe finds the most influential, the same ones in all processes."""
    args, model = trainer.args, trainer.model
    if args.gradient_checkpointing:  # the Trainer begins with it only in train()
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    batches = (batch for batch in trainer.get_train_dataloader() if "pixel_values" in batch)
    scores = imagelora.score_heads(model, islice(batches, 16))
    # All processes take the heads of the first one, because each has batches of its own.
    (heads,) = broadcast_object_list([imagelora.select_heads(scores, args.num_heads)])
    trainer.accelerator.print(f"{args.num_heads} of {(scores > -torch.inf).sum()} heads by the probe: {heads}")
    return heads


def make_trainer(args: Options, run: dict) -> SFTTrainer:
    """The trainer of the base with its adapter. What the probe chooses is added to the run's file."""
    train = read_examples(args.train_files)
    evaluation = read_examples(args.eval_files) if args.eval_files else None
    if args.method != "lora" and not any(example["images"] for example in train):
        raise SystemExit(f"--method {args.method} learns from images alone, but no example in --train_files has one")
    lora = None
    if args.method != "image_lora":
        lora = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=decoder_pattern())
    datasets = {"train_dataset": as_dataset(train), "eval_dataset": evaluation and as_dataset(evaluation)}
    trainer = SFTTrainer(args.model, args, peft_config=lora, **datasets)
    check_examples(trainer, trainer.train_dataset, train)
    if evaluation:
        check_examples(trainer, trainer.eval_dataset, evaluation)

    model = trainer.model
    if args.method == "image_lora":
        heads = None  # all of them
        if "heads" in run:  # of the probe, when this run began
            heads = {int(layer): selected for layer, selected in run["heads"].items()}
        elif args.num_heads is not None:
            heads = probe(trainer)
            if args.process_index == 0:
                Path(args.output_dir, "run.json").write_text(json.dumps(run | {"heads": heads}, indent=1))
        model._keys_to_ignore_on_save = list(model.state_dict())  # so checkpoints hold the adapter alone, as PEFT's do
        adapter = imagelora.attach(model, r=args.r, lora_alpha=2 * args.r, heads=heads)  # in float32
        layers = f"{len(adapter.layers)} of {len(adapter.head_counts)} layers"
    else:
        layers = adapted_layers(model)
        if args.method == "partial_lora":
            VisualTokens(model)
    trainer.accelerator.print(f"{args.method} adapts {layers}")
    return trainer


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = TrlParser(Options, usage="%(prog)s OPTIONS (--help lists them)")
    (args,) = parser.parse_args_and_config(arguments)
    if args.num_heads is not None and args.method != "image_lora":
        parser.error("--num_heads is for --method image_lora; leave it out")
    run = options_of(args)
    run_file = Path(args.output_dir, "run.json")
    if args.resume_from_checkpoint:
        run = resume_run(run_file, run, Path(args.resume_from_checkpoint))
    elif args.process_index == 0:
        begin_run(run_file, run)
    try:
        trainer = make_trainer(args, run)
    except (SystemExit, ValueError) as error:  # a ValueError is a sentence of imagelora, PEFT or TRL
        if args.process_index == 0 and not args.resume_from_checkpoint:
            run_file.unlink()  # nothing was trained, so the folder is free again
        raise SystemExit(str(error)) from None

    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.method == "image_lora":
        trainer.model.image_lora.save(Path(args.output_dir, "adapter.pt"))
        trainer.processing_class.save_pretrained(args.output_dir)  # PEFT's folder has it, too
    else:
        trainer.save_model()
    if args.eval_files:
        for gamma in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
            with at_gamma(trainer.model, gamma):
                metrics = trainer.evaluate(metric_key_prefix=f"gamma_{gamma}")
            trainer.accelerator.print(f"gamma {gamma}: evaluation loss {metrics[f'gamma_{gamma}_loss']:.4f}")
    return trainer


if __name__ == "__main__":
    main()
