"""The time an adapter costs, as ratios to no adapter: python -m data.bench (needs transformers and peft).

Every time is divided by that of a run without an adapter beside it, first before it, then after it; the median of a
round's ratios is one measurement, a line the mean over rounds and its standard error. All methods share one model, as
the place of its weights in memory alone can change a time by 3 %. 'no adapter, again' is what noise makes of 1.
"""

import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from data import Settings, option, parse
from imagelora import attach

IMAGE = 1000  # the placeholder's id; here it has an embedding of its own, as no vision tower is run


@dataclass(frozen=True)
class BenchConfig(Settings):
    rounds: int = option(6, "at least 2; measurements a line is the mean of", least=2)
    repetitions: int = option(10, "pairs, of either order; twice as many a measurement is the median of", least=1)


def qwen(hidden_size: int, layers: int, heads: int) -> nn.Module:
    """Qwen2.5-VL with random weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    size = hidden_size // heads
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [size // 4, size // 8, size // 8]}
    text = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "vocab_size": 1024}
    text |= {"rope_parameters": rope, "rope_scaling": rope}  # transformers 5's name and 4's
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": hidden_size}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).requires_grad_(False)


@contextmanager
def no_adapter(model):
    """In training the values get a constant with a gradient: the backward pass goes as deep as with an adapter."""
    constant = torch.zeros(1, requires_grad=True)
    layers = model.model.language_model.layers if model.training else []
    handles = [layer.self_attn.v_proj.register_forward_hook(lambda m, x, value: value + constant) for layer in layers]
    yield [constant]
    for handle in handles:
        handle.remove()


@contextmanager
def image_lora(model, share=1, disabled=False):
    config = model.config.text_config
    heads = list(range(int(config.num_key_value_heads * share)))
    adapter = attach(model, heads=dict.fromkeys(range(config.num_hidden_layers), heads))
    with adapter.disabled() if disabled else nullcontext():
        yield list(adapter.parameters())
    adapter.detach()


@contextmanager
def peft_lora(model, projections):
    import peft

    target = rf".*language_model.*self_attn.({projections})"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=target))
    yield [p for p in adapted.parameters() if p.requires_grad]
    adapted.unload()


FLOOR = {"no adapter, again": no_adapter}
HALF, DISABLED = partial(image_lora, share=0.5), partial(image_lora, disabled=True)
PEFT = {"PEFT LoRA on v": partial(peft_lora, projections="v_proj")}
PEFT |= {"PEFT LoRA on q, k, v, o": partial(peft_lora, projections="[qkvo]_proj")}
TRAINING = FLOOR | {"Image-LoRA, all heads": image_lora, "Image-LoRA, half of the heads": HALF} | PEFT
DECODING = FLOOR | {"Image-LoRA": image_lora, "Image-LoRA inside disabled()": DISABLED} | PEFT


def training_step(model: nn.Module, method, ids: Tensor) -> float:
    """Processor seconds of a forward and a backward pass, the second of two, as the first one warms up."""
    with method(model) as parameters:
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = None
            start = time.process_time()
            model(input_ids=ids, labels=ids).loss.backward()
        return time.process_time() - start


def decoding(model: nn.Module, method, ids: Tensor) -> float:
    """Processor seconds of 24 decoded tokens, after a first one."""
    marks = []
    stop = [lambda ids, scores: marks.append(time.process_time()) or torch.zeros(1, dtype=torch.bool)]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
    options |= {"max_new_tokens": 25, "stopping_criteria": stop}
    with method(model):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return marks[-1] - marks[0]


def measure(cfg: BenchConfig, methods: dict, models: list, run, visual: int, text: int) -> None:
    """Prints a line for each method."""
    ids = torch.tensor([[IMAGE] * visual + list(range(text))])
    for name, method in methods.items():
        medians = []
        for model in models:
            orders = (1, -1) * cfg.repetitions
            pairs = [[run(model, each, ids) for each in (no_adapter, method)[::order]][::order] for order in orders]
            medians.append(statistics.median(adapted / floor for floor, adapted in pairs))
        error = statistics.stdev(medians) / cfg.rounds**0.5
        print(f"  {name:32}{statistics.mean(medians):.3f} ± {error:.3f}", flush=True)


def main(cfg: BenchConfig) -> None:
    torch.set_num_threads(1)
    print(f"ratios to no adapter, {cfg.rounds} medians of {2 * cfg.repetitions} pairs, one thread, processor time")
    for visual, text in ((256, 64), (64, 256)):
        print(f"training step, 2 layers of 256 features, {visual} visual and {text} text tokens")
        measure(cfg, TRAINING, [qwen(256, 2, 8).train() for _ in range(cfg.rounds)], training_step, visual, text)
    print("decoding a token, 3 layers of 64 features, after 16 visual and 8 text tokens")
    measure(cfg, DECODING, [qwen(64, 3, 4).eval() for _ in range(cfg.rounds)], decoding, 16, 8)


if __name__ == "__main__":
    try:
        main(parse(BenchConfig, sys.argv[1:], "python -m data.bench", __doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"the bench compares with PEFT on a model of transformers: pip install {error.name}")
