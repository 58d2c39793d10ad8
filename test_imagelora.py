"""The invariants of Image-LoRA, as explanation: read in order, the docstrings are the argument of the paper.

`pytest` runs all; tests with real vision-language models need transformers and peft and are skipped without them.
`python test_imagelora.py --bench` prints the overhead of a training step.
"""

import contextlib
import copy
import json
import math
import os
import pickle
import random
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
from collections import deque
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as gradient_checkpoint
from torch.utils.flop_counter import FlopCounterMode

import imagelora
import train
from data import SPLITS, screens, word_problems
from data.tokenizer import VOCABULARY, decode, encode, parse_point
from imagelora import attach, image_lora_flops, load, lora_flops, score_heads, select_heads
from tiny_vlm import TinyVLM, TinyVLMConfig

IMG, P = 3, 4  # the placeholder's id, visual tokens an image
CONFIG = dict(vocab_size=40, image_size=32, hidden_size=24, num_attention_heads=6, num_key_value_heads=3)
CONFIG |= dict(vision_hidden_size=16, vision_num_hidden_layers=1, vision_num_attention_heads=2, num_hidden_layers=3)
D, D_H, H, L = 24, 4, 3, 3  # hidden size, head size, value heads a layer, layers
TEXT = [1, 5, 6, 7, 8, 9]
BEFORE, IMAGE, AFTER = [1, 5, 6], [IMG] * P, [7, 8, 9, 10]


def tiny_vlm(**changes) -> TinyVLM:
    torch.manual_seed(0)
    return TinyVLM(TinyVLMConfig(**CONFIG | changes)).eval()


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def prompt(*rows: list[int], images: int = 1, labels: bool = False) -> dict:
    """Rows of equal length and their pictures as the model's arguments."""
    batch = {"input_ids": torch.tensor(rows), "pixel_values": pictures(images) if images else None}
    return batch | ({"labels": torch.tensor(rows).masked_fill(torch.tensor(rows) == IMG, -100)} if labels else {})


def attach_trained(model, **options) -> imagelora.ImageLoRA:
    """An adapter as after training: B is not zero."""
    adapter = attach(model, **options)
    torch.manual_seed(2)
    for a in adapter.layers.values():
        nn.init.normal_(a.B)
    return adapter


def outputs_of(module: nn.Module, run) -> torch.Tensor:
    """What a module returns while `run` is executed."""
    seen = []
    handle = module.register_forward_hook(lambda m, args, output: seen.append(output.detach().clone()))
    run()
    handle.remove()
    return seen[-1]


# ---------------------------------------------------------------------------------------------------------------------
# 1. The update is made of the values of visual tokens in selected heads, and of nothing else


def test_it_starts_as_the_base_model():
    """B starts at zero, so the adapted model is the base model, exactly, until it is trained."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    base = model(**batch).logits
    attach(model)
    assert torch.equal(model(**batch).logits, base)


@torch.no_grad()
def test_text_only_output_is_the_base_models_bit_for_bit():
    """When no image is in the context, a trained adapter changes nothing: logits, answers, a row of a mixed batch."""
    model = tiny_vlm()
    ids = torch.tensor([TEXT])
    mixed = prompt(TEXT + AFTER + [2], BEFORE + IMAGE + AFTER)
    base, base_answer, base_mixed = model(ids).logits, model.generate(ids, max_new_tokens=6), model(**mixed).logits
    attach_trained(model)
    assert torch.equal(model(ids).logits, base)
    assert torch.equal(model.generate(ids, max_new_tokens=6), base_answer)
    assert torch.equal(model(**mixed).logits[0], base_mixed[0])
    assert not torch.equal(model(**mixed).logits[1], base_mixed[1])


@torch.no_grad()
def test_text_before_the_image_is_unchanged_and_text_after_it_is_not():
    """Attention is causal: only what comes after an image can read its values."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    base = model(**batch).logits
    attach_trained(model)
    adapted = model(**batch).logits
    first = len(BEFORE)
    assert torch.equal(adapted[:, :first], base[:, :first])
    assert (adapted[:, first:] != base[:, first:]).any(-1).all()


@torch.no_grad()
def test_attention_of_the_first_adapted_layer_is_the_base_models():
    """Queries and keys are untouched, so where the first adapted layer looks does not change, only what it reads."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    attention = model.language_model.layers[1].self_attn
    adapter = attach_trained(model, heads={1: [0, 2], 2: [1]})
    for name, same in {"q_proj": True, "k_proj": True, "v_proj": False}.items():
        adapted = outputs_of(getattr(attention, name), lambda: model(**batch))
        with adapter.disabled():
            base = outputs_of(getattr(attention, name), lambda: model(**batch))
        assert torch.equal(adapted, base) == same, name


@torch.no_grad()
def test_only_visual_rows_of_selected_heads_change():
    """V~(h) = X W_V(h) + M X A B(h) for h in S: other heads and other rows keep their values, to the bit."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    v_proj = model.language_model.layers[1].self_attn.v_proj
    base = outputs_of(v_proj, lambda: model(**batch))
    attach_trained(model, heads={1: [0, 2]})
    changed = (outputs_of(v_proj, lambda: model(**batch)) != base).unflatten(-1, (H, D_H)).any(-1)  # [B, T, H]
    expected = (batch["input_ids"] == IMG)[..., None] & torch.tensor([True, False, True])
    assert torch.equal(changed, expected)


@torch.no_grad()
def test_the_update_is_the_papers_formula():
    """gamma * (alpha / r) * 1/sqrt|S| * x A B(h), written out for one token and one head at a time."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    v_proj = model.language_model.layers[0].self_attn.v_proj
    x = outputs_of(model.language_model.layers[0].input_layernorm, lambda: model(**batch))
    base = outputs_of(v_proj, lambda: model(**batch))
    a = attach_trained(model, r=2, lora_alpha=6, heads={0: [0, 2]}).layers["0"]
    a.gamma.fill_(0.7)
    expected = base.clone()
    for t in range(len(BEFORE), len(BEFORE) + P):
        for i, h in enumerate([0, 2]):
            expected[0, t, h * D_H : (h + 1) * D_H] += 0.7 * (6 / 2) / math.sqrt(2) * x[0, t] @ a.A @ a.B[i]
    torch.testing.assert_close(outputs_of(v_proj, lambda: model(**batch)), expected)


def test_normalization_makes_the_update_independent_of_how_many_heads_are_selected():
    """E||Delta V||^2 grows with |S|; the factor 1/sqrt|S| makes it constant."""
    x, rows = torch.randn(1, 64, 32), torch.arange(64)

    def size(count, normalize):
        total = 0.0
        for seed in range(40):
            torch.manual_seed(seed)
            a = imagelora.ValueAdapter(32, 8, 8, list(range(count)), r=4, lora_alpha=8, normalize=normalize)
            nn.init.normal_(a.B)
            total += a.add_update(x, torch.zeros(1, 64, 64), rows).square().sum().item()
        return total / 40

    assert size(8, True) / size(1, True) == pytest.approx(1, abs=0.15)
    assert size(8, False) / size(1, False) == pytest.approx(8, rel=0.15)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Which tokens are visual follows from input_ids, at every forward


@torch.no_grad()
def test_a_batch_equals_its_rows():
    """Images at different places, two images, none, padding left and right: each row is adapted at its own tokens."""
    rows = [BEFORE + IMAGE + AFTER, IMAGE + AFTER, [1, *IMAGE, 5, *IMAGE, 6, 7], TEXT]
    model = tiny_vlm()
    attach_trained(model)
    images, width = pictures(4), max(map(len, rows))
    owned = [images[:1], images[1:2], images[2:4], None]
    for left in (True, False):
        fill = [[0] * (width - len(row)) for row in rows]
        ids = torch.tensor([f + row if left else row + f for f, row in zip(fill, rows)])
        mask = torch.tensor(
            [[0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f) for f, r in zip(fill, rows)]
        )
        together = model(ids, images, attention_mask=mask).logits
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row]), owned[i]).logits[0]
            torch.testing.assert_close(together[i][mask[i].bool()], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_image_of_a_prompt_is_adapted():
    """M covers all visual tokens of the prompt, not only the first image's."""
    model, batch = tiny_vlm(), prompt(IMAGE + [5] + IMAGE + [6], images=2)
    v_proj = model.language_model.layers[0].self_attn.v_proj
    base = outputs_of(v_proj, lambda: model(**batch))
    attach_trained(model)
    assert torch.equal((outputs_of(v_proj, lambda: model(**batch)) != base).any(-1), batch["input_ids"] == IMG)


@torch.no_grad()
def test_decoding_with_a_cache_equals_decoding_without_and_costs_nothing():
    """Adapted values are in the KV cache after prefill, so a decoded text token triggers no adapter product at all: a
    step of decoding has the FLOPs of the same step with the adapter disabled."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER, IMAGE + AFTER + BEFORE, images=2)
    adapter = attach_trained(model)
    cached = model.generate(**batch, max_new_tokens=6)
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=6, use_cache=False))
    longer = batch | {"input_ids": torch.cat([batch["input_ids"], torch.tensor([[5], [6]])], 1)}
    whole, cache = model(**longer).logits[:, -1], model(**batch).past_key_values
    step = model(torch.tensor([[5], [6]]), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)

    def decode_flops():
        cache = model(**batch).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[5], [6]]), past_key_values=cache)
        return counter.get_total_flops()

    adapted = decode_flops()
    with adapter.disabled():
        assert adapted == decode_flops() > 0


@torch.no_grad()
def test_a_prompt_may_be_cut_in_chunks():
    """A prompt prefilled in chunks, cut before, between or after the images or inside the text, gives its logits."""
    ids, images = [1, 5, *IMAGE, *IMAGE, 6, 7, 8, 9, 10, 11, 12], pictures(2)
    model = tiny_vlm()
    attach_trained(model)
    whole = model(torch.tensor([ids]), images).logits
    for cut in (1, 2 + P, 2 + 2 * P, 3 + 2 * P):
        first, second = torch.tensor([ids[:cut]]), torch.tensor([ids[cut:]])
        done = int((first == IMG).sum()) // P
        out = model(first, images[:done] if done else None)
        rest = model(second, images[done:] if done < 2 else None, past_key_values=out.past_key_values).logits
        torch.testing.assert_close(torch.cat([out.logits, rest], 1), whole, rtol=1e-4, atol=1e-4)


def test_embeddings_alone_need_an_explicit_mask():
    """Without input_ids the visual tokens are unknown: refused, or taken from visual_mask(), never guessed."""

    class EmbeddingsOnly(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.language_model, self.config = inner.language_model, inner.config

        def forward(self, input_ids=None, inputs_embeds=None):
            return self.language_model(inputs_embeds, torch.arange(6)[None])[0]

    model = EmbeddingsOnly(tiny_vlm())
    x, mask = torch.randn(1, 6, D), torch.tensor([[False, True, True, False, False, False]])
    base = model(inputs_embeds=x)
    adapter = attach_trained(model)
    with pytest.raises(ValueError, match="visual_mask"):
        model(inputs_embeds=x)
    with adapter.visual_mask(mask):
        changed = (model(inputs_embeds=x) != base).any(-1)
    assert changed[0].tolist() == [False, True, True, True, True, True]
    with pytest.raises(RuntimeError, match="call the model that attach"):
        model.language_model(x, torch.arange(6)[None])


# ---------------------------------------------------------------------------------------------------------------------
# 3. Training moves A, B and gamma, and nothing else


def test_the_first_gradient_reaches_b_only():
    """With B = 0 the loss does not depend on A or gamma yet: their first gradient is zero, that of every B is not."""
    model = tiny_vlm()
    adapter = attach(model, heads={0: [0, 2], 1: [1]})
    model(**prompt(BEFORE + IMAGE + AFTER, labels=True)).loss.backward()
    for a in adapter.layers.values():
        assert not a.A.grad.any() and not a.gamma.grad.any()
        assert a.B.grad.flatten(1).any(1).all()


def test_only_the_adapter_is_trained():
    """Only the adapter's parameters require, and get, a gradient; they are the model's trainable ones."""
    model = tiny_vlm()
    adapter = attach_trained(model)
    model(**prompt(BEFORE + IMAGE + AFTER, labels=True)).loss.backward()
    own = {id(p) for p in adapter.parameters()}
    assert (
        own
        == {id(p) for p in model.parameters() if p.requires_grad}
        == {id(p) for p in model.parameters() if p.grad is not None}
    )
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters()} == {"A", "B", "gamma"}
    assert {f"image_lora.{name}" for name in adapter.state_dict()} <= set(model.state_dict())
    assert all(p.dtype == torch.float64 for p in model.double().image_lora.parameters())


def test_a_text_only_step_gives_zero_gradients():
    """A batch without an image gathers zero rows: gradients are zero, not missing, as data-parallel training needs."""
    model = tiny_vlm()
    adapter = attach_trained(model)
    model(**prompt(TEXT, images=0, labels=True)).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# 4. Which heads: the probe and the budget


def exact_by_hand(model, batch) -> torch.Tensor:
    """||X_vis^T G||^2 of every value head, from the gradient of each W_V over visual tokens alone."""
    visual, kept = (batch["input_ids"] == IMG).flatten(), []
    for layer in model.language_model.layers:
        layer.self_attn.v_proj.register_forward_hook(
            lambda m, x, value: kept.append((x[0], value)) or value.retain_grad()
        )
    model(**batch).loss.backward()
    scores = []
    for x, value in kept:
        product = x.flatten(0, 1)[visual].T @ value.grad.flatten(0, 1)[visual]  # [D, H * d_h]
        scores.append(product.unflatten(1, (H, D_H)).square().sum((0, 2)))
    return torch.stack(scores)


def test_the_exact_probe_is_the_squared_gradient_of_the_value_weights_over_visual_tokens():
    """I(l, h) = ||X_vis^T G_l(h)||^2: the gradient that full fine-tuning of W_V(h) on visual tokens would follow."""
    batch = prompt(BEFORE + IMAGE + AFTER, AFTER + IMAGE + BEFORE, images=2, labels=True)
    scores = score_heads(tiny_vlm(), [batch], probe="exact")
    torch.testing.assert_close(scores, exact_by_hand(tiny_vlm(), batch))


def test_the_rank_1_probe_is_an_unbiased_sketch_of_the_exact_one():
    """dL/dB = A^T X_vis^T G with A ~ N(0, I), so over draws of A, one a batch, the mean of its square is the exact
    score; a single draw is far from it."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER, labels=True)
    exact = score_heads(model, [batch], probe="exact")
    ratio = score_heads(model, [batch] * 400) / exact
    torch.testing.assert_close(ratio, torch.ones(L, H), rtol=0, atol=0.3)
    assert ratio.mean() == pytest.approx(1, abs=0.1)
    assert (score_heads(model, [batch]) / exact - 1).abs().max() > 0.3


