"""What an adapter costs in time: ratios to the frozen model, on tiny models. Needs transformers and peft.

Methods take turns on one model, because the place of its weights in memory alone can change a time by 3 %. 'frozen
again' shows what noise makes of a ratio of 1. A ratio is the median over turns, and a turn's time is a median, too. One
thread, processor time.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median

from data import Settings, command, option  # Before torch, because it sets how threads wait.

# isort: split
import torch

from imagelora import attach

IMAGE = 1000  # the placeholder's id; here it has an embedding of its own, because no vision tower runs
IDS = torch.tensor([[IMAGE] * 160 + list(range(160))])
METHODS = ("frozen", "frozen again", "Image-LoRA", "Image-LoRA disabled", "PEFT on v", "PEFT on qkvo")


@dataclass(frozen=True)
class BenchConfig(Settings):
    rounds: int = option(8, "each is two turns of each method, of 40 tokens or 4 training steps", least=1)


def tiny_model(family: str):
    """A model of transformers, of this family and with random weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    text |= {"num_hidden_layers": 2, "vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 1}
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]}
        text |= {"rope_parameters": rope, "rope_scaling": rope}  # the name in transformers 5 and in 4
        vision = {"depth": 1, "out_hidden_size": 512}
    ids = {"image_token_id": IMAGE, "image_token_index": IMAGE}
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **ids)
    return AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)


def adapt(model, method: str, undo: ExitStack) -> None:
    """Add a method's adapter to the model; closing `undo` removes it."""
    if method.startswith("Image-LoRA"):
        adapter = attach(model)
        undo.callback(adapter.detach)
        if method.endswith("disabled"):
            undo.enter_context(adapter.disabled())
    if method.startswith("PEFT"):
        import peft

        letters = method.split()[-1]
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=rf".*language_model.*self_attn.[{letters}]_proj")
        undo.callback(peft.get_peft_model(model, config).unload)


def decode(model) -> list[float]:
    """The processor's seconds at each of 41 tokens."""
    times = []

    def note_time(ids, scores):
        times.append(time.process_time())
        return torch.zeros(1, dtype=torch.bool)  # go on

    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
    mask = torch.ones_like(IDS)
    model.generate(IDS, attention_mask=mask, max_new_tokens=41, stopping_criteria=[note_time], **options)
    return times


def train(model) -> list[float]:
    """The processor's seconds at each of 5 steps, whose backward passes go down to the embeddings for all methods."""
    times = []

    def require_gradient(module, inputs, embeddings):
        return embeddings.requires_grad_()

    hook = model.get_input_embeddings().register_forward_hook(require_gradient)
    for _ in range(5):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        times.append(time.process_time())
    hook.remove()
    return times


def bench(cfg: BenchConfig) -> None:
    """Print a ratio for each method, for a decoded token and a training step of two families."""
    if not find_spec("transformers") or not find_spec("peft"):
        raise ValueError("it compares with PEFT on models of transformers: pip install transformers peft")
    torch.set_num_threads(1)
    for job, family in ((decode, "llava"), (decode, "qwen2_5_vl"), (train, "llava"), (train, "qwen2_5_vl")):
        model = tiny_model(family)
        seconds = {method: [] for method in METHODS}  # of a token or a step, turn by turn
        for method in (METHODS + METHODS[::-1]) * cfg.rounds:
            with ExitStack() as undo:
                adapt(model, method, undo)
                times = job(model)
            seconds[method].append(median(after - before for before, after in zip(times, times[1:])))
        frozen = seconds["frozen"]
        print(f"{job.__name__} {family}, frozen {1e6 * median(frozen):.0f} us")
        for method in METHODS[1:]:
            ratio = median(adapted / base for adapted, base in zip(seconds[method], frozen))
            print(f"  {method:24}{ratio:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(command(BenchConfig, bench, __doc__))
