"""Fine-tune a Hugging Face vision-language model with Image-LoRA, LoRA or Partial LoRA. An example to copy and change.

examples.py shows what is in a file. Only the completions are learned."""

import json
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from examples import as_dataset, read_examples
from partial_lora import ATTENTION, VisualTokens, adapted_layers, decoder_pattern
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoProcessor
from transformers.hf_argparser import HfArg
from trl import SFTConfig, SFTTrainer, TrlParser

import imagelora


@dataclass(kw_only=True)
class Options(SFTConfig):
    method: Literal["image_lora", "lora", "partial_lora"]
    model: str = HfArg(help="name or folder of the base model")
    processor: str | None = HfArg(default=None, help="folder of its processor, if you have changed that")
    train_files: list[str] = HfArg(help="what is learned, an example a line")
    eval_files: list[str] | None = HfArg(default=None, help="their loss is measured, by default after each epoch")
    r: int = HfArg(default=8, help="rank; alpha is 2 r")
    num_heads: int | None = HfArg(default=None, help="how many heads Image-LoRA adapts, the best by the probe (or all)")
    projections: list[str] | None = HfArg(default=None, help="what the LoRAs adapt (or q_proj k_proj v_proj o_proj)")
    learning_rate: float = HfArg(help="TRL's default is for full fine-tuning, so give one")
    max_length: int | None = HfArg(default=None, help="TRL's default would cut answers off")
    bf16: bool | None = HfArg(default=False, help="TRL's default, autocast, would round the adapter")

    def __post_init__(self):
        if self.eval_files and self.eval_strategy == "no":
            self.eval_strategy = "epoch"
        super().__post_init__()
        self.model_init_kwargs = {"dtype": "bfloat16"} | (self.model_init_kwargs or {})


def make_trainer(args: Options, run: dict) -> SFTTrainer:
    """The trainer of the base with its adapter. The heads that the probe chooses are added to the run."""
    train = read_examples(*args.train_files)
    evaluation = as_dataset(read_examples(*args.eval_files)) if args.eval_files else None
    if args.method != "lora" and not any(example["images"] for example in train):
        raise SystemExit(f"--method {args.method} learns from images alone, but no example in --train_files has one")
    projections = args.projections or ATTENTION
    lora = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=decoder_pattern(projections))
    options = {"processing_class": AutoProcessor.from_pretrained(args.processor or args.model)}
    options["peft_config"] = None if args.method == "image_lora" else lora
    trainer = SFTTrainer(args.model, args, train_dataset=as_dataset(train), eval_dataset=evaluation, **options)
    check_examples(trainer, train)
    model = trainer.model
    if args.method == "image_lora":
        if args.num_heads is not None and "heads" not in run:
            run["heads"] = probe(trainer)
        model._keys_to_ignore_on_save = list(model.state_dict())  # so checkpoints hold the adapter alone, as PEFT's do
        adapter = imagelora.attach(model, r=args.r, lora_alpha=2 * args.r, heads=run.get("heads"))  # or all
        adapted = f"v_proj in {len(adapter.layers)} of {len(adapter.head_counts)} layers"
    else:
        missing = [name for name in projections if not any(m.endswith(f".{name}") for m in model.targeted_module_names)]
        if missing:
            raise SystemExit(f"the decoder of {args.model} has no {', '.join(missing)}; correct --projections")
        if args.method == "partial_lora":
            VisualTokens(model)
        adapted = f"{', '.join(projections)} in {adapted_layers(model)}"
    trainer.accelerator.print(f"{args.method} adapts {adapted}")
    return trainer


def check_examples(trainer: SFTTrainer, examples: list[dict]) -> None:
    """Prepares examples as training will, shows the first one, and refuses those that have no begin or no end."""
    args, model, tokenizer = trainer.args, trainer.model, trainer.processing_class.tokenizer
    ends = tuple(tokenizer.batch_decode(torch.tensor(model.generation_config.eos_token_id).view(-1, 1)))
    begin = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""
    checked = range(0, len(examples), ceil(len(examples) / 1000))  # at most a thousand
    with_images = sum(len(example["images"]) > 0 for example in examples)
    trainer.accelerator.print(f"{len(examples)} examples, {with_images} with images; {len(checked)} are prepared")
    for i in tqdm(checked, "Preparing examples", disable=args.process_index > 0):
        batch = trainer.data_collator([trainer.train_dataset[i]])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        is_shown = (ids != ids.roll(1)) | (ids != model.config.image_token_id)  # one placeholder for each image
        text = tokenizer.decode(ids[is_shown])
        answer = tokenizer.decode(labels[labels != -100])
        report = f"{examples[i]['source']}: the model gets {text!r}\nand learns {answer!r}"
        if i == args.process_index == 0:
            tqdm.write(report)
        if not (text.startswith(begin) and answer.rstrip().endswith(ends)):
            rule = f"it must begin with {begin!r} and end with one of {ends}; give a --processor whose template does"
            raise SystemExit(f"{report}, but {rule}, and no --max_length")


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


def run_of(args: Options) -> dict:
    """The options of this run and the contents of its files. If it is resumed, these must be as when it began."""
    options = json.loads(json.dumps(args.to_dict())) | {"processes": args.world_size}
    for name in ("output_dir", "resume_from_checkpoint", "local_rank", "logging_dir"):
        options.pop(name, None)  # these may differ when the run is resumed; transformers 5 has no logging_dir
    for file in filter(None, [args.chat_template_path, *args.train_files, *(args.eval_files or [])]):
        options[f"contents of {file}"] = sha256(Path(file).read_bytes()).hexdigest()
    if args.resume_from_checkpoint is None:
        if [*Path(args.output_dir).rglob("*.pt"), *Path(args.output_dir).rglob("*.safetensors")]:
            raise SystemExit(f"{args.output_dir} has weights already; resume their run, or choose another --output_dir")
        return {"options": options}
    run = json.loads(Path(args.resume_from_checkpoint).with_name("run.json").read_text())
    others = [name for name, value in options.items() if run["options"].get(name) != value]
    if others:
        raise SystemExit(f"the run began with other options than these: {', '.join(others)}; see its run.json")
    return run


def claim(args: Options, file: Path, run: str) -> None:
    """Writes run.json, which makes the folder this run's. SystemExit if it is another's, also if both begin at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("x") as new_file:
            new_file.write(run)
    except FileExistsError:
        if args.resume_from_checkpoint is None or file.read_text() != run:
            why = "resume that run, choose another --output_dir, or, if it has ended and saved nothing, delete the file"
            raise SystemExit(f"{file} says that the folder is another run's; {why}") from None


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = TrlParser(Options, usage="%(prog)s OPTIONS (--help lists them)")
    (args,) = parser.parse_args_and_config(arguments)
    if (args.projections if args.method == "image_lora" else args.num_heads) is not None:
        parser.error("--num_heads is for --method image_lora, and --projections for the others; leave it out")
    if type(args.r) is not int or type(args.num_heads) not in (int, type(None)):  # a --config file may say 4.5 or true
        parser.error(f"--r and --num_heads must be whole numbers, got {args.r} and {args.num_heads}")
    run = run_of(args)
    trainer = make_trainer(args, run)
    if args.process_index == 0:  # only now, so that a start that was refused leaves the folder as it was
        claim(args, Path(args.output_dir, "run.json"), json.dumps(run, indent=1))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.method == "image_lora":
        trainer.model.image_lora.save(Path(args.output_dir, "adapter.pt"))
        trainer.processing_class.save_pretrained(args.output_dir)  # PEFT's folder has it, too
    else:
        trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