@pytest.mark.parametrize("probe", ["rank1", "exact"])
def test_the_probe_finds_the_only_head_that_can_help_even_when_it_is_silent(probe):
    """B has a gradient where the value is read, even if the base writes nothing there (a gate on it would score 0)."""
    model = tiny_vlm(num_key_value_heads=6)
    for layer in model.language_model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # no head is read ...
    attention = model.language_model.layers[1].self_attn
    attention.o_proj.weight.data[:, 2 * D_H : 3 * D_H].normal_()  # ... but head 2 of layer 1,
    attention.v_proj.weight.data[2 * D_H : 3 * D_H].zero_()  # whose base value is zero
    scores = score_heads(model, [prompt(BEFORE + IMAGE + AFTER, labels=True)], probe=probe)
    assert scores.nonzero().tolist() == [[1, 2]]
    assert select_heads(scores, 1) == {1: [2]}


def test_probing_leaves_the_model_as_it_was():
    """The probe is attached, run once and detached: same output, same requires_grad, no hook, no gradient."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER, labels=True)
    model.vision_tower.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()], model(**batch).logits
    score_heads(model, [batch])
    assert before[0] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(before[1], model(**batch).logits)
    assert all(p.grad is None for p in model.parameters()) and not hasattr(model, "image_lora")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_squares_are_taken_per_batch():
    """Each batch's mean gradient is squared; batches of one example are the per-example score, which is another."""
    model, rows = tiny_vlm(), (BEFORE + IMAGE + AFTER, AFTER + IMAGE + BEFORE)
    batches = [prompt(row, labels=True) for row in rows]
    each = [score_heads(model, [batch], probe="exact") for batch in batches]
    per_example = score_heads(model, batches, probe="exact")
    torch.testing.assert_close(per_example, (each[0] + each[1]) / 2)
    together = score_heads(model, [prompt(*rows, images=2, labels=True)], probe="exact")
    assert not torch.allclose(together, per_example, rtol=0.1)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 3.0])
def test_selection_meets_every_budget_exactly(tau):
    """The budgets sum to K whatever the scores (uneven, zero, equal), and a layer's are its most influential heads."""
    torch.manual_seed(0)
    for scores in (torch.rand(5, 4) ** 8, torch.zeros(5, 4), torch.ones(5, 4), torch.rand(5, 4) * torch.eye(5, 4)):
        for budget in range(1, 21):
            heads = select_heads(scores, budget, tau)
            assert sum(map(len, heads.values())) == budget
            for layer, chosen in heads.items():
                assert sorted(scores[layer].tolist())[-len(chosen)] <= min(scores[layer][chosen].tolist())


def test_tau_goes_from_even_to_proportional_to_greedy():
    """tau = 0 gives every layer the same, 1 shares in proportion to influence, a large tau all to the first layers."""
    scores = torch.tensor([[6.0] * 8, [2.0] * 8, [0.0] * 8])
    assert {layer: len(h) for layer, h in select_heads(scores, 6, tau=0).items()} == {0: 2, 1: 2, 2: 2}
    assert {layer: len(h) for layer, h in select_heads(scores, 8, tau=1).items()} == {0: 6, 1: 2}
    assert {layer: len(h) for layer, h in select_heads(scores, 10, tau=20).items()} == {0: 8, 1: 2}


# ---------------------------------------------------------------------------------------------------------------------
# 5. The cost, and why it cannot be merged


@pytest.mark.parametrize("heads", [None, {0: [1]}, {1: [0, 2], 2: [1]}])
def test_counted_flops_are_the_computed_ones(heads):
    """Forward 2Nr(D + |S|d_h) and backward dB, dz, dA, and dx in all adapted layers but the lowest, as integers, over
    visual tokens only."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER, AFTER + IMAGE + BEFORE, images=2, labels=True)
    adapter = attach_trained(model, r=5, heads=heads)
    assert train.count_training_flops(model, adapter, batch) == adapter.flops(2 * P)
    assert adapter.flops(2 * P) == image_lora_flops(2 * P, D, D_H, adapter.heads, r=5)


def test_lora_flops_are_those_of_two_products():
    """Standard LoRA on one Linear: z = xA, y = zB, and their gradients; dx only where the input needs one."""
    for input_grad in (True, False):
        x = torch.randn(7, 12, requires_grad=input_grad)
        a, b = torch.randn(12, 3, requires_grad=True), torch.randn(3, 20, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            (x @ a @ b).sum().backward()
        assert counter.get_total_flops() == lora_flops(7, 12, 20, 3, input_grad)


def test_the_three_savings_multiply():
    """60 visual tokens of 100, values instead of q, k, v, o, half of 8 heads: 0.6 x 1/4 x 3/4. The last is not 1/2, as
    A is shared: half of a layer's heads cost more than half."""
    lora = 4 * 4 * lora_flops(100, 64, 64, 8)
    ours = image_lora_flops(60, 64, 8, {layer: [0, 1, 2, 3] for layer in range(4)}, 8, input_grad=True)
    assert ours / lora == pytest.approx(0.6 * (1 / 4) * (3 / 4))


def test_no_value_weight_reproduces_the_adapter_on_mixed_tokens():
    """On visual tokens alone the update is the weight gamma (alpha/r)/sqrt|S| A B; with text among them none fits."""
    torch.manual_seed(0)
    a = imagelora.ValueAdapter(8, 2, 3, [0, 2], r=4, lora_alpha=8)
    nn.init.normal_(a.B)
    x, value = torch.randn(1, 40, 8), torch.zeros(1, 40, 6)

    def residual(rows):
        y = a.add_update(x, value, rows)[0].detach()
        weight = torch.linalg.lstsq(x[0], y).solution  # the best single W for all tokens
        return ((x[0] @ weight - y).norm() / y.norm()).item()

    weight = a.gamma * a.scaling * torch.einsum("dr,hrk->dhk", a.A, a.B)  # [D, |S|, d_h]
    y = a.add_update(x, value, torch.arange(40))[0].unflatten(1, (3, 2))[:, [0, 2]]
    torch.testing.assert_close(y, torch.einsum("td,dhk->thk", x[0], weight))
    assert residual(torch.arange(40)) < 1e-5
    assert residual(torch.arange(0, 40, 2)) > 0.3


# ---------------------------------------------------------------------------------------------------------------------
# 6. An adapter comes off, and travels


@torch.no_grad()
def test_detach_and_disabled_restore_the_base_bit_for_bit():
    """Inside disabled() the outputs are the base model's; after detach() so are names and requires_grad."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    base, names = model(**batch).logits, list(model.state_dict())
    adapter = attach_trained(model)
    with adapter.disabled():
        assert torch.equal(model(**batch).logits, base)
    assert not torch.equal(model(**batch).logits, base)
    assert adapter.detach() is model
    assert torch.equal(model(**batch).logits, base)
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("normalize", [True, False])
def test_a_saved_adapter_loads_as_it_was(tmp_path, normalize):
    """save and load carry A, B, gamma, r, alpha and the heads; the file has the keys of the authors' layout."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    adapter = attach_trained(model, r=2, lora_alpha=3, heads={0: [2, 0], 2: [1]}, normalize=normalize)
    adapter.layers["0"].gamma.fill_(0.3)
    expected = model(**batch).logits
    adapter.save(tmp_path / "adapter.pt")
    adapter.detach()
    assert not torch.equal(model(**batch).logits, expected)
    loaded = load(model, tmp_path / "adapter.pt")
    assert torch.equal(model(**batch).logits, expected)
    assert (loaded.heads, loaded.r, loaded.lora_alpha) == ({0: [0, 2], 2: [1]}, 2, 3)
    content = torch.load(tmp_path / "adapter.pt", weights_only=True)
    assert {"model_name", "r", "alpha", "kv_indices", "layers"} <= set(content)
    assert content["kv_indices"] == {"0": [0, 2], "2": [1]} and list(content["layers"]["0"]["B"].shape) == [2, 2, D_H]


def test_the_unnamed_layers_get_no_adapter():
    """A layer not named, or with an empty list, is left alone and holds no parameter; no head at all is an error."""
    adapter = attach(tiny_vlm(), r=2, heads={1: [2], 2: []})
    assert list(adapter.layers) == ["1"]
    assert sum(p.numel() for p in adapter.parameters()) == D * 2 + 2 * D_H + 1
    with pytest.raises(ValueError, match="no head is selected"):
        attach(tiny_vlm(), heads={0: []})


@pytest.mark.parametrize("heads", [{3: [0]}, {-1: [0]}, {0: [3]}, {0: [-1]}, {0: [1, 1]}, {"0": [1]}, {0: [True]}])
def test_heads_that_the_model_does_not_have_are_refused(heads):
    """A layer or head out of range, named twice or not an integer is an error that names the layer, never dropped."""
    model = tiny_vlm()
    with pytest.raises(ValueError, match=re.escape(f"layer {next(iter(heads))!r}")):
        attach(model, heads=heads)
    assert not hasattr(model, "image_lora") and all(p.requires_grad for p in model.parameters())


