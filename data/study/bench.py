"""What an adapter costs in time: ratios to the frozen model, on tiny models. Needs transformers and peft.

Methods take turns on one model, as the place of its weights in memory alone can change a time by 3 %; 'frozen again' is
what noise makes of 1. A ratio is the median over turns of a turn's medians. One thread, processor time."""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median

import torch

from data import Settings, command, option
from imagelora import attach

IMAGE = 1000  # the placeholder's id; here it has an embedding of its own, as no vision tower is run
IDS = torch.tensor([[IMAGE] * 160 + list(range(160))])
METHODS = "frozen", "frozen again", "Image-LoRA", "Image-LoRA disabled", "PEFT on v", "PEFT on qkvo"


@dataclass(frozen=True)
class BenchConfig(Settings):
    rounds: int = option(8, "each is two turns of each method, of 40 tokens or 4 training steps", least=1)


def tiny_model(family: str):  # with random weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    text |= {"num_hidden_layers": 2, "vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 1}
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]}
        text |= {"rope_parameters": rope, "rope_scaling": rope}  # transformers 5's name and 4's
        vision = {"depth": 1, "out_hidden_size": 512}
    ids = {"image_token_id": IMAGE, "image_token_index": IMAGE}
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **ids)
    return AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)


def adapt(model, method: str, undo: ExitStack):
    if method.startswith("Image-LoRA"):
        adapter = attach(model)
        undo.callback(adapter.detach)
        if method.endswith("disabled"):
            undo.enter_context(adapter.disabled())
    if method.startswith("PEFT"):
        import peft

        target = rf".*language_model.*self_attn.[{method.split()[-1]}]_proj"
        undo.callback(peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=target)).unload)


def decode(model, marks: list):
    """Notes the processor's seconds at each of 41 tokens."""
    stop = [lambda ids, scores: marks.append(time.process_time()) or torch.zeros(1, dtype=torch.bool)]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=41, stopping_criteria=stop, **options)


def train(model, marks: list):
    """Notes them at each of 5 steps, whose backward passes go down to the embeddings for all methods."""
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, x: x.requires_grad_())
    for _ in range(5):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        marks.append(time.process_time())
    handle.remove()


def bench(cfg: BenchConfig):
    if not find_spec("transformers") or not find_spec("peft"):
        raise ValueError("it compares with PEFT on models of transformers: pip install transformers peft")
    torch.set_num_threads(1)
    for run, family in ((decode, "llava"), (decode, "qwen2_5_vl"), (train, "llava"), (train, "qwen2_5_vl")):
        model, times = tiny_model(family), {method: [] for method in METHODS}
        for method in (METHODS + METHODS[::-1]) * cfg.rounds:
            with ExitStack() as undo:
                adapt(model, method, undo)
                run(model, marks := [])
            times[method].append(median(after - before for before, after in zip(marks, marks[1:])))
        print(f"{run.__name__} {family}, frozen {1e6 * median(times['frozen']):.0f} us")
        for method in METHODS[1:]:
            print(f"  {method:24}{median(a / b for a, b in zip(times[method], times['frozen'])):.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(command(BenchConfig, bench, __doc__))