def test_attaching_twice_is_refused():
    """Nested use would double the update."""
    model = tiny_vlm()
    attach(model)
    with pytest.raises(ValueError, match="already"):
        attach(model)


# ---------------------------------------------------------------------------------------------------------------------
# 7. The tiny VLM, the data and the main job


@torch.no_grad()
def test_grouped_query_attention_is_attention_with_repeated_value_heads():
    """A value head serves a group of query heads: the same as giving each query head its own copy of it."""
    grouped, full = tiny_vlm(), tiny_vlm(num_key_value_heads=6)
    state = grouped.state_dict()
    for name in [n for n in state if n.startswith("language_model") and n.endswith(("k_proj.weight", "v_proj.weight"))]:
        state[name] = state[name].unflatten(0, (H, D_H)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    batch = prompt(BEFORE + IMAGE + AFTER)
    torch.testing.assert_close(grouped(**batch).logits, full(**batch).logits)


def test_placeholders_must_match_the_images():
    """Each image needs as many placeholder tokens as it has patches, and the size that the model was made for."""
    model = tiny_vlm()
    for ids, images in (([1, *IMAGE, IMG], 1), ([1, *IMAGE], 2), ([1, *IMAGE], 0), ([1, 5], 1)):
        with pytest.raises(ValueError, match="image placeholder tokens"):
            model(**prompt(ids, images=images))
    with pytest.raises(ValueError, match="pixel_values must have shape"):
        model(torch.tensor([IMAGE]), torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(torch.tensor([[1, 5, 0]]), attention_mask=torch.tensor([[1, 1, 0]]))


@torch.no_grad()
def test_a_placeholder_is_never_generated():
    """A generated placeholder would stand for an image that is not there, so it is no candidate, however likely."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    hidden = outputs_of(model.language_model.norm, lambda: model(**batch))[0, -1]
    model.language_model.embed_tokens.weight[IMG] = 50 * hidden
    assert model(**batch).logits[0, -1].argmax() == IMG
    assert IMG not in model.generate(**batch)[0, len(BEFORE + IMAGE + AFTER) :]


@pytest.mark.parametrize("domain", screens.DOMAINS)
def test_every_screen_is_a_function_of_split_index_and_seed(domain):
    """The same arguments draw the same screen, others another, and no two splits share one."""
    drawn = {(s, i): screens.draw_screen(domain, s, i).image.tobytes() for s in SPLITS for i in range(30)}
    assert len(set(drawn.values())) == len(drawn)
    assert drawn["test", 3] == screens.draw_screen(domain, "test", 3, seed=0).image.tobytes()
    assert drawn["test", 3] != screens.draw_screen(domain, "test", 3, seed=1).image.tobytes()


@pytest.mark.parametrize("domain", screens.DOMAINS)
def test_every_instruction_names_one_element_and_its_answer_is_a_hit(domain):
    """The centre bins of the target are inside its box; no two elements of a screen are called the same."""
    for i in range(50):
        screen, rng = screens.draw_screen(domain, "train", i), np.random.default_rng(i)
        names = [screens.describe(screen, element) for element in screen.targets()]
        assert len(set(names)) == len(names) >= 5
        for element in screen.targets():
            sample = screens.grounding(screen, element, rng)
            assert screens.is_hit(parse_point(decode(encode(sample["answer"]))), sample["bbox"])
            assert {"img_filename", "bbox", "instruction", "data_type", "data_source"} <= set(sample)
            referring = screens.referring(screen, element)
            assert element.name in referring["answer"] and encode(referring["instruction"])
    assert not screens.is_hit(None, (0, 0, 9, 9)) and screens.is_hit((0, 9), (0, 0, 9, 9))


def test_settings_ask_for_the_switch_of_the_named_row():
    """Where to look stays (the name), what to read there is new: the switch at the right of it."""
    for element in screens.draw_screen("settings", "test", 0).targets():
        left, top, right, bottom = element.click
        assert left >= element.bbox[2] - 1 and top < (element.bbox[1] + element.bbox[3]) / 2 < bottom
        assert (left // 64, right - left) == (element.bbox[0] // 64, 16)


def test_test_word_problems_are_new_sentences_and_new_numbers():
    """No pair of sentences and no triple of numbers of the test split occurs in training."""

    def parts(split):
        problems = [word_problems.word_problem(split, i) for i in range(1500)]
        words = [p["instruction"].split(" then ") for p in problems]
        pairs = {tuple(" ".join(w for w in part.split() if not w.isdecimal()) for part in w[1:]) for w in words}
        numbers = {tuple(n for n in p["instruction"].split() if n.isdecimal()) for p in problems}
        return pairs, {n for n in numbers if len(n) == 3}

    (train_pairs, train_numbers), (test_pairs, test_numbers) = parts("train"), parts("test")
    assert not train_pairs & test_pairs and not train_numbers & test_numbers and len(test_pairs) == 7
    problem = word_problems.word_problem("test", 0)
    assert int(problem["answer"].split()[-1]) <= word_problems.MAX_NUMBER
    assert encode(problem["instruction"] + " " + problem["answer"])


def test_the_base_model_is_what_its_record_says():
    """data/tiny_vlm.json holds the test accuracies of the committed base; measured again they agree."""
    record = json.loads(train.BASE.with_suffix(".json").read_text())
    assert record["source"]["action_acc"] >= 0.97 and record["word_problem_acc"] >= 0.99
    assert min(record["source"]["text_acc"], record["source"]["icon_acc"]) >= 0.95
    assert 0.4 <= record["dark"]["action_acc"] <= 0.9 and record["settings"]["action_acc"] < 0.05
    assert train.BASE.stat().st_size <= 4e6
    model = train.load_base(train.BASE)
    for domain in ("source", "settings", "dark"):
        metrics, _ = train.evaluate(model, domain, "test", 40)
        assert metrics["action_acc"] == pytest.approx(record[domain]["action_acc"], abs=0.08)
    assert train.evaluate_word_problems(model, "test", 100) > 0.97


def test_the_main_job_writes_what_it_says(tmp_path, capsys):
    """before -> probe -> select -> train -> after -> cost -> saved; the adapter in the file is the one measured."""
    options = ["--steps", "4", "--test-screens", "6", "--device", "cpu", "--out", str(tmp_path)]
    assert train.main(options) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["base", "before", "probe", "select", "after", "text", "cost", "saved"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["text_logits_max_abs_diff"] == 0 and metrics["counted_equals_computed"]
    assert sum(map(len, metrics["heads"].values())) == train.Config().num_heads
    assert metrics["trainable_parameters"] < metrics["lora_trainable_parameters"] / 4
    assert metrics["adapter_flops_per_screen"] < metrics["lora_flops_per_screen"] / 4
    model = train.load_base(train.BASE)
    load(model, tmp_path / "adapter.pt")
    assert train.evaluate(model, "settings", "test", 6)[0].items() <= metrics["after"].items()
    assert (tmp_path / "predictions.png").read_bytes()[:4] == b"\x89PNG"


def test_the_guided_walk_shows_what_the_method_says(capsys, monkeypatch):
    """--explain: a step from B = 0 moves B alone, visual rows alone, no query or key, and no text-only logit."""
    monkeypatch.setattr(train, "PROBE_BATCHES", 2)
    assert train.main(["--explain"]) == 0
    out = capsys.readouterr().out
    assert [int(n) for n in re.findall(r"^(\d+) ", out, re.M)] == list(range(1, 12))
    for fact in (
        "logits as the base model's: True",
        "gradient norms: A 0, B ",
        ", gamma 0;",
        "changed in rows 1 .. 64",
        "queries changed by 0, keys by 0:",
        "8 text-only prompts: max change 0\n",
        "each step after it: [64, 0, 0]",
    ):
        assert fact in out, fact
    assert float(re.search(r"with the image: max change ([0-9.]+)", out)[1]) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_main_job_on_a_gpu(tmp_path):
    """On cuda the steps run under bfloat16 autocast; text-only logits are the base model's all the same."""
    assert train.main(["--steps", "4", "--test-screens", "6", "--device", "cuda", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["device"].startswith("cuda") and metrics["text_logits_max_abs_diff"] == 0


@pytest.mark.parametrize("method", ["lora", "lora_value", "none"])
def test_the_baselines_run_on_the_same_data(tmp_path, method):
    """LoRA on q, k, v, o or on v alone, all tokens, changes text-only logits; no method at all changes nothing."""
    options = ["--method", method, "--domain", "dark", "--steps", "3", "--test-screens", "6", "--device", "cpu"]
    assert train.main([*options, "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["text_logits_max_abs_diff"] == 0) == (method == "none")
    assert metrics.get("counted_equals_computed", True) and (tmp_path / "adapter.pt").exists() == (method != "none")


def test_the_same_seed_gives_the_same_metrics(tmp_path):
    """Data, start, probe and order are functions of the seed: two runs agree to the last digit."""
    runs = []
    for name in ("a", "b"):
        options = f"--steps 3 --screens 2 --test-screens 4 --device cpu --seed 1 --out {tmp_path / name}"
        assert train.main(options.split()) == 0
        runs.append(imagelora.safe_load(tmp_path / name / "adapter.pt"))
    same = [json.dumps(r, default=lambda t: t.tolist()) for r in runs]
    assert same[0] == same[1]


def test_two_processes_train_as_one(tmp_path):
    """Data-parallel training on two processes, each with half of the screens, gives the adapter of one process."""
    options = ["--steps", "4", "--screens", "4", "--test-screens", "3", "--device", "cpu", "--out"]
    assert train.main([*options, str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parent
    done = subprocess.run([*command, *options, str(tmp_path / "two")], cwd=folder, env=environment, capture_output=True)
    assert (tmp_path / "two" / "metrics.json").exists(), done.stderr.decode()[-2000:]
    assert done.stdout.decode().count("saved") == 1  # rank 0 alone prints and writes
    one, two = (imagelora.safe_load(tmp_path / name / "adapter.pt") for name in ("one", "two"))
    assert one["kv_indices"] == two["kv_indices"]
    for layer in one["layers"]:
        for name in ("A", "B", "gamma"):
            torch.testing.assert_close(one["layers"][layer][name], two["layers"][layer][name], rtol=1e-3, atol=1e-4)


def _text_only_on_rank_1(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    model = tiny_vlm()
    adapter = attach_trained(model)
    replica = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        batch = prompt(TEXT, images=0, labels=True) if rank else prompt(BEFORE + IMAGE + AFTER, labels=True)
        replica(**batch).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters()) and adapter.layers["0"].B.grad.any()
    (folder / f"rank {rank} is done").touch()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_rank_without_an_image_does_not_stop_the_others(tmp_path):
    """A text-only batch on one rank still takes part in every gradient reduction, with zeros."""
    spawn = torch.multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=_text_only_on_rank_1, args=(rank, tmp_path), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert all((tmp_path / f"rank {rank} is done").exists() for rank in range(2))


def test_a_foreign_comparison_file_is_refused(tmp_path, capsys):
    """The comparison goes on from its finished rows, and says so where a file holds something else."""
    folder = tmp_path / "compare-quick"
    folder.mkdir()
    for content in ("{", '[{"method": "LoRA"}]', "3"):
        (folder / "compare.json").write_text(content)
        assert train.main(["--compare", "--quick", "--out", str(tmp_path / "compare")]) == 2
        assert "is not a comparison of this project" in capsys.readouterr().err
        assert (folder / "compare.json").read_text() == content


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_ctrl_c_ends_a_comparison_and_keeps_its_finished_rows(tmp_path):
    """Ctrl-C reaches the workers too, as in a terminal: all end, the finished rows stay, and the way on is said."""
    command = [sys.executable, "train.py", "--compare", "--quick", "--steps", "1", "--workers", "1", "--out"]
    folder, rows = Path(__file__).parent, tmp_path / "run-quick" / "compare.json"
    with subprocess.Popen(
        [*command, str(tmp_path / "run")],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        deadline = time.time() + 90
        while not rows.exists() and time.time() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and b"go on with: python train.py --compare" in out
    assert 1 <= len(train.read_rows(rows)) < len(train.VARIANTS) * 2


def test_the_arithmetic_at_scale(capsys):
    """`python imagelora.py` prints costs for real shapes from their sizes alone, and the three factors' product."""
    imagelora.main(["--model", "qwen2.5-vl-72b", "--visual-tokens", "3000", "--text-tokens", "100"])
    out = capsys.readouterr().out
    factors = [float(x) for x in re.findall(r"(?:only|heads) ([0-9.]+)(?= x| =)", out)]
    assert len(factors) == 3 and math.prod(factors) == pytest.approx(float(out.split("=")[-1]), abs=2e-3)
    with pytest.raises(SystemExit, match="2"):
        imagelora.main(["--num-heads", "100000"])


README = Path(__file__).with_name("README.md").read_text()


def test_the_tables_of_the_readme_are_those_of_the_comparison():
    """Every table of README's results is what train.py makes of the rows in data/compare.json."""
    rows = train.read_rows(train.BASE.with_name("compare.json"))
    for table in train.tables(rows):
        assert table in README, table
    assert len({row["seed"] for row in rows if row["part"] == "methods"}) >= 5
    assert all(row["adapter_flops_per_step"] == row["counted_flops_per_step"] for row in rows)
    assert all(
        row["text_logits_max_abs_diff"] == 0 for row in rows if "text_logits_max_abs_diff" in row and row["heads"]
    )


def test_the_figures_of_the_readme_are_those_of_the_record_and_the_arithmetic(capsys):
    """README's table of the base is data/tiny_vlm.json, its costs are what `python imagelora.py` prints."""
    record = json.loads(train.BASE.with_suffix(".json").read_text())
    for domain in screens.DOMAINS:
        values = " | ".join(f"{record[domain][name]:.1%}" for name in ("action_acc", "text_acc", "icon_acc"))
        assert re.search(rf"\| {domain} \|.*\| {re.escape(values)} \|", README), (domain, values)
    assert f"{record['seconds']} s" in README and f"{record['word_problem_acc']:.0%} of 512" in README
    imagelora.main([])
    assert capsys.readouterr().out.strip() in README
    assert f"{ROUNDS} medians of {REPETITIONS} interleaved repetitions" in README


def test_the_commands_and_names_of_the_readme_exist():
    """Every option of a command in README is one of that command's, every `file: name` is in that file."""
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^(?:python|torchrun) .*$", README, re.M)]
    assert len(commands) >= 9
    for words in commands:
        if "train.py" in words:
            options = words[words.index("train.py") + 1 :]
            mode = next((word for word in options if word in train.MODES), None)
            config, _ = train.MODES.get(mode, (train.Config, None))
            train.parse(config, [word for word in options if word != mode])
    for name in re.findall(
        r"`(?:tbreak imagelora\.)?((?:VisualRows|ValueAdapter)\.\w+|score_heads|select_heads)`", README
    ):
        owner = imagelora
        for part in name.split("."):
            owner = getattr(owner, part)
    assert len(README.splitlines()) <= 250


# ---------------------------------------------------------------------------------------------------------------------
# It keeps working, and loses nothing: files, misuse, interruption, bad input


MICRO = TinyVLMConfig(
    vocab_size=12, image_size=8, patch_size=4, vision_hidden_size=8, vision_num_hidden_layers=1,
    vision_num_attention_heads=2, hidden_size=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
IMAGE_FIRST, IMAGE_LAST = torch.tensor([[3, 3, 3, 3, 5, 6]]), torch.tensor([[5, 6, 3, 3, 3, 3]])
PIXELS = torch.linspace(0, 1, 192).view(1, 3, 8, 8)


def micro_model() -> TinyVLM:
    torch.manual_seed(0)
    return TinyVLM(MICRO).eval()


def micro_adapter(model: TinyVLM) -> imagelora.ImageLoRA:
    """Rank 2 in three of four heads, with an update that is not zero."""
    adapter = imagelora.attach(model, r=2, heads={0: [1], 1: [0, 1]})
    for p in adapter.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
    return adapter


@torch.no_grad()
def micro_logits(model: TinyVLM, ids=IMAGE_FIRST) -> torch.Tensor:
    return model(ids, PIXELS).logits


def as_it_was(model: TinyVLM, logits: torch.Tensor) -> bool:
    """No hook, no adapter, every parameter trainable, the same logits."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    free = not hooks and not hasattr(model, "image_lora") and all(p.requires_grad for p in model.parameters())
    return free and torch.equal(micro_logits(model), logits)


def one_sentence(error: BaseException | str) -> bool:
    text = str(error)
    return 8 < len(text) < 1000 and "\n" not in text.strip() and "Traceback" not in text


# Files


class Exploit:
    """Unpickled without weights_only, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def places(tree, at=()):
    """The paths of all the values of nested dicts and lists."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*at, key)
        yield from places(tree[key], (*at, key))


ODD = [None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**400, 1e300, -2.5, float("nan"), float("inf"), "", "0", b"x"]
ODD += [[], [0], [0, 0], [True], [-1], [1.0], [2**63], ["1"], {}, {"0": [0]}, {0: [0]}, {"99": [0]}, (1,)]
ODD += [torch.tensor(3), torch.ones(2, 2), torch.tensor(float("nan")), torch.ones(8, 2, dtype=torch.complex64)]
ODD += [torch.ones(8, 2).to_sparse(), torch.full((), 1e300, dtype=torch.float64), torch.ones((), device="meta")]


def mutated(content: dict, rng: random.Random) -> dict:
    """A copy with one field dropped, added, retyped, moved, duplicated, reshaped or made not finite."""
    content = copy.deepcopy(content)
    path = rng.choice(list(places(content)))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    key, value, kind = path[-1], parent[path[-1]], rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        new = rng.choice(ODD[:17])
        parent.update({new: value}) if isinstance(parent, dict) else parent.append(value)
    elif kind == 2 and isinstance(value, torch.Tensor):
        parent[key] = rng.choice(
            [
                value[None],
                value.mT if value.ndim > 1 else value[None],
                value.flatten()[:1],
                value.double() * 1e300,
                value * torch.nan,
            ]
        )
    elif kind == 3 and isinstance(parent, dict):
        other = rng.choice(list(parent))
        parent[key], parent[other] = parent[other], value
    else:
        parent[key] = rng.choice(ODD)
    return content


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file cut short, with bytes flipped, swapped, removed, repeated or put in front."""
    a, b = sorted(rng.sample(range(len(data) + 1), 2))
    kind = rng.randrange(8)
    if kind == 0:
        return data[:a]
    if kind == 1:
        return data[:a] + data[b:]
    if kind == 2:
        return data[:b] + data[a:]
    if kind == 3:
        return data[a:] + data[:a]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4, 64))):
        at = rng.randrange(len(data))
        changed[at] = rng.randrange(256) if kind < 6 else changed[at] ^ (1 << rng.randrange(8))
    return bytes(changed)


def fuzz(path: Path, content: dict, by_bytes: int, by_fields: int):
    """Write to `path` one mutant after the other of a file of `content`; yields what it now holds, None for unknown."""
    torch.save(content, path)
    data = path.read_bytes()
    for seed in range(by_bytes):
        path.write_bytes(damaged(data, random.Random(seed)))
        yield None
    for seed in range(by_fields):
        mutant = mutated(content, random.Random(seed))
        torch.save(mutant, path)
        yield mutant


def test_a_damaged_adapter_file_is_refused_or_loads_exactly_what_was_saved(tmp_path):
    """1,200 mutants of an adapter file each give one ValueError, the model untouched, or what was saved."""
    model, path = micro_model(), tmp_path / "adapter.pt"
    base = micro_logits(model)
    adapter = micro_adapter(model)
    adapter.save(path)
    adapter.detach()
    original, refused = torch.load(path), 0
    for mutant in fuzz(path, original, by_bytes=700, by_fields=500):
        try:
            loaded = imagelora.load(model, path)
        except ValueError as error:
            refused += 1
            assert one_sentence(error), error
        else:
            saved = mutant or original
            assert (loaded.r, loaded.lora_alpha) == (saved["r"], saved["alpha"])
            assert loaded.heads == {int(k): sorted(v) for k, v in saved["kv_indices"].items() if v}
            for layer, a in loaded.layers.items():
                blocks = [saved["kv_indices"][layer].index(h) for h in a.heads]  # the file's order of heads is its own
                assert torch.equal(a.A, saved["layers"][layer]["A"].float())
                assert torch.equal(a.B, saved["layers"][layer]["B"][blocks].float())
                assert torch.equal(a.gamma.flatten(), saved["layers"][layer]["gamma"].float().flatten())
            loaded.detach()
        assert as_it_was(model, base)
    assert refused > 800


def test_no_file_runs_code(tmp_path):
    """A pickle that would run code, alone or inside a valid zip file, is refused and does not run."""
    model, path, made = micro_model(), tmp_path / "adapter.pt", tmp_path / "made"
    pickle.dumps(Exploit(made))
    for write in (lambda p: p.write_bytes(pickle.dumps(Exploit(made))), lambda p: torch.save({"r": Exploit(made)}, p)):
        write(path)
        for read in (lambda p: imagelora.load(model, p), train.load_base):
            with pytest.raises(ValueError, match=r"damaged or not a PyTorch file") as caught:
                read(path)
            assert one_sentence(caught.value) and not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # it would have run


def base_content() -> dict:
    torch.manual_seed(0)
    config = TinyVLMConfig(
        vocab_size=len(VOCABULARY), vision_hidden_size=8, vision_num_hidden_layers=1, vision_num_attention_heads=2,
        hidden_size=24, num_hidden_layers=2, num_attention_heads=6,
    )  # fmt: skip
    return {"config": config.to_dict(), "state": {k: v.half() for k, v in TinyVLM(config).state_dict().items()}}


def test_a_damaged_base_is_refused_or_is_exactly_what_was_saved(tmp_path):
    """350 mutants of a base file, sizes of terabytes among them, each give one ValueError or the file's weights."""
    path, original, refused = tmp_path / "base.pt", base_content(), 0
    for mutant in fuzz(path, original, by_bytes=150, by_fields=100):
        try:
            model = train.load_base(path)
        except ValueError as error:
            refused += 1
            assert one_sentence(error), error
        else:
            state = (mutant or original)["state"]
            assert all(torch.equal(tensor, state[name].float()) for name, tensor in model.state_dict().items())
    for field in original["config"]:
        for value in (0, -1, 12 if "layers" in field else 4096, 10**9, 10**30, 8.0, "8", None):
            torch.save(original | {"config": original["config"] | {field: value}}, path)
            try:
                model = train.load_base(path)
            except ValueError as error:
                assert one_sentence(error), error
                continue
            size_kept = getattr(model.config, field) == original["config"][field]
            assert size_kept or field.endswith(("_id", "_heads", "_theta"))
    assert refused > 150


class Bar:
    """A progress bar that shows nothing."""

    disable = False

    def update(self, n=1): ...
    def set_postfix_str(self, text, refresh): ...


def small_run(path, steps: int, resume: bool = False, spoil: int | None = None, every: int = 2) -> nn.Linear:
    """train.train_loop on a 2 x 2 linear regression; the loss of step `spoil` is NaN."""
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)

    def loss_of(step):
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
        return (module(x) - x).square().mean() * (torch.nan if step == spoil else 1), ""

    train.train_loop(module, [optimizer], steps, lambda done: 1 - done, loss_of, Bar(), path, "me", resume, every)
    return module


def test_a_damaged_checkpoint_is_refused_or_goes_on_exactly(tmp_path):
    """300 mutants of a checkpoint each give one ValueError, or resume to the very weights of the uninterrupted run."""
    path, refused = tmp_path / "checkpoint.pt", 0
    whole = small_run(tmp_path / "other.pt", 6).weight
    with pytest.raises(train.Diverged):
        small_run(path, 6, spoil=4)
    original = imagelora.safe_load(path)
    assert original["step"] == 4
    for mutant in fuzz(path, original, by_bytes=150, by_fields=150):
        try:
            module = small_run(path, 6, resume=True)
        except (ValueError, train.Diverged) as error:  # finite moments of the optimizer may still make NaN
            refused += 1
            assert one_sentence(error), error
        else:  # a field that has its type, form and range is what was saved
            assert mutant is not None or torch.equal(module.weight, whole)
    assert refused > 180


# Numbers


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(tmp_path):
    """At a NaN loss training stops with the step and a hint, and the weights are those that last gave a finite loss."""
    with pytest.raises(train.Diverged, match=r"nan at step 3; try a smaller --lr than 0\.1"):
        small_run(tmp_path / "a.pt", 9, spoil=3, every=1)
    saved = imagelora.safe_load(tmp_path / "a.pt")  # of the last step with a finite loss
    assert saved["step"] == 3 and all(t.isfinite().all() for t in saved["module"].values())


# Misuse


def test_attaching_twice_anywhere_in_the_model_is_refused():
    """A second adapter in, on or around an adapted model would double the update, so it is refused."""
    model = micro_model()
    outer = nn.Module()
    outer.config, outer.model = model.config, model
    for first, second in ((model, model), (model, outer), (outer, model)):
        adapter = imagelora.attach(first, r=2, heads={1: [0]})
        with pytest.raises(ValueError, match="already has an Image-LoRA"):
            imagelora.attach(second, r=2, heads={0: [0]})
        adapter.detach()
    assert as_it_was(model, micro_logits(model))


def test_models_the_method_does_not_apply_to_are_refused_untouched():
    """No image_token_id, no decoder layers, no v_proj: one ValueError each, and the model is as it was."""
    for breaks, reason in (
        (lambda m: setattr(m, "config", object()), "image_token_id"),
        (lambda m: delattr(m, "config"), "image_token_id"),
        (lambda m: delattr(m, "language_model"), "decoder layers"),
        (lambda m: delattr(m.language_model.layers[1], "self_attn"), "self_attn"),
        (lambda m: delattr(m.language_model.layers[1].self_attn, "v_proj"), "v_proj"),
        (lambda m: setattr(m.language_model.layers[1].self_attn, "head_dim", 3), "head_dim"),
    ):
        model = micro_model()
        breaks(model)
        with pytest.raises(ValueError, match=reason) as caught:
            imagelora.attach(model, r=2)
        assert one_sentence(caught.value) and all(p.requires_grad for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "arguments",
    [
        *({"r": r} for r in (0, -1, 9, 10**9, True, 2.0, "2", None)),
        *({"lora_alpha": a} for a in (0, -1, float("nan"), float("inf"), 10**400, 1e300, True, "16", None)),
        *({"heads": h} for h in ({}, {0: []}, {2: [0]}, {-1: [0]}, {True: [0]}, {"0": [0]}, {0.0: [0]})),
        *({"heads": {0: h}} for h in ([2], [-1], [True], [0.0], ["0"], [None], [0, 0], [[0]])),
    ],
    ids=str,
)
def test_bad_arguments_of_attach_are_refused_in_one_sentence(arguments):
    """A rank, scale or head that the model does not have is a ValueError that leaves the model as it was."""
    model = micro_model()
    base = micro_logits(model)
    with pytest.raises(ValueError) as caught:
        imagelora.attach(model, **{"r": 2} | arguments)
    assert one_sentence(caught.value) and as_it_was(model, base)


@pytest.mark.parametrize("num_heads", [0, -1, 5, True, 2.0, None])
def test_impossible_budgets_are_refused(num_heads):
    """K must be an integer between 1 and the number of heads."""
    with pytest.raises(ValueError, match=r"in 1\.\.4"):
        imagelora.select_heads(torch.ones(2, 2), num_heads)


@pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf"), 10**400, True, "1", None])
def test_impossible_layer_exponents_are_refused(tau):
    """tau must be a finite number, not negative; a large one is a hard maximum and does not overflow."""
    with pytest.raises(ValueError, match="tau"):
        imagelora.select_heads(torch.ones(2, 2), 2, tau)
    assert imagelora.select_heads(torch.tensor([[9e37, 1e37], [1e37, 0.0]]), 2, 1e6) == {0: [0, 1]}


def test_detaching_twice_is_refused_and_saving_after_it_is_right(tmp_path):
    """detach() gives the original model back once; the adapter keeps its weights and can still be saved and loaded."""
    model = micro_model()
    base = micro_logits(model)
    adapter = micro_adapter(model)
    adapted = micro_logits(model)
    assert adapter.detach() is model and as_it_was(model, base) and not torch.equal(adapted, base)
    with pytest.raises(RuntimeError, match="already detached"):
        adapter.detach()
    adapter.save(tmp_path / "a.pt")
    imagelora.load(model, tmp_path / "a.pt")
    assert torch.equal(micro_logits(model), adapted)


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_hidden_layers": 1}, {"num_key_value_heads": 1}], ids=str)
def test_an_adapter_of_another_architecture_is_refused(change, tmp_path):
    """An adapter is loaded only onto a model that has its layers, heads, hidden and head size."""
    micro_adapter(micro_model()).save(tmp_path / "a.pt")
    other = TinyVLM(TinyVLMConfig(**MICRO.to_dict() | change))
    with pytest.raises(ValueError) as caught:
        imagelora.load(other, tmp_path / "a.pt")
    assert one_sentence(caught.value) and as_it_was(other, micro_logits(other))


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    """save() refuses NaN, and the file that was there stays."""
    adapter = micro_adapter(micro_model())
    adapter.save(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    adapter.layers["0"].A.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        adapter.save(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_adapter_moves_with_the_model(dtype):
    """model.to(dtype) after attach takes the adapter along, and the update stays the same up to rounding."""
    model = micro_model()
    micro_adapter(model)
    expected = micro_logits(model)
    model.to(dtype)
    with torch.no_grad():
        logits = model(IMAGE_FIRST, PIXELS.to(dtype)).logits
    assert logits.dtype == dtype and all(p.dtype == dtype for p in model.image_lora.parameters())
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=1e-4 if dtype == torch.float64 else 0.3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_adapted_model_is_its_own(duplicate):
    """A deep copy or pickled copy computes the same, shares nothing with the original, and detaches by itself."""
    model = micro_model()
    base = micro_logits(model)
    micro_adapter(model)
    adapted = micro_logits(model)
    twin = duplicate(model)
    assert torch.equal(micro_logits(twin), adapted)
    twin.image_lora.layers["0"].B.data.zero_()
    twin.image_lora.layers["1"].B.data.zero_()
    assert torch.equal(micro_logits(twin), base) and torch.equal(micro_logits(model), adapted)
    with twin.image_lora.disabled():
        assert torch.equal(micro_logits(model), adapted)
    twin.image_lora.detach()
    assert as_it_was(twin, base) and torch.equal(micro_logits(model), adapted)


def test_threads_may_call_the_model_at_once():
    """Each thread's forward uses the visual tokens of its own input."""
    model, barrier, wrong = micro_model(), threading.Barrier(2), []
    micro_adapter(model)
    expected = [micro_logits(model, ids) for ids in (IMAGE_FIRST, IMAGE_LAST)]

    def meet(module, inputs):  # amid the forward
        barrier.wait(10)

    def call(ids, right):
        for _ in range(20):
            try:
                wrong.append(not torch.equal(micro_logits(model, ids), right))
            except Exception:
                barrier.abort()
                raise

    model.language_model.layers[0].register_forward_pre_hook(meet)
    threads = [threading.Thread(target=call, args=pair) for pair in zip((IMAGE_FIRST, IMAGE_LAST), expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 40


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_no_stale_mask(error):
    """A forward that raises half-way, by Ctrl-C too, changes nothing of the next, whose image is elsewhere."""
    model = micro_model()
    micro_adapter(model)
    expected = micro_logits(model, IMAGE_LAST)

    def fail(module, inputs):
        raise error

    for context in (torch.no_grad, torch.enable_grad):
        handle = model.language_model.layers[1].register_forward_pre_hook(fail)
        with context(), pytest.raises(error):
            model(IMAGE_FIRST, PIXELS)
        handle.remove()
        assert torch.equal(micro_logits(model, IMAGE_LAST), expected)
    with pytest.raises(RuntimeError, match="called by itself"):
        model.language_model(torch.zeros(1, 6, 8), torch.arange(6)[None])


def test_an_exception_inside_a_context_ends_it():
    """disabled() and visual_mask() end with an exception as without one, also nested."""
    model = micro_model()
    adapter = micro_adapter(model)
    expected = micro_logits(model)
    with pytest.raises(ZeroDivisionError), adapter.disabled(), adapter.disabled():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), adapter.visual_mask(IMAGE_LAST == 3):
        raise ZeroDivisionError
    assert torch.equal(micro_logits(model), expected) and adapter.visual.mask is None


def checkpointed_gradient(between) -> torch.Tensor:
    """dL/dA of the first layer under gradient checkpointing, with something done between forward and backward."""
    model = micro_model()
    adapter = micro_adapter(model)
    for layer in model.language_model.layers:
        run = layer.forward
        layer.forward = lambda *inputs, run=run: gradient_checkpoint(run, *inputs, use_reentrant=False)
    loss = model(IMAGE_FIRST, PIXELS, labels=IMAGE_FIRST).loss
    between(model)
    loss.backward()
    return adapter.layers["0"].A.grad


def test_a_call_without_gradients_before_backward_does_not_change_the_gradient():
    """Gradient checkpointing runs the layers again with the visual tokens of their own forward, not of a later call."""

    def evaluate(model):
        micro_logits(model, IMAGE_LAST)

    def fail(model):
        with pytest.raises(ValueError, match="placeholder"):
            model(IMAGE_LAST)

    expected = checkpointed_gradient(lambda model: None)
    assert expected.abs().sum() > 0
    assert torch.equal(checkpointed_gradient(evaluate), expected)
    assert torch.equal(checkpointed_gradient(fail), expected)
    with pytest.raises(RuntimeError, match="cannot be checkpointed"):
        checkpointed_gradient(lambda model: model(IMAGE_LAST, PIXELS))


# The command line


@pytest.fixture(scope="module")
def base_file(tmp_path_factory) -> Path:
    """A small base with random weights."""
    path = tmp_path_factory.mktemp("base") / "base.pt"
    torch.save(base_content(), path)
    return path


def run_main(arguments: list[str], capsys) -> tuple[int, str]:
    """Exit status and last line of stderr of train.main."""
    capsys.readouterr()
    try:
        status = train.main(arguments)
    except SystemExit as stopped:  # of argparse, after its usage
        status = stopped.code
    error = capsys.readouterr().err.strip()
    return status, error if status != 2 or not error.startswith("usage") else error.splitlines()[-1]


@pytest.fixture
def quick(monkeypatch, base_file, tmp_path):
    """train.py on the small base, evaluated on little."""
    evaluate, problems, text = train.evaluate, train.evaluate_word_problems, train.text_logits
    monkeypatch.setattr(train, "BASE", base_file)
    monkeypatch.setattr(train, "evaluate", lambda model, domain, split, n, *rest: evaluate(model, domain, split, 2))
    monkeypatch.setattr(train, "evaluate_word_problems", lambda model, split: problems(model, split, 4))
    monkeypatch.setattr(train, "text_logits", lambda model: text(model, 4))
    monkeypatch.chdir(tmp_path)


SHORT = ["--steps", "2", "--screens", "1", "--questions", "1", "--num-heads", "2", "--r", "2", "--device", "cpu"]


@pytest.mark.parametrize(
    "bad",
    [
        *(["--domain", "marble"], ["--method", "magic"], ["--device", "abacus"], ["--what", "1"], ["--steps", "many"]),
        *([name, "0"] for name in ("--r", "--num-heads", "--steps", "--screens", "--questions")),
        *(["--num-heads", "13"], ["--r", "25"], ["--method", "lora", "--r", "1000000000000"], ["--seed", "-1"]),
        *(["--seed", str(10**30)], ["--lr", "nan"], ["--lr", "-1"], ["--tau", "inf"], ["--lora-alpha", "inf"]),
        *(["--out", "/dev/null/x"], ["--out", "a_file"]),
        *(["--pretrain", "--steps", "0"], ["--pretrain", "--screens", "0"], ["--pretrain", "--lr", "nan"]),
        *(["--compare", "--num-heads", "99"], ["--compare", "--r", "97"], ["--compare", "--tau", "nan"]),
        *(["--pretrain", "--out", "/dev/null/x.pt"], ["--pretrain", "--out", "no_such_directory/x.pt"]),
        *([["--device", "cuda"]] if not torch.cuda.is_available() else []),
        *([["--device", "mps"]] if not torch.backends.mps.is_available() else []),
    ],
    ids=" ".join,
)
def test_bad_input_on_the_command_line_is_one_sentence(bad, quick, capsys):
    """What the command cannot do ends it with status 2 and one sentence on stderr, and no file."""
    Path("a_file").touch()
    status, error = run_main([*(SHORT if bad[0] not in train.MODES else []), *bad], capsys)
    assert status == 2 and one_sentence(error) and "error" in error, error
    assert not [p for p in Path().rglob("*") if p.is_file() and p.name != "a_file"]


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "directory", "text"])
def test_a_base_that_is_none_is_one_sentence(kind, quick, base_file, monkeypatch, capsys):
    """A missing, truncated or foreign base is status 2, a sentence that names the file, and no output."""
    path = Path("base.pt")
    if kind == "truncated":
        path.write_bytes(base_file.read_bytes()[:-1000])
    elif kind == "foreign":
        torch.save({"config": MICRO.to_dict(), "state": micro_model().state_dict()}, path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("not a model\n")
    monkeypatch.setattr(train, "BASE", path)
    status, error = run_main([*SHORT, "--out", "out"], capsys)
    assert status == 2 and one_sentence(error) and "base.pt" in error and not Path("out").exists()


def test_a_run_that_diverges_exits_with_1_and_keeps_the_last_good_adapter(quick, capsys):
    """A learning rate that blows up ends the command with status 1, the step, a hint, and an adapter that loads."""
    status, error = run_main([*SHORT, "--steps", "40", "--lr", "1e18", "--out", "out"], capsys)
    message = error.splitlines()[-1]  # below the progress bar
    assert status == 1 and "step" in message and "smaller --lr" in message and "adapter.pt" in message, error
    imagelora.load(train.load_base(train.BASE), "out/adapter.pt")
    assert not Path("out/metrics.json").exists()


def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(quick, capsys, tmp_path):
    """A write that fails half-way ends the command with status 2 and leaves the old file whole and no temporary one."""
    resource = pytest.importorskip("resource")
    assert run_main([*SHORT, "--out", "out"], capsys)[0] == 0
    before = Path("out/adapter.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes a file: what is longer fails half-way
        status, error = run_main([*SHORT, "--out", "out"], capsys)
        with pytest.raises(OSError):
            imagelora.safe_save({"tensor": torch.zeros(1000)}, tmp_path / "out" / "adapter.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and one_sentence(error.splitlines()[-1]) and error.splitlines()[-1].startswith("error"), error
    assert Path("out/adapter.pt").read_bytes() == before and not list(Path("out").glob(".*"))


# Interruption: one process forks the runs, so that each is a real process and all imports are done once

RUNS = """
import functools, os, sys, torch, torch._dynamo, train
base, out = sys.argv[1:3]
torch.set_num_threads(1)
evaluate, problems, text, loop = train.evaluate, train.evaluate_word_problems, train.text_logits, train.train_loop
train.BASE, train.PROBE_BATCHES = train.Path(base), 2
train.evaluate = lambda model, domain, split, n, *rest: evaluate(model, domain, split, 2)
train.evaluate_word_problems = lambda model, split: problems(model, split, 4)
train.text_logits = lambda model: text(model, 4)
train.train_loop = functools.partial(loop, every=1)  # a checkpoint after every step
for line in sys.stdin:  # each line: the arguments of a run
    open(os.path.join(out, "log"), "w").close()
    pid = os.fork()
    if pid == 0:
        log = os.open(os.path.join(out, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        status = 99
        try:
            status = train.main(line.split())
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def runs(base_file, tmp_path_factory):
    """start(arguments) -> (process id, a function that waits for its exit status); and the folder of `log`."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-c", RUNS, str(base_file), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(train.__file__).parent}
    process = subprocess.Popen(command, **pipes)

    def start(*arguments):
        process.stdin.write(" ".join(map(str, arguments)) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline()), lambda: int(process.stdout.readline())

    yield start, folder
    process.stdin.close()
    assert process.wait(30) == 0


LONG = [*"--steps 30 --screens 1 --questions 1 --num-heads 2 --r 2 --device cpu --out".split()]


def metrics_of(out: Path) -> dict:
    """metrics.json without what may differ between two runs of the same settings."""
    metrics = json.loads((out / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name not in ("seconds", "out", "resume")}


@pytest.fixture(scope="module")
def uninterrupted(runs):
    """(metrics, adapter, seconds) of a whole run."""
    start, folder = runs
    _, wait = start(*LONG, folder / "whole")
    began = time.time()
    assert wait() == 0, (folder / "log").read_text()
    return metrics_of(folder / "whole"), imagelora.safe_load(folder / "whole" / "adapter.pt"), time.time() - began


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def same_adapter(path: Path, adapter: dict) -> bool:
    saved = imagelora.safe_load(path)
    return all(torch.equal(saved["layers"][k][n], t) for k, v in adapter["layers"].items() for n, t in v.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98], ids=["start", "middle", "end"])
def test_ctrl_c_and_sigterm_stop_at_once_and_resume_to_the_same_metrics(number, share, runs, uninterrupted):
    """A stopped run exits with 130 within two seconds, says how to go on, and --resume ends in the same last digit."""
    (start, folder), (metrics, adapter, seconds) = runs, uninterrupted
    out = folder / f"{number}-{share}"
    pid, wait = start(*LONG, out)
    if share == 0.5:  # amid training
        while not (out / "checkpoint.pt").exists():
            time.sleep(0.005)
    else:
        time.sleep(share * seconds)
    kill(pid, number)
    began, status = time.time(), wait()
    log = (folder / "log").read_text()
    assert time.time() - began < 2 and "Traceback" not in log
    if status != 0 or share < 0.9:  # a run that had just ended could not be stopped
        assert status == 130 and f"go on with: python train.py {' '.join(LONG)} {out} --resume" in log, log
        assert share != 0.5 or 0 < imagelora.safe_load(out / "checkpoint.pt")["step"] <= 30
        assert start(*LONG, out, "--resume")[1]() == 0, (folder / "log").read_text()
    assert metrics_of(out) == metrics and same_adapter(out / "adapter.pt", adapter)
    assert sorted(p.name for p in out.iterdir()) == ["adapter.pt", "metrics.json", "predictions.png"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_pretraining_stops_and_goes_on(runs):
    """Ctrl-C in pretraining saves and says how to go on; --resume goes on from that step."""
    start, folder = runs
    out = folder / "base.pt"
    arguments = [*"--pretrain --steps 1000 --screens 1 --questions 1 --settings-screens 1 --out".split(), out]
    for resume in ([], ["--resume"]):
        before = imagelora.safe_load(folder / "base.checkpoint.pt")["step"] if resume else 0
        pid, wait = start(*arguments, *resume)
        while "answers" not in (folder / "log").read_text():  # the first steps are made
            time.sleep(0.02)
        kill(pid, signal.SIGINT)
        assert wait() == 130 and "go on with: python train.py --pretrain" in (folder / "log").read_text()
        assert imagelora.safe_load(folder / "base.checkpoint.pt")["step"] > before and not out.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_any_moment_loses_nothing(runs, uninterrupted):
    """After each of 24 kills at random moments every file is whole, and the run still ends in the same last digit."""
    (start, folder), (metrics, adapter, seconds) = runs, uninterrupted
    rng, kills, farthest = random.Random(0), 0, 0
    out = folder / "killed"
    while kills < 24:
        pid, wait = start(*LONG, out, "--resume")
        time.sleep(rng.uniform(0, 0.8 * seconds))
        kill(pid, signal.SIGKILL)
        status = wait()
        kills += status == -signal.SIGKILL
        if (out / "checkpoint.pt").exists():
            step = imagelora.safe_load(out / "checkpoint.pt")["step"]
            assert status == 0 or step >= farthest
            farthest = step
        if (out / "adapter.pt").exists():
            assert same_adapter(out / "adapter.pt", adapter)
        if (out / "predictions.png").exists():
            train.Image.open(out / "predictions.png").load()
        if (out / "metrics.json").exists():
            assert metrics_of(out) == metrics
            for path in out.iterdir():  # that one ended; begin another
                path.unlink()
            farthest = 0
    assert start(*LONG, out, "--resume")[1]() == 0, (folder / "log").read_text()
    assert metrics_of(out) == metrics and same_adapter(out / "adapter.pt", adapter)


# ---------------------------------------------------------------------------------------------------------------------
# The same file on Hugging Face VLMs: tiny random models of every family, built offline


IMAGE_TOKEN, VIDEO_TOKEN = 90, 91
GENERATE = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
DECODER = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
VIT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT |= {"image_size": 8, "patch_size": 4}
QWEN_VIT = {"depth": 1, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "hidden_size": 16}
QWEN_VIT |= {"intermediate_size": 16, "out_hidden_size": 32, "spatial_merge_size": 2}


def family_config(family):
    """The arguments of `<family>Config` for a decoder of two layers of two value heads, and a small vision tower."""
    text, vision, other = dict(DECODER), dict(VIT), {}
    if family.startswith("Qwen"):
        text |= {"rope_parameters": ROPE, "rope_scaling": ROPE}
        vision = dict(QWEN_VIT)
        other = {"video_token_id": VIDEO_TOKEN, "vision_start_token_id": 92, "vision_end_token_id": 93}
    if family == "Qwen2VL":
        vision |= {"embed_dim": 16, "hidden_size": 32}
    elif family == "Qwen2_5_VL":
        vision |= {"window_size": 16, "fullatt_block_indexes": [0]}
    elif family == "Qwen3VL":
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    elif family == "Llava":
        text["model_type"], vision["model_type"] = "llama", "clip_vision_model"
        other = {"vision_feature_layer": -1}
    elif family == "LlavaOnevision":
        text["model_type"], vision["model_type"] = "qwen2", "siglip_vision_model"
        other = {"vision_feature_layer": -1, "image_grid_pinpoints": [[8, 8]], "video_token_id": VIDEO_TOKEN}
    elif family == "PaliGemma":
        text["model_type"], vision["model_type"] = "gemma", "siglip_vision_model"
        vision["projection_dim"] = 32
        other = {"projection_dim": 32}
    elif family in ("Idefics3", "SmolVLM"):
        text["model_type"] = "llama"
        other = {"scale_factor": 1, "pad_token_id": 0}
    elif family == "InternVL":
        text["model_type"] = "qwen2"
        vision |= {"image_size": [16, 16], "patch_size": [4, 4]}
        other = {"image_seq_length": 4}
    elif family == "Gemma3":
        other = {"boi_token_index": 92, "eoi_token_index": 93, "mm_tokens_per_image": 4}
    name = "image_token_index" if family in ("Llava", "LlavaOnevision", "PaliGemma", "Gemma3") else "image_token_id"
    return {name: IMAGE_TOKEN, "text_config": text, "vision_config": vision, **other}


FAMILIES = ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Llava", "LlavaOnevision", "PaliGemma", "Idefics3", "SmolVLM"]
FAMILIES += ["InternVL", "Gemma3"]


def tiny_hf_vlm(family="Qwen2_5_VL"):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**family_config(family))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("newline"):  # large enough that a change anywhere shows in every logit
            parameter.data.normal_(0, 0.15)
    return model


def vlm_prompt(family="Qwen2_5_VL", starts=(3, 1), kind=IMAGE_TOKEN):
    """A row per start: text, an image from that position on, and text up to one common length."""
    N = 10 if family == "LlavaOnevision" else 4
    T = N + 6
    ids = torch.arange(10, 10 + T).repeat(len(starts), 1)
    for row, start in enumerate(starts):
        ids[row, start : start + N] = kind
        if family.startswith("Qwen"):
            ids[row, start - 1] = 92  # the start of vision
    visual, images = (ids == kind).int(), len(starts)
    pixels = torch.Generator().manual_seed(1)
    if family.startswith("Qwen"):
        name = "pixel_values" if kind == IMAGE_TOKEN else "pixel_values_videos"
        batch = {name: torch.randn(16 * images, 3 * 2 * 16, generator=pixels)}
        batch["image_grid_thw" if kind == IMAGE_TOKEN else "video_grid_thw"] = torch.tensor([[1, 4, 4]] * images)
        if has_token_types():
            batch["mm_token_type_ids"] = visual if kind == IMAGE_TOKEN else 2 * visual
    else:
        size = 16 if family == "InternVL" else 8
        batch = {"pixel_values": torch.randn(images, 3, size, size, generator=pixels)}
        if family in ("Idefics3", "SmolVLM"):
            batch["pixel_values"] = batch["pixel_values"][:, None]
        if family == "LlavaOnevision":  # the whole image and its one crop
            batch["pixel_values"] = batch["pixel_values"][:, None].repeat(1, 2, 1, 1, 1)
            batch["image_sizes"] = torch.tensor([[8, 8]] * images)
        if family in ("PaliGemma", "Gemma3"):
            batch["token_type_ids"] = visual
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **batch}


def has_token_types():
    """transformers 5 asks for `mm_token_type_ids`, 4 refuses to generate with it."""
    return int(pytest.importorskip("transformers").__version__.partition(".")[0]) >= 5


def randomized(adapter):
    generator = torch.Generator().manual_seed(2)
    for a in adapter.layers.values():
        a.B.data.copy_(torch.randn(a.B.shape, generator=generator))
    return adapter


@torch.no_grad()
def logits_of(model, batch):
    return model(**batch).logits


def adapter_gradients(model, adapter, *batches):
    adapter.zero_grad()
    sum(F.cross_entropy(model(**b).logits[:, -1].float(), b["input_ids"][:, 0]) for b in batches).backward()
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


def hooked_modules(model):
    return {name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """One mechanism for all: values of visual tokens in the decoder, so what precedes the image is unchanged, what
    follows is changed, the vision tower is not touched, and with no image in the context logits are the base's."""
    model, batch, text = tiny_hf_vlm(family), vlm_prompt(family), {"input_ids": torch.arange(10, 22)[None]}
    model.requires_grad_(False)  # torch chooses some kernels, and so their rounding, by it
    base, base_text, before = logits_of(model, batch), logits_of(model, text), hooked_modules(model)
    adapter = imagelora.attach(model, r=2)
    projections = {name for name in hooked_modules(model) - before if name}
    assert len(projections) == len(adapter.layers) == 2 and adapter.head_counts == [2, 2]
    assert all(name.endswith("self_attn.v_proj") and "vision" not in name for name in projections)
    assert torch.equal(logits_of(model, batch), base)  # B = 0
    randomized(adapter)
    assert torch.equal(logits_of(model, text), base_text)
    change = (logits_of(model, batch) - base).abs().amax(-1)
    for row, start in enumerate([3, 1]):
        assert (change[row, start:] > 1e-4).all()
        if family != "PaliGemma":  # there a prompt is not causal: text before the image attends to the image too
            assert (change[row, :start] == 0).all()
    adapter.detach()
    assert torch.equal(logits_of(model, batch), base) and hooked_modules(model) == before


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_video_tokens_are_visual_tokens(family):
    """A video is read through its value vectors like an image, so both kinds of placeholder are visual."""
    model = tiny_hf_vlm(family)
    batch = vlm_prompt(family, starts=[3], kind=VIDEO_TOKEN)
    base = logits_of(model, batch)
    randomized(imagelora.attach(model))
    change = (logits_of(model, batch) - base).abs().amax(-1)[0]
    assert (change[:3] == 0).all() and (change[3:] > 1e-4).all()


REFUSED = {
    "Mllama": (
        {"text_config": DECODER | {"cross_attention_layers": [1], "rope_scaling": ROPE | {"rope_type": "default"}}},
        "cross-attention",
    ),
    "Phi4Multimodal": (DECODER | {"vision_config": {}, "audio_config": {}}, "fused qkv"),
    "Gemma3nText": (DECODER | {"num_kv_shared_layers": 1, "layer_types": None}, "share their values"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_work_is_refused(family):
    """Without a value vector per visual token in each layer's own v_proj there is nothing to adapt, so attach says why
    and leaves the model as it was."""
    transformers = pytest.importorskip("transformers")
    arguments, reason = REFUSED[family]
    name = {"Mllama": "MllamaForConditionalGeneration", "Gemma3nText": "Gemma3nForCausalLM"}
    architecture = getattr(transformers, name.get(family, f"{family}ForCausalLM"))
    with torch.device("meta"):
        model = architecture(getattr(transformers, f"{family}Config")(**arguments))
    before = hooked_modules(model)
    with pytest.raises(ValueError, match=reason):
        imagelora.attach(model)
    assert hooked_modules(model) == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_keep_float32_adapters(dtype):
    """The update is computed in float32 and rounded once, so a half-precision base trains as its float32 twin does."""
    model = tiny_hf_vlm()
    expected = adapter_gradients(model, randomized(imagelora.attach(model)), vlm_prompt())
    model = tiny_hf_vlm().to(dtype)
    base = logits_of(model, vlm_prompt())
    adapter = imagelora.attach(model)
    assert torch.equal(logits_of(model, vlm_prompt()), base) and base.dtype == dtype
    got = adapter_gradients(model, randomized(adapter), vlm_prompt())
    assert got.dtype == torch.float32
    assert F.cosine_similarity(got, expected, dim=0) > 0.98


def test_autocast():
    """Autocast chooses the precision of products only, so gradients are those of float32 up to rounding."""
    model = tiny_hf_vlm()
    adapter = randomized(imagelora.attach(model))
    expected = adapter_gradients(model, adapter, vlm_prompt())
    with torch.autocast("cpu", torch.bfloat16):
        got = adapter_gradients(model, adapter, vlm_prompt())
    assert got.dtype == torch.float32
    assert F.cosine_similarity(got, expected, dim=0) > 0.98


def checkpointing(model, use_reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # as always under re-entrant checkpointing of a frozen base
    return model.train()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen3VL", "Llava", "Gemma3"])
def test_gradient_checkpointing(family, use_reentrant):
    """Layers run again in the backward pass with the visual tokens of their forward, so gradients do not change."""
    model = tiny_hf_vlm(family)
    adapter = randomized(imagelora.attach(model))
    expected = adapter_gradients(model.train(), adapter, vlm_prompt(family))
    checkpointing(model, use_reentrant)
    assert torch.equal(adapter_gradients(model, adapter, vlm_prompt(family)), expected)
    loss = F.cross_entropy(model(**vlm_prompt(family)).logits[:, -1], vlm_prompt(family)["input_ids"][:, 0])
    logits_of(model, {"input_ids": torch.arange(10, 15)[None]})  # a forward without gradients leaves no trace
    with adapter.disabled():
        logits_of(model, vlm_prompt(family))
    adapter.zero_grad()
    loss.backward()
    assert torch.equal(torch.cat([p.grad.flatten() for p in adapter.parameters()]), expected)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_two_forwards_before_one_backward(use_reentrant):
    """Each forward has its own visual tokens, so the gradient of a sum of losses is the sum of their gradients; where
    checkpointing could not tell whose layers it runs again, it refuses, and the next step is right."""
    model = tiny_hf_vlm().train()
    adapter = randomized(imagelora.attach(model))
    here, there = vlm_prompt(starts=[3]), vlm_prompt(starts=[1])
    first, second = adapter_gradients(model, adapter, here), adapter_gradients(model, adapter, there)
    assert not torch.allclose(first, second)
    if use_reentrant is None:
        torch.testing.assert_close(adapter_gradients(model, adapter, here, there), first + second)
        return
    checkpointing(model, use_reentrant)
    torch.testing.assert_close(adapter_gradients(model, adapter, here, here), 2 * first)
    with pytest.raises(RuntimeError, match="two forwards with different prompts"):
        adapter_gradients(model, adapter, here, there)
    torch.testing.assert_close(adapter_gradients(model, adapter, there), second)


class PackedLinear(nn.Module):
    """What a quantized linear looks like from outside: features, and a weight that is no [out, in] matrix."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8).flatten())

    def forward(self, x):
        return F.linear(x, self.scale.to(x.dtype) * self.weight.view(self.out_features, -1).to(x.dtype))


def test_quantized_bases():
    """Only the input and output of v_proj are used, so its weight may be packed in any way."""
    model = tiny_hf_vlm()
    for layer in model.model.language_model.layers:
        layer.self_attn.v_proj = PackedLinear(layer.self_attn.v_proj)
    base = logits_of(model, vlm_prompt())
    adapter = imagelora.attach(model)
    assert torch.equal(logits_of(model, vlm_prompt()), base)
    assert adapter_gradients(model, randomized(adapter), vlm_prompt()).count_nonzero()
    assert not torch.equal(logits_of(model, vlm_prompt()), base)


def test_training_moves_only_the_adapter():
    """attach freezes the base, so an optimizer of adapter.parameters() lowers the loss and leaves every base weight."""
    model = tiny_hf_vlm().train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = imagelora.attach(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    optimizer, batch = torch.optim.AdamW(adapter.parameters(), lr=1e-2), vlm_prompt()
    losses = []
    for _ in range(10):
        loss = model(**batch, labels=batch["input_ids"].where(batch["input_ids"] != IMAGE_TOKEN, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    adapter.detach()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Idefics3"])
def test_a_text_only_training_batch_has_gradients_of_zero(family):
    """M X has no rows without an image, so A, B and gamma get gradients, and these are zero: data-parallel training
    needs them to exist."""
    model = tiny_hf_vlm(family).train()
    adapter = randomized(imagelora.attach(model))
    assert adapter_gradients(model, adapter, {"input_ids": torch.arange(10, 15)[None]}).count_nonzero() == 0


GENERATION = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Llava", "SmolVLM"])
def test_generation(family, mode):
    """The adapted values of visual tokens lie in the cache and a decoded token is text, so every way to generate gives
    the logits of whole forward passes without a cache."""
    model, batch = tiny_hf_vlm(family), vlm_prompt(family)
    base = model.generate(**batch, **GENERATE, output_logits=True, return_dict_in_generate=True).logits
    randomized(imagelora.attach(model))
    try:
        out = model.generate(**batch, **GENERATE, **GENERATION[mode], output_logits=True, return_dict_in_generate=True)
    except ValueError as error:
        if mode != "chunked prefill" or has_token_types():
            raise
        pytest.skip(f"transformers 4 does not prefill an image in chunks: {error}")
    whole = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    for step, got in enumerate(out.logits):
        ids = out.sequences[:, : batch["input_ids"].shape[1] + step]
        types = {"mm_token_type_ids": (ids == IMAGE_TOKEN).int()} if "mm_token_type_ids" in batch else {}
        torch.testing.assert_close(got, logits_of(model, {"input_ids": ids, **whole, **types})[:, -1].float())
    assert not torch.allclose(out.logits[0], base[0], atol=1e-3)


def test_beams():
    """Beams reorder the cache and repeat the prompt's rows, so they find what they find without a cache."""
    model, batch = tiny_hf_vlm(), vlm_prompt()
    randomized(imagelora.attach(model))
    options = GENERATE | {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    cached, whole = (model.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(cached.sequences_scores, whole.sequences_scores)


def test_on_visual_tokens_alone_it_is_peft_lora_on_v_proj():
    """With every token visual M is the identity, so without 1/sqrt|S| the update is standard LoRA's on W_V: same
    matrices, same output, same gradients as PEFT's."""
    peft = pytest.importorskip("peft")
    batch = vlm_prompt("Llava", starts=(0, 4))
    batch["input_ids"] = torch.full((1, 8), IMAGE_TOKEN)
    batch["attention_mask"] = torch.ones(1, 8)
    ours, theirs = tiny_hf_vlm("Llava"), tiny_hf_vlm("Llava")
    adapter = randomized(imagelora.attach(ours, r=4, lora_alpha=6, normalize=False))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*language_model.*v_proj")
    theirs = peft.get_peft_model(theirs, config)
    loras = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.Linear)]
    for a, lora in zip(adapter.layers.values(), loras, strict=True):
        lora.lora_A["default"].weight.data.copy_(a.A.T)
        lora.lora_B["default"].weight.data.copy_(a.B.transpose(0, 1).flatten(1).T)  # [S * d_h, r]
    got, expected = ours(**batch).logits, theirs(**batch).logits
    torch.testing.assert_close(got, expected)
    got.square().mean().backward()
    expected.square().mean().backward()
    for a, lora in zip(adapter.layers.values(), loras, strict=True):
        torch.testing.assert_close(a.A.grad.T, lora.lora_A["default"].weight.grad)
        torch.testing.assert_close(a.B.grad.transpose(0, 1).flatten(1).T, lora.lora_B["default"].weight.grad)


def test_adapter_files_of_the_authors(tmp_path):
    """Their file holds A [D, r], B [S, r, d_h] and gamma for each layer: loaded, it gives the logits of their formula,
    gamma * alpha / r / sqrt|S| * x A B(h) added to a slice of one row."""
    generator = torch.Generator().manual_seed(3)
    content = {"model_name": "tiny", "r": 4, "alpha": 6.0, "kv_indices": {"0": [1], "1": [1, 0]}, "layers": {}}
    for layer, heads in content["kv_indices"].items():
        A, B = torch.randn(32, 4, generator=generator), torch.randn(len(heads), 4, 8, generator=generator)
        content["layers"][layer] = {"A": A, "B": B, "gamma": torch.tensor(0.7)}
    torch.save(content, tmp_path / "theirs.pt")
    model, batch = tiny_hf_vlm(), vlm_prompt(starts=[3])
    handles = []
    for layer, heads in content["kv_indices"].items():

        def their_formula(module, inputs, value, saved=content["layers"][layer], heads=heads):
            value = value.clone()
            for B, head in zip(saved["B"], heads):
                update = saved["gamma"] * 6 / 4 / len(heads) ** 0.5 * inputs[0][0, 3:7] @ saved["A"] @ B
                value[0, 3:7, 8 * head : 8 * head + 8] += update
            return value

        v_proj = model.model.language_model.layers[int(layer)].self_attn.v_proj
        handles.append(v_proj.register_forward_hook(their_formula))
    expected = logits_of(model, batch)
    for handle in handles:
        handle.remove()
    adapter = imagelora.load(model, tmp_path / "theirs.pt")
    torch.testing.assert_close(logits_of(model, batch), expected)
    adapter.save(tmp_path / "ours.pt")
    again = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert set(again) == set(content) and again["kv_indices"] == {"0": [1], "1": [0, 1]}
    assert torch.equal(again["layers"]["1"]["B"], content["layers"]["1"]["B"].flip(0))


def test_head_selections_of_the_authors():
    """Their selection is a JSON file with `kv_indices`, so it names the heads to attach."""
    content = json.loads('{"kv_indices": {"1": [0]}, "scores": {"1": [0.3, 0.1]}}')
    heads = imagelora.read_heads(content, "selection.json")
    assert imagelora.attach(tiny_hf_vlm(), heads=heads).heads == {1: [0]}


@contextmanager
def one_process_mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_fully_sharded_data_parallel(tmp_path):
    """The adapter is a submodule of the model, so fully_shard of the layers and then of the model shards it too, and
    gradients are those of the unsharded model."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = tiny_hf_vlm()
    adapter = randomized(imagelora.attach(model))
    expected = adapter_gradients(model, adapter, vlm_prompt())
    adapter.save(tmp_path / "whole.pt")
    with one_process_mesh() as mesh:
        for layer in model.model.language_model.layers:
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        adapter.zero_grad()
        F.cross_entropy(model(**vlm_prompt()).logits[:, -1], vlm_prompt()["input_ids"][:, 0]).backward()
        got = torch.cat([p.grad.full_tensor().flatten() for p in adapter.parameters()])
        torch.testing.assert_close(got, expected)
        adapter.save(tmp_path / "gathered.pt")
    whole, gathered = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "gathered.pt"))
    assert str(whole) == str(gathered)


def test_an_interrupted_forward_leaves_no_trace():
    """A key press may stop a forward anywhere, so the next one starts anew."""
    model, batch = tiny_hf_vlm(), vlm_prompt()
    randomized(imagelora.attach(model))
    expected = logits_of(model, batch)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits_of(model, batch)
    handle.remove()
    assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("offloaded", [False, True])
def test_device_maps(offloaded, tmp_path):
    """Rows move to the device of each layer's input, so a model that accelerate spread or offloaded is adapted too."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_hf_vlm()
    adapter = randomized(imagelora.attach(model))
    expected = logits_of(model, vlm_prompt())
    adapter.detach()
    if offloaded:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    adapter = randomized(imagelora.attach(model))
    adapter.load_state_dict(randomized(imagelora.attach(tiny_hf_vlm())).state_dict())
    assert torch.equal(logits_of(model, vlm_prompt()), expected)


def test_the_readme_example_runs(monkeypatch, tmp_path):
    """The README's examples for real models are code, so they run, here on a tiny random model."""
    pytest.importorskip("transformers")
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = tiny_hf_vlm()
    monkeypatch.setattr(type(model), "from_pretrained", lambda *args, **kwargs: model)
    monkeypatch.chdir(tmp_path)
    prompt = vlm_prompt()
    ids = prompt["input_ids"]
    names = {"batches": [prompt | {"labels": ids.masked_fill(ids == IMAGE_TOKEN, -100)}] * 2, "prompt": prompt}
    names |= {"embeds": torch.randn(*ids.shape, 32), "mask": ids == IMAGE_TOKEN, "labels": ids}
    for example in examples:
        exec(example, names)
    assert len(examples) == 2 and names["adapter"].heads and (tmp_path / "adapter.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# `python test_imagelora.py --bench`: the time of a training step over the same step without an adapter


ROUNDS, REPETITIONS = 8, 25


def bench_model():
    """Qwen2.5-VL's decoder at hidden size 256 with 2 layers; the vision tower is not run."""
    import transformers

    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 4, "vocab_size": 1024, "rope_parameters": rope, "rope_scaling": rope}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 256}
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=1000)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).train()


@contextmanager
def no_adapter(model, mask):
    """A constant that needs a gradient is added to the values: gradients flow as deep as an adapter needs them."""
    with train.constant_added([layer.self_attn.v_proj for layer in model.model.language_model.layers]):
        yield []


@contextmanager
def image_lora(heads, model, mask):
    adapter = attach(model, heads=heads)
    with adapter.visual_mask(mask):
        yield adapter.parameters()
    adapter.detach()


@contextmanager
def peft_lora(projections, model, mask):
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=rf".*language_model.*self_attn.({projections})")
    adapted = peft.get_peft_model(model, config)
    yield [p for p in adapted.parameters() if p.requires_grad]
    adapted.unload()


@contextmanager
def authors_release(script, model, mask):
    """The wrappers of the authors' imagelora_train_minimal.py; visual tokens are the first ones."""
    bank = script["build_imagelora_bank"](model, r=8, alpha=16)
    with script["apply_imagelora"](model, bank, -1, int(mask.sum())):
        yield [p for layer in bank.values() for p in layer.parameters()]


def bench(*scripts):
    """Ratios of interleaved repetitions: the median of each round, and over the rounds its mean and standard error.

    A round has its own model, which all methods share, as the place of its weights in memory alone can change a step by
    3 %; "no adapter, again" shows what is left of the noise."""
    torch.set_num_threads(1)
    methods = {
        "no adapter": no_adapter,
        "no adapter, again": no_adapter,
        "Image-LoRA, all heads": partial(image_lora, {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}),
        "Image-LoRA, half of the heads": partial(image_lora, {0: [0, 1], 1: [0, 1]}),
        "Image-LoRA, all heads of half of the layers": partial(image_lora, {0: [0, 1, 2, 3]}),
        "PEFT LoRA on v_proj": partial(peft_lora, "v_proj"),
        "PEFT LoRA on q, k, v, o": partial(peft_lora, "[qkvo]_proj"),
    }
    sys.modules.setdefault("qwen_vl_utils", types.SimpleNamespace(process_vision_info=None))
    for script in scripts:
        release = partial(authors_release, runpy.run_path(script))
        methods[f"the authors' release, all heads ({Path(script).name})"] = release
    print(f"training step over the step without an adapter, {ROUNDS} medians of {REPETITIONS}, one thread")
    names = deque(methods)
    for visual, text in ((256, 64), (64, 256)):
        ids = torch.randint(0, 1000, (1, visual + text))
        ids[0, :visual] = 1000
        embeds, position_ids = torch.randn(1, visual + text, 256), torch.arange(visual + text).expand(3, 1, -1)
        inputs = {"inputs_embeds": embeds, "position_ids": position_ids, "labels": ids}
        medians = {name: [] for name in methods}
        for _ in range(ROUNDS):
            model, times = bench_model().requires_grad_(False), {name: [] for name in methods}
            for _ in range(REPETITIONS):
                names.rotate(1)  # no method always comes first
                for name in names:
                    with methods[name](model, ids == 1000) as parameters:
                        times[name].append(step_time(model, inputs, list(parameters)))
            for name in methods:
                medians[name].append(statistics.median(t / f for t, f in zip(times[name], times["no adapter"])))
        print(f"{visual} visual + {text} text tokens")
        for name in list(methods)[1:]:
            error = statistics.stdev(medians[name]) / math.sqrt(ROUNDS)
            print(f"  {name:64}{statistics.mean(medians[name]):.3f} ± {error:.3f}")


def step_time(model, inputs, parameters):
    """Processor seconds of a training step, the second of two, as the first one warms up."""
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        start = time.process_time()
        model(**inputs).loss.backward()
        passed = time.process_time() - start
    return passed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bench"]:
        bench(*sys.argv[2:])
    else:
        print("usage: pytest, or python test_imagelora.py --bench [the authors' imagelora_train_minimal.py]")
