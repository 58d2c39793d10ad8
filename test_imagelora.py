"""Read in order: each test is a sentence of the method, and its body is the proof. 1 to 6 are the paper's argument."""

import copy
import json
import math
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import imagelora
import train
from data import SPLITS, compare, costs, parse, pretrain, prompts, screens, tokenizer, word_problems
from data.screens import DOMAINS, PAIRED, draw_screen, is_hit
from imagelora import attach, image_lora_flops, load, lora_flops, score_heads, select_heads
from tiny_vlm import TinyVLM, TinyVLMConfig

IMG, P = 3, 4  # the placeholder's id, visual tokens an image
D, D_H, H, L = 24, 4, 3, 3  # hidden size, head size, value heads a layer, layers
torch.set_num_threads(1)  # two wait for each other where another process runs
TEXT, BEFORE, IMAGE, AFTER = [1, 5, 6, 7, 8, 9], [1, 5, 6], [IMG] * P, [7, 8, 9, 10]


def tiny_vlm(**changes) -> TinyVLM:
    """Three layers of six query and three value heads, random weights."""
    sizes = dict(vocab_size=40, image_size=32, hidden_size=D, num_hidden_layers=L, num_key_value_heads=H)
    sizes |= dict(vision_hidden_size=16, vision_num_hidden_layers=1, vision_num_attention_heads=2)
    torch.manual_seed(0)
    return TinyVLM(TinyVLMConfig(**sizes | changes)).eval()


def prompt(*rows: list[int], labels: bool = False) -> dict:
    """Rows of equal length, and as many pictures as they have images, as the model's arguments."""
    ids = torch.tensor(rows)
    pictures = torch.rand(int((ids == IMG).sum()) // P, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "pixel_values": pictures if len(pictures) else None}
    return batch | ({"labels": ids.masked_fill(ids == IMG, -100)} if labels else {})


def attach_trained(model, **options) -> imagelora.ImageLoRA:
    """An adapter as after training: B is not zero, gamma is not 1."""
    adapter = attach(model, **options)
    torch.manual_seed(2)
    for a in adapter.layers.values():
        nn.init.normal_(a.B)
        nn.init.constant_(a.gamma, 0.7)
    return adapter


def attention(model, layer: int) -> nn.Module:
    return model.language_model.layers[layer].self_attn


@torch.no_grad()
def logits_of(model, batch: dict) -> torch.Tensor:
    return model(**batch).logits


def counted_flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def state_of(model) -> tuple:
    """What must be as before once an adapter is gone: names, what is trainable, gradients, hooks and forwards."""
    changed = [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules()]
    return changed, [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]


# 1. The update is made of the values of visual tokens in selected heads, and of nothing else
def test_the_values_are_the_papers_formula():
    """V~(h) = X W_V(h) + gamma (alpha / r) 1/sqrt|S| M X A B(h) for h in S, one token and one head at a time. A layer
    that is not named, or has no heads, gets no adapter."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    adapter = attach_trained(model, r=2, lora_alpha=6, heads={0: [2, 0], 1: []})
    assert list(adapter.layers) == ["0"] and sum(p.numel() for p in adapter.parameters()) == D * 2 + 2 * 2 * D_H + 1
    A, B, gamma = adapter.parameters()
    X, value = costs.watch(model, batch, v=attention(model, 0).v_proj)["v"]
    W_V = attention(model, 0).v_proj.weight.T  # [D, H * d_h]
    for t, token in enumerate(batch["input_ids"][0]):
        for h in range(H):
            columns = slice(h * D_H, (h + 1) * D_H)
            expected = X[0, t] @ W_V[:, columns]
            if token == IMG and h in (0, 2):
                expected = expected + gamma * (6 / 2) * (1 / math.sqrt(2)) * X[0, t] @ A @ B[[0, 2].index(h)]
            torch.testing.assert_close(value[0, t, columns], expected)


def test_it_starts_as_the_base_model_so_the_first_gradient_reaches_b_only():
    """B starts at zero: until it is trained the model is the base model, exactly, and the loss does not depend on A or
    gamma. These start as in LoRA: A uniform in +-1/sqrt(D), gamma at 1."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER, labels=True)
    base, adapter = model(**batch).logits, attach(model, heads={0: [0, 2], 1: [1]})
    adapted = model(**batch)
    assert torch.equal(adapted.logits, base)
    adapted.loss.backward()
    for a in adapter.layers.values():
        assert not a.A.grad.any() and not a.gamma.grad.any() and a.B.grad.flatten(1).any(1).all()
        assert a.gamma.item() == 1 and a.A.shape == (D, 8) and 0.9 < a.A.abs().max() * D**0.5 <= 1


def test_text_with_no_image_before_it_is_the_base_models_bit_for_bit():
    """Attention is causal, so only what comes after an image can read its values. With no image in the context a
    trained adapter changes nothing: logits, answers, a row of a mixed batch."""
    model, text, mixed = tiny_vlm(), prompt(TEXT), prompt(TEXT + AFTER + [2], BEFORE + IMAGE + AFTER)
    base, base_mixed, answer = logits_of(model, text), logits_of(model, mixed), model.generate(**text, max_new_tokens=6)
    attach_trained(model)
    assert torch.equal(logits_of(model, text), base)
    assert torch.equal(model.generate(**text, max_new_tokens=6), answer)
    changed = (logits_of(model, mixed) != base_mixed).any(-1)
    assert changed.tolist() == [[False] * 11, [False] * len(BEFORE) + [True] * len(IMAGE + AFTER)]


@pytest.mark.parametrize("heads", [[0, 2], [0, 1, 2]])
def test_where_the_first_adapted_layer_looks_does_not_change_only_what_it_reads(heads):
    """Queries and keys are untouched, to the bit, and so are the values of other tokens and of other heads."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + [5] + IMAGE + AFTER)
    parts = {name: getattr(attention(model, 1), f"{name}_proj") for name in "qkv"}
    adapter, visual = attach_trained(model, heads={1: heads, 2: [1]}), batch["input_ids"] == IMG
    adapted = costs.watch(model, batch, **parts)
    with adapter.disabled():
        base = costs.watch(model, batch, **parts)
    for name in parts:
        changed = (adapted[name][1] != base[name][1]).unflatten(-1, (-1, D_H)).any(-1)  # [B, T, heads]
        selected = torch.tensor([name == "v" and h in heads for h in range(changed.shape[2])])
        assert torch.equal(changed, visual[..., None] & selected), name


def test_normalization_makes_the_first_update_as_large_for_every_number_of_heads():
    """Adam's first step moves every entry of B by the learning rate. With 1/sqrt|S| the update ||Delta V||^2 of all the
    heads is then the mean of what each of them gets when adapted alone; without the factor it is the sum."""
    batch = prompt(BEFORE + IMAGE + AFTER, labels=True)

    def first_update(heads, normalize):
        model = tiny_vlm()
        adapter = attach(model, heads={1: heads}, normalize=normalize)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01, eps=1e-30)
        model(**batch).loss.backward()
        optimizer.step()
        x, value = costs.watch(model, batch, v=attention(model, 1).v_proj)["v"]
        return (value - x @ attention(model, 1).v_proj.weight.T).square().sum().item()

    alone = [first_update([h], normalize=True) for h in range(H)]
    assert first_update([0, 1, 2], normalize=True) == pytest.approx(sum(alone) / H, rel=1e-3)
    assert first_update([0, 1, 2], normalize=False) == pytest.approx(sum(alone), rel=1e-3)


# 2. Which tokens are visual follows from input_ids, at every forward
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows(side):
    """Images at different places, two images, none, padding: each row is adapted at its own tokens."""
    rows = [BEFORE + IMAGE + AFTER, IMAGE + AFTER, [1, *IMAGE, 5, *IMAGE, 6, 7], TEXT]
    attach_trained(model := tiny_vlm())
    padding = [[0] * (12 - len(row)) for row in rows]
    batch = prompt(*(pad + row if side == "left" else row + pad for pad, row in zip(padding, rows)))
    mask = batch["input_ids"] != 0
    together, pictures = model(**batch, attention_mask=mask).logits, batch["pixel_values"]
    for got, own, row, images in zip(together, mask, rows, (pictures[:1], pictures[1:2], pictures[2:], None)):
        torch.testing.assert_close(got[own], model(torch.tensor([row]), images).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_decoding_with_a_cache_equals_decoding_without_and_costs_nothing():
    """Adapted values are in the KV cache after prefill, in one piece or cut anywhere between images, so a decoded text
    token triggers no adapter product at all."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + IMAGE + AFTER)
    (ids, pictures), adapter = batch.values(), attach_trained(model)
    cached, whole = model.generate(**batch, max_new_tokens=6), model(**batch).logits
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=6, use_cache=False))
    for cut in (1, 3 + P, 3 + 2 * P, 4 + 2 * P):
        done = int((ids[:, :cut] == IMG).sum()) // P
        first = model(ids[:, :cut], pictures[:done] if done else None)
        rest = model(ids[:, cut:], pictures[done:] if done < 2 else None, past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)
    decode = partial(model, ids[:, -1:], past_key_values=rest.past_key_values)
    adapted = counted_flops(decode)
    with adapter.disabled():
        assert counted_flops(decode) == adapted > 0


class FromEmbeddings(TinyVLM):  # Hugging Face's other way to call a model: inputs_embeds instead of input_ids
    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.language_model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return self.language_model(x, torch.arange(x.shape[1])[None])[0]


def test_embeddings_alone_need_an_explicit_mask():
    """Without input_ids the visual tokens are unknown: refused, or taken from visual_mask(), never guessed."""
    model, ids = FromEmbeddings(tiny_vlm().config), torch.tensor([[1, IMG, IMG, 5, 6, 7], [1, 5, 6, IMG, IMG, 7]])
    x, mask = model.language_model.embed_tokens(ids), ids == IMG
    base, adapter, adapted = model(inputs_embeds=x), attach_trained(model), model(input_ids=ids)
    with pytest.raises(ValueError, match=r"input_ids by name, or inputs_embeds inside adapter.visual_mask\(mask\)"):
        model(inputs_embeds=x)
    with adapter.visual_mask(mask):
        got = model(inputs_embeds=x)
    assert torch.equal(got, adapted) and torch.autograd.grad(got.sum(), x)[0].any()
    with adapter.visual_mask(mask.repeat_interleave(2, 0)):  # as generate() repeats each prompt for its beams
        torch.testing.assert_close(model(inputs_embeds=x.repeat_interleave(2, 0)), adapted.repeat_interleave(2, 0))
    with adapter.visual_mask(mask.flip(0)):
        assert torch.equal(model(input_ids=ids), adapted)  # the ids know better
        assert not torch.equal(model(inputs_embeds=x), adapted)  # the same memory, given under another mask
    with adapter.visual_mask(mask), adapter.disabled():
        assert torch.equal(model(inputs_embeds=x), base)
    for wrong in (ids, mask[0]):
        with pytest.raises(ValueError, match=r"must be a bool tensor \[B, T\], got"):
            adapter.visual_mask(wrong)
    for wrong, told in ((mask[:, 1:], r"\[2, 5\]"), (mask[:1], r"\[1, 6\]")):
        told = rf"tell of tokens .*{told}.*, v_proj got .*\[2, 6\].*; for beams, mask.repeat_interleave\(num_beams, 0\)"
        with adapter.visual_mask(wrong), pytest.raises(RuntimeError, match=told):
            model(inputs_embeds=x)


# 3. Training moves A, B and gamma, and nothing else
def test_only_the_adapter_is_trained():
    """A, B and gamma are the model's only parameters that require, and get, a gradient; they are in its state_dict.
    Without visual tokens, or in disabled(), it is zero, not missing, as data-parallel training needs."""
    adapter = attach_trained(model := tiny_vlm())
    own = {f"image_lora.layers.{layer}.{name}" for layer in range(L) for name in ("A", "B", "gamma")}
    for row, context in ((BEFORE + IMAGE + AFTER, nullcontext), (TEXT, nullcontext), (IMAGE + AFTER, adapter.disabled)):
        model.zero_grad()
        with context():
            model(**prompt(row, labels=True)).loss.backward()
        assert own == {name for name, p in model.named_parameters() if p.requires_grad}
        assert own == {name for name, p in model.named_parameters() if p.grad is not None}
        assert {p.grad.any().item() for p in adapter.parameters()} == {IMG in row and context is nullcontext}
    assert own <= set(model.state_dict())


def test_a_state_dict_loads_also_averaged_and_not_into_other_heads_or_layers():
    adapter, batch = attach_trained(model := tiny_vlm(), heads={0: [1], 2: [0, 2]}), prompt(IMAGE + AFTER)
    attach(other := tiny_vlm(), heads=adapter.heads)
    averaged = {name: 0.7 * t + 0.3 * t for name, t in model.state_dict().items()}
    for state, strict in ((averaged, True), (tiny_vlm().state_dict(), False)):  # of the base: the adapter stays
        other.load_state_dict(state, strict)
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits)
    for heads in ({0: [2], 2: [0, 2]}, {0: [1]}, {0: [1], 1: [0], 2: [0, 2]}, {0: [1], 2: [0, 1, 2]}):
        attach(other := tiny_vlm(), heads=heads)
        for each, state in ((other, model.state_dict()), (other.image_lora, adapter.state_dict())):
            with pytest.raises(RuntimeError, match="in other layers or heads|size mismatch for .*layers.2.B"):
                each.load_state_dict(state, strict=False)


def test_a_narrower_type_is_the_models_alone():
    adapter = attach_trained(model := tiny_vlm())
    trained = [p.clone() for p in adapter.parameters()]
    assert attention(model.bfloat16(), 0).v_proj.weight.dtype == torch.bfloat16
    assert all(map(torch.equal, adapter.parameters(), trained))
    assert model.double().image_lora.layers["0"].A.dtype == torch.double != model.float().image_lora.layers["0"].A.dtype


# 4. Which heads: the probe and the budget
def test_the_exact_probe_is_the_squared_gradient_of_the_value_weights_over_visual_tokens():
    """I(l, h) = ||X_vis^T G_l(h)||^2: the gradient that full fine-tuning of W_V(h) on visual tokens would follow. It is
    squared batch by batch, so batches of one example give the per-example score, which is another."""
    model, rows = tiny_vlm(), (BEFORE + IMAGE + AFTER, AFTER + IMAGE + BEFORE)

    def by_hand(batch):
        twin, visual = tiny_vlm(), (batch["input_ids"] == IMG)[..., None]
        values = [attention(twin, layer).v_proj for layer in range(L)]
        for v in values:  # at the other tokens its weight is a constant
            v.register_forward_hook(lambda v, inputs, value: value.where(visual, inputs[0] @ v.weight.detach().T))
        slopes = torch.autograd.grad(twin(**batch).loss, [v.weight for v in values])  # each [H * d_h, D]
        return torch.stack(slopes).unflatten(1, (H, D_H)).square().sum((2, 3))

    scores = score_heads(model, [prompt(row, labels=True) for row in rows], probe="exact")
    torch.testing.assert_close(scores, sum(by_hand(prompt(row, labels=True)) for row in rows) / 2)
    together = score_heads(model, [prompt(*rows, labels=True)], probe="exact")
    torch.testing.assert_close(together, by_hand(prompt(*rows, labels=True)))
    assert not torch.allclose(together, scores, rtol=0.1)


@pytest.mark.parametrize("weights", [[1, 1], [1, 6]], ids=["equal", "one dominates"])
def test_the_rank_1_probe_is_an_unbiased_sketch_whose_noise_is_bounded_by_the_batches_own_scores(weights):
    """dL/dB = A^T X_vis^T G with a new A ~ N(0, I) for each batch: the mean of its square is the exact score, its
    relative standard deviation at most sqrt(2 sum_b s_b^2) / sum_b s_b, where s_b is batch b's exact score. A single
    visual token attains the bound."""
    model, ids = tiny_vlm(image_size=16, num_hidden_layers=12), torch.tensor([[1, IMG, 5, 6]])
    labels, picture = ids.masked_fill(ids == IMG, -100), torch.rand(1, 3, 16, 16)
    scores = partial(score_heads, model, weights, lambda model, weight: weight * model(ids, picture, labels).loss)
    exact = scores(probe="exact")  # s_b is in proportion to weight^2
    draws = torch.stack([scores(seed=seed) for seed in range(25)]) / exact
    bound = math.sqrt(2 * sum(w**4 for w in weights)) / sum(w**2 for w in weights)
    assert draws.mean() == pytest.approx(1, abs=0.1)
    assert (draws - 1).square().mean().sqrt() == pytest.approx(bound, rel=0.15)


@pytest.mark.parametrize("probe", ["rank1", "exact"])
def test_the_probe_finds_the_only_head_that_can_help_even_when_it_is_silent(probe):
    """B has a gradient where the value is read, even if the base writes nothing there (a gate on it would score 0)."""
    model = tiny_vlm(num_key_value_heads=6)
    for layer in model.language_model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # no head is read ...
    chosen, columns = attention(model, 1), slice(2 * D_H, 3 * D_H)
    chosen.o_proj.weight.data[:, columns].normal_()  # ... but head 2 of layer 1,
    chosen.v_proj.weight.data[columns].zero_()  # whose base value is zero
    scores = score_heads(model, [prompt(BEFORE + IMAGE + AFTER, labels=True)], probe=probe)
    assert scores.nonzero().tolist() == [[1, 2]] and select_heads(scores, 1) == {1: [2]}


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 3.0])
def test_selection_meets_every_budget_exactly(tau):
    """The budgets sum to K whatever the scores (uneven, zero, equal), and a layer's are its most influential heads."""
    torch.manual_seed(0)
    for scores in (torch.rand(5, 4) ** 8, torch.zeros(5, 4), torch.ones(5, 4), torch.rand(5, 4) * torch.eye(5, 4)):
        for budget in range(1, 21):
            heads = select_heads(scores, budget, tau)
            assert sum(map(len, heads.values())) == budget
            for layer, chosen in heads.items():
                assert chosen == sorted(set(chosen))
                assert sorted(scores[layer].tolist())[-len(chosen)] <= min(scores[layer][chosen].tolist())


@pytest.mark.parametrize(
    "influence, size, budget, tau, expected",
    [
        ([9, 1], 6, 4, 0.5, {0: 3, 1: 1}),  # the square roots are as 3 to 1
        ([6, 2, 0], 8, 6, 0, {0: 2, 1: 2, 2: 2}),  # even
        ([6, 2, 0], 8, 8, 1, {0: 6, 1: 2}),  # in proportion
        ([6, 2, 0], 8, 10, 20, {0: 8, 1: 2}),  # the most influential layers first
        ([0, 0], 8, 6, 0.5, {0: 3, 1: 3}),  # nothing to tell them apart: evenly
        ([53, 24, 23], 7, 7, 1, {0: 3, 1: 2, 2: 2}),  # Sainte-Lague; d'Hondt would give 4, 2, 1
        ([9e37, 1e37], 4, 2, 1e9, {0: 2}),  # no power overflows,
        ([9e-30, 1e-30], 4, 2, 20, {0: 2}),  # or is lost
    ],
)
def test_the_layers_share_the_budget_by_their_influence_to_the_power_of_tau(influence, size, budget, tau, expected):
    scores = torch.tensor(influence)[:, None].float().expand(-1, size) / size
    assert {layer: len(heads) for layer, heads in select_heads(scores, budget, tau).items()} == expected


# 5. The cost, and why it cannot be merged
@pytest.mark.parametrize("heads", [None, {0: [1]}, {1: [0, 2], 2: [1]}])
def test_counted_flops_are_the_computed_ones(heads):
    """Forward 2Nr(D + |S|d_h), backward dB, dz, dA, and dx in all adapted layers but the lowest: over the N visual
    tokens only, beyond what the same step costs when no token is visual."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER, AFTER + IMAGE + BEFORE, labels=True)
    adapter = attach_trained(model, r=5, heads=heads)
    step = counted_flops(lambda: model(**batch).loss.backward())
    with adapter.disabled():
        backbone = counted_flops(lambda: model(**batch).loss.backward())
    assert step - backbone == adapter.flops(2 * P) == image_lora_flops(2 * P, D, D_H, adapter.heads, r=5)


def test_the_three_savings_multiply():
    """LoRA on one Linear is z = xA, y = zB, and their gradients; dx where the input needs one. 60 visual tokens of 100,
    values instead of q, k, v, o, and half of 8 heads make 0.6 x 1/4 x 3/4 of it: A is shared by a layer's heads."""
    x, a, b = (torch.randn(size, requires_grad=True) for size in ((100, 64), (64, 8), (8, 64)))
    linear, dx = lora_flops(100, 64, 64, 8), 2 * 100 * 8 * 64
    assert counted_flops(lambda: (x @ a @ b).sum().backward()) == linear == dx + lora_flops(100, 64, 64, 8, False)
    assert counted_flops(lambda: (x.detach() @ a @ b).sum().backward()) == linear - dx
    ours = image_lora_flops(60, 64, 8, {layer: [0, 1, 2, 3] for layer in range(4)}, 8, input_grad=True)
    assert ours / (4 * 4 * linear) == pytest.approx(0.6 * (1 / 4) * (3 / 4))
    assert costs.lora_costs(4, 64, 8, 8, 8, 100, 8) == (4 * 4 * 8 * (64 + 64), 4 * 4 * linear - 3 * dx)  # layer 0's
    assert costs.lora_costs(4, 64, 8, 2, 8, 100, 8, "vo")[0] == 4 * 8 * (64 + 16 + 64 + 64)  # two value heads of 8


def test_no_value_weight_reproduces_the_adapter_on_mixed_tokens():
    """On visual tokens alone the best single W leaves nothing over: the adapter could be merged. With text among them
    no W fits: the update depends on the token's kind."""
    torch.manual_seed(0)
    a = imagelora.ValueAdapter(8, 2, 3, [0, 2], r=4, lora_alpha=8)
    nn.init.normal_(a.B)
    x, value = torch.randn(1, 40, 8), torch.zeros(1, 40, 6)
    for visual, least, most in ((torch.arange(40), 0, 1e-5), (torch.arange(0, 40, 2), 0.3, 1)):  # all, every other one
        y = a.add_update(x, value, visual)[0]
        assert least <= (x[0] @ torch.linalg.lstsq(x[0], y).solution - y).norm() / y.norm() < most


# 6. An adapter comes off, and travels
def test_disabled_detach_and_the_probe_restore_the_base_bit_for_bit():
    """Inside disabled() the outputs are the base's; after detach() and after a probe so is all else, to the hooks."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER, labels=True)
    model.vision_tower.requires_grad_(False)
    before, base = state_of(model), model(**batch).logits
    score_heads(model, [batch])
    assert state_of(model) == before and torch.equal(model(**batch).logits, base)
    adapter = attach_trained(model)
    for other in (model, nn.ModuleList([model]), model.language_model):  # a second one would double the update
        with pytest.raises(ValueError, match="already has an Image-LoRA; call its detach"):
            attach(other)
    with adapter.disabled(), adapter.disabled():
        assert torch.equal(model(**batch).logits, base)
    assert not torch.equal(model(**batch).logits, base)
    assert adapter.detach() is model and state_of(model) == before and torch.equal(model(**batch).logits, base)
    with pytest.raises(RuntimeError, match="already detached"):
        adapter.detach()
    with pytest.raises(RuntimeError, match="is detached; use the one that"), adapter.disabled():
        pass  # else these would be called the base's answers: load(adapter.detach(), path) returns another adapter


@pytest.mark.parametrize("normalize", [True, False])
def test_a_saved_adapter_loads_as_it_was(tmp_path, normalize):
    """save and load carry A, B, gamma, r, alpha and the heads; the file has the keys of the authors' layout."""
    model, batch, path = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER), tmp_path / "adapter.pt"
    adapter = attach_trained(model, r=2, lora_alpha=3, heads={0: [2, 0], 2: [1]}, normalize=normalize)
    expected = model(**batch).logits
    adapter.detach()
    adapter.save(path)  # detached, it still has its weights
    loaded = load(model, path)
    assert torch.equal(model(**batch).logits, expected)
    assert (loaded.heads, loaded.r, loaded.lora_alpha) == ({0: [0, 2], 2: [1]}, 2, 3)
    content = torch.load(path, weights_only=True)
    assert set(content) - {"normalize", "head_counts"} == {"model_name", "r", "alpha", "kv_indices", "layers"}
    saved = content["layers"]["0"]
    assert [list(saved[name].shape) for name in ("A", "B", "gamma")] == [[D, 2], [2, 2, D_H], []]
    assert content["kv_indices"] == {"0": [0, 2], "2": [1]} and content["model_name"] == "TinyVLM"
    content["kv_indices"]["0"], saved["B"] = [2, 0], saved["B"].flip(0)  # the file's order of heads is its own
    for name in ("head_counts", "normalize")[: 1 + normalize]:  # keys of ours
        del content[name]
    torch.save(content, path)
    load(loaded.detach(), path)
    assert torch.equal(model(**batch).logits, expected)


# 7. What engineering promises: files, threads, checkpoints, copies; never silently wrong
EARLY, LATE = prompt(IMAGE + BEFORE, labels=True), prompt([IMG, *BEFORE, *IMAGE[1:]], labels=True)
SOME = {"r": 2, "heads": {0: [1], 2: [0, 1]}}


class Exploit(str):  # unpickled without care, it makes a file of that name
    def __reduce__(self):
        return Path.touch, (Path(self),)


FILES = {  # what writes one, what reads it
    "adapter": (lambda path: attach_trained(tiny_vlm(), **SOME).save(path), lambda path: load(tiny_vlm(), path)),
    "base": (lambda path: pretrain.save(tiny_vlm(), path), TinyVLM.from_pretrained),
}


@pytest.mark.parametrize("write, read", FILES.values(), ids=FILES)
def test_a_damaged_file_is_refused_in_one_sentence_or_loads_exactly_what_was_saved(write, read, tmp_path):
    """A flipped bit at 60 places and in the zip's directory, a cut, foreign files, and pickles that would run code."""
    path, made, rng = tmp_path / "file.pt", tmp_path / "made", np.random.default_rng(0)
    write(path)
    data, saved = path.read_bytes(), read(path).state_dict()
    mutants = [data[: len(data) // 2], b"", b"not a model\n", pickle.dumps(Exploit(made))]
    flips = [*rng.choice(len(data), 60, False), *(entry.start() + 33 for entry in re.finditer(b"PK\1\2", data))]
    mutants += [data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :] for i in flips]
    for content in ([1, 2], {"r": Exploit(made)}):
        torch.save(content, path)
        mutants.append(path.read_bytes())
    for mutant in mutants:
        path.write_bytes(mutant)
        try:
            found = read(path).state_dict()
        except ValueError as error:
            assert re.fullmatch(r"[^\n]{20,400}", str(error)), error
        else:
            assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    assert not made.exists()


MISFITS = [("r", 3), ("r", 0), ("alpha", 0.0), ("normalize", "no"), ("layers", {}), ("head_counts", [3, 3])]
MISFITS += [("kv_indices", k) for k in ({"0": [1]}, {"0": [3], "2": [0, 1]}, {"0": [1], "2": [0]}, None)]
MISFITS += [("B", B) for B in (torch.ones(1, 2, 3), torch.full((1, 2, 4), math.nan), None)]
MISFITS += [("C", torch.ones(1)), ("kv_indices", {"0": [1], "2": [0, 1], "1": [0]})]
MISFITS += [("A", A) for A in (torch.ones(2, D), torch.full((D, 2), 1e300, dtype=torch.double), 1)]
MISFITS += [("hidden_size", 48), ("num_hidden_layers", 2), ("num_key_value_heads", 1)]  # of the model


@pytest.mark.parametrize("name, value", MISFITS)
def test_an_adapter_file_that_does_not_fit_leaves_the_model_as_it_was(name, value, tmp_path):
    model, path = tiny_vlm(**({name: value} if hasattr(TinyVLMConfig, name) else {})), tmp_path / "adapter.pt"
    attach_trained(tiny_vlm(), **SOME).save(path)
    content, before = torch.load(path, weights_only=True), state_of(model)
    (content["layers"]["0"] if name in "ABC" else content)[name] = value
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"^[^\n]*adapter\.pt does not fit this model \([^\n]+\)$"):
        load(model, path)
    assert state_of(model) == before


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """It is stopped before the new file has its name, or the weights are not finite."""
    path, adapter = tmp_path / "adapter.pt", attach_trained(tiny_vlm())
    adapter.save(path)
    saved = path.read_bytes()
    for step in ("os.replace", "pathlib.Path.write_bytes"):  # as where a disk is full
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(step, lambda *_: Path("/dev/full").write_text("x"))
            adapter.save(path)
    for wrong in (torch.full((D, 8), math.nan), torch.zeros(0)):
        adapter.layers["1"].A.data = wrong
        with pytest.raises(ValueError, match="A of layer 1 is empty or not finite"):
            adapter.save(path)
    assert path.read_bytes() == saved and list(tmp_path.iterdir()) == [path]


def loss_of(model, batch: dict) -> torch.Tensor:
    return model(**batch).logits.logsumexp(-1).sum()


def slopes(model, *losses: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    sum(losses).backward(retain_graph=True)
    return [p.grad for p in model.parameters() if p.requires_grad]


def checkpoint_layers(model, use_reentrant=False, input_grads=True, layers=None):
    for layer in layers or model.language_model.layers:
        layer.forward = partial(checkpoint, partial(type(layer).forward, layer), use_reentrant=use_reentrant)
    if input_grads:  # as enable_input_require_grads() does
        model.language_model.embed_tokens.register_forward_hook(lambda module, args, x: x.requires_grad_())
    return model


def train_at_once(model):
    """They meet in layer 1, also where that is run again. disabled() is of the thread that enters it, as no_grad()."""
    barrier = threading.Barrier(2, timeout=60)
    model.language_model.layers[1].input_layernorm.register_forward_pre_hook(lambda *_: barrier.wait() * 0 or None)
    with ThreadPoolExecutor(2) as pool, model.image_lora.disabled():
        losses = list(pool.map(partial(loss_of, model), (EARLY, LATE)))
        list(pool.map(torch.autograd.backward, losses))
    return [p.grad for p in model.image_lora.parameters()]


def after(between):
    """The gradients of EARLY's loss, where between(model, loss) came between its forward and its backward pass."""
    return lambda model: [loss := loss_of(model, EARLY), between(model, loss), slopes(model, loss)][-1]


CHECKPOINTED = {  # what happens, and the batches whose gradients it must give
    "79 forwards came since": ([EARLY], after(lambda model, loss: [loss_of(model, LATE) for _ in range(79)])),
    "its first backward pass came since": ([EARLY], after(slopes)),
    "another backward pass came since": ([EARLY], after(lambda model, loss: slopes(model, loss_of(model, LATE)))),
    "disabled() came since": ([EARLY], after(lambda m, loss: m.image_lora.disabled()(loss_of)(m, LATE).backward())),
    "generate() came since": ([EARLY], after(lambda model, loss: model.generate(*list(LATE.values())[:2]))),
    "the forward pass was disabled": ([], lambda m: slopes(m, m.image_lora.disabled()(loss_of)(m, EARLY))),
    "two losses are summed": ([EARLY, LATE], lambda model: slopes(model, loss_of(model, EARLY), loss_of(model, LATE))),
    "backward in a thread": ([EARLY], lambda m: ThreadPoolExecutor().submit(slopes, m, loss_of(m, EARLY)).result()),
    "two threads train at once beside disabled()": ([EARLY, LATE], train_at_once),
    "a checkpoint holds the model": ([EARLY], lambda m: slopes(m, checkpoint(loss_of, m, EARLY, use_reentrant=False))),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("what", CHECKPOINTED)
def test_a_layer_that_checkpointing_runs_again_goes_by_its_own_forward_though(what, use_reentrant):
    attach_trained(model := tiny_vlm(), **SOME)
    batches, run = CHECKPOINTED[what]
    expected = slopes(model, 0 * loss_of(model, EARLY), *(loss_of(model, batch) for batch in batches))
    model.zero_grad()
    torch.testing.assert_close(run(checkpoint_layers(model, use_reentrant)), expected)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_interrupted_forward_or_context_leaves_nothing_behind(error):
    """The next forward, whose image is elsewhere, goes by its own visual tokens. After Ctrl-C a backward pass that runs
    layers again is refused before it."""
    adapter = attach_trained(model := checkpoint_layers(tiny_vlm()))
    expected, loss = model(**LATE).logits, loss_of(model, LATE)
    handle = model.language_model.layers[1].register_forward_pre_hook(Mock(side_effect=error))
    for context in (nullcontext, torch.no_grad, adapter.disabled, partial(adapter.visual_mask, EARLY["labels"] < 0)):
        with pytest.raises(error), context():
            model(**EARLY)
    handle.remove()
    refused = pytest.raises(RuntimeError, match="memory of another call's, which has other visual tokens")
    with refused if error is KeyboardInterrupt else nullcontext():
        loss.backward()
    assert torch.equal(model(**LATE).logits, expected)


def offloaded(model):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):  # as activation offloading copies
        loss_of(checkpoint_layers(model), EARLY).backward()


X = torch.zeros(1, 7, D)
OUTSIDE, COPIED = r"v_proj ran outside of model\(\.\.\.\)", "a checkpoint of several layers or of a copy"
NOT_RIGHT = [
    (lambda m: attention(m, 0).v_proj(X), OUTSIDE),
    (torch.no_grad()(lambda m: attention(m, 0).v_proj(X)), OUTSIDE),
    (lambda m: [m(**EARLY), m.language_model.layers[0](X)], OUTSIDE),
    (lambda m: m.forward(**EARLY), OUTSIDE),
    (offloaded, COPIED),
    (lambda m: loss_of(checkpoint_layers(m, layers=[m.language_model]), EARLY).backward(), COPIED),
    (lambda m: loss_of(checkpoint_layers(m, True, input_grads=False), EARLY), "needs model.enable_input_require_grads"),
    (lambda m: [setattr(attention(m, 2), "v_proj", nn.Linear(D, 12)), m(**EARLY)], "not called: was it replaced"),
    (lambda m: m.image_lora.layers["0"].add_update(X, X[..., :4], X), "4 features, not 3 heads of 4: are heads split"),
]


@pytest.mark.parametrize("run, sentence", NOT_RIGHT)
def test_what_cannot_be_right_is_refused_in_one_sentence(run, sentence):
    attach_trained(model := tiny_vlm(), **SOME)
    with pytest.raises(RuntimeError, match=f"^[^\n]*{sentence}"):
        run(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(copied):
    attach_trained(model := tiny_vlm(), **SOME)
    expected, base, twin = slopes(model, loss_of(model, EARLY)), tiny_vlm()(**EARLY).logits, copied(model)
    model.image_lora.layers["0"].gamma.data.zero_()
    torch.testing.assert_close(slopes(twin, loss_of(twin, EARLY)), expected)
    assert torch.equal(twin.image_lora.detach()(**EARLY).logits, base) and not any(state_of(twin)[0])
    assert not torch.equal(model(**EARLY).logits, base)


def test_compiled_code_follows_attach_disabled_and_detach():
    """attach() looks through torch.compile()."""
    compiled = torch.compile(model := tiny_vlm(num_hidden_layers=1), backend="eager")
    base, adapter = compiled(**EARLY).logits, attach_trained(compiled)
    for batch in (EARLY, LATE):
        torch.testing.assert_close(*(slopes(model, loss_of(each, batch)) for each in (compiled, model)))
    with adapter.disabled():
        torch.testing.assert_close(compiled(**EARLY).logits, base)
    adapter.detach()
    torch.testing.assert_close(compiled(**EARLY).logits, base)


def test_what_others_wrap_around_a_forward_stays_theirs_after_detach():
    model, ran = tiny_vlm(), []
    base, adapter = model(**EARLY).logits, attach_trained(model)
    for module in (attention(model, 0).v_proj, model.language_model.layers[0].input_layernorm):
        module.forward = lambda x, forward=module.forward: [ran.append(forward)] and forward(x)
    for _ in range(2):
        assert not torch.equal(model(**EARLY).logits, base)
        assert torch.equal(adapter.detach()(**EARLY).logits, base)
        adapter = attach_trained(model)
    assert len(ran) == 8


@pytest.mark.parametrize("attach_first", [True, False])
def test_accelerates_wrappers_may_come_before_or_after_and_the_removal_of_earlier_ones_is_noticed(attach_first):
    accelerate = pytest.importorskip("accelerate")
    bf16 = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare
    dispatch = partial(accelerate.dispatch_model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)
    attach_trained(other := tiny_vlm())
    for wrap in (bf16, dispatch):
        model = tiny_vlm()
        for step in (attach_trained, wrap) if attach_first else (wrap, attach_trained):
            step(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=wrap is bf16):
            torch.testing.assert_close(model(**EARLY).logits, other(**EARLY).logits)
    accelerate.hooks.remove_hook_from_submodules(model)
    with nullcontext() if attach_first else pytest.raises(RuntimeError, match="an adapted v_proj was not called"):
        assert torch.equal(model(**EARLY).logits, other(**EARLY).logits)


# 8. The tiny world: what is asked, and the base model
def test_query_heads_of_a_group_share_a_value_head_and_no_placeholder_is_an_answer():
    grouped, whole = tiny_vlm(), tiny_vlm(num_key_value_heads=6)
    state = grouped.state_dict()
    for name in [name for name in state if re.search(r"language.*[kv]_proj", name)]:
        state[name] = state[name].unflatten(0, (H, D_H)).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(state)
    torch.testing.assert_close(whole(**EARLY).logits, grouped(**EARLY).logits)
    undecided = tiny_vlm(image_token_id=0)  # all logits are equal: the answer is the first token but the placeholder
    undecided.language_model.norm.weight.data.zero_()
    assert undecided.generate(torch.tensor([TEXT]), max_new_tokens=3)[0, len(TEXT) :].tolist() == [1, 1, 1]


SHORT = dict(steps=3, screens=2, questions=2, num_heads=3, r=2, test_screens=2, device="cpu", base="base.pt")
OPTIONS = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items())
ROOT, RUN = Path(train.__file__).parent, train.run


def test_the_shipped_base_is_what_its_record_says():
    record, model = json.loads((ROOT / "data/tiny_vlm.json").read_text()), train.load_base(train.Config(device="cpu"))
    parse(pretrain.PretrainConfig, shlex.split(record["command"])[3:], "", "")  # its command can be given again
    source = record["source"]
    assert source["action_acc"] >= 0.99 and source["name_acc"] >= 0.95 and source["relation_acc"] >= 0.95
    assert record["word_problem_acc"] >= 0.995 and 0.5 <= record["dark"]["action_acc"] <= 0.8
    assert record["row"]["action_acc"] <= 0.02 and record["settings"]["action_acc"] <= 0.02
    for domain, task in (("source", "referring"), ("source", "relations"), ("dark", "grounding")):
        drawn = [draw_screen(domain, "test", i) for i in range(12)]
        features = prompts.image_features(model.get_image_features, drawn)
        (name, right), *_ = prompts.evaluate(model, drawn, features, task)[0].items()
        assert right == pytest.approx(record[domain][name], abs=0.12), (domain, name)
    assert prompts.evaluate_word_problems(model, features[:, :0], count=32) > 0.95
    places = pretrain.first_batch(1, 0, 16)[2][..., 2:].flatten(1)  # told of 16 source, not of settings, row, night
    assert (places >= 0).any(1).tolist() == [True] * 16 + [False] * 5


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_instruction_names_exactly_one_element_and_its_answer_is_a_hit(domain):
    """On screens that are a function of domain, split, index and seed, so no two splits share one."""
    places = [(domain, split, index, seed) for split in SPLITS for index in range(6) for seed in range(2)]
    drawn, rng = [draw_screen(*place) for place in places], np.random.default_rng(0)
    assert len({screen.image.tobytes() for screen in drawn + [draw_screen(*places[7])]}) == len(places)
    assert [is_hit(point, (2, 3, 5, 7)) for point in ((2, 3), (5, 3), (2, 7), None)] == [True, False, False, False]
    for screen, target in ((each, target) for each in drawn for target in each.targets()):
        point = tokenizer.parse_point(screens.referring(screen, target)["instruction"].removeprefix("what is at "))
        assert [e for e in screen.targets() if is_hit(point, e.click)] == [target]
        for by_colour in (False, True):
            sample = screens.grounding(screen, target, rng, by_colour)
            words = set(sample["instruction"].split()[1:])
            assert [e for e in screen.targets() if words <= {e.name, e.colour}] == [target]
            assert is_hit(tokenizer.parse_point(sample["answer"]), target.click) and sample["bbox"] == target.click


@pytest.mark.parametrize("domain", PAIRED)
def test_a_switch_is_right_of_its_name_and_erased_or_exchanged_changes_only_that(domain):
    for index in range(20):
        drawn, erased, exchanged = (draw_screen(domain, "test", index, 0, s) for s in ("shown", "erased", "exchanged"))
        assert erased.targets() == drawn.targets() == list(erased.elements)
        changed = (drawn.image != erased.image).any(-1)
        for old, new in zip(drawn.elements, exchanged.elements):
            (x, y, right, bottom), (x2, y2, right2, bottom2) = old.bbox, new.bbox
            assert np.array_equal(drawn.image[y:bottom, x:right], exchanged.image[y2:bottom2, x2:right2])
            assert changed[y:bottom, x:right].any() == (not old.click)  # a name has a click, its switch has none
            assert not old.click or old.click[0] - right >= screens.GAP
            changed[y:bottom, x:right] = False
        assert not changed.any()


@pytest.mark.parametrize("refer, learn", [(0.0, False), (0.0, True), (1.0, True)])
def test_a_training_batch_has_labels_on_answers_only_and_no_target_twice(refer, learn):
    drawn, problem = [draw_screen("dark", "train", i) for i in range(8)], word_problems.word_problem("train", 0)
    before, rng = [[prompts.turn(problem, learn)]] * len(drawn), np.random.default_rng(0)
    asked = [screens.ask(screen, 5, rng, refer, distinct=True) for screen in drawn]
    for ids, labels, samples in zip(*prompts.training_batch(asked, 16, before).values(), asked):
        words, answers = (" ".join(tokenizer.VOCABULARY[t] for t in row) for row in (ids, labels[labels >= 0]))
        first, *others = (f"{each['instruction']} {each['answer']} <eos>" for each in (problem, *samples))
        assert words.replace(" <pad>", "") == " ".join(["<bos>", first, *["<image>"] * 16, *others])
        assert answers == " ".join(f"{each['answer']} <eos>" for each in [problem] * learn + samples)
        assert torch.equal(ids[labels >= 0], labels[labels >= 0])
        assert all(("bbox" in each) != refer for each in samples)
        assert len({each["instruction" if refer else "bbox"] for each in samples}) == len(samples) == 5


def test_word_problems_of_the_test_are_new_sentence_pairs_and_new_numbers():
    new, known = set(), set()
    for split in SPLITS:
        texts = [word_problems.word_problem(split, i)["instruction"].partition(" has ")[2] for i in range(600)]
        seen = new if split == "test" else known
        seen |= {re.sub(r"\d+", "", text.partition(" then ")[2]) for text in texts}
        seen |= {tuple(found) for found in (re.findall(r"\d+", text) for text in texts) if len(found) == 3}
    assert new and not new & known


def test_what_is_right_of_a_name_begins_there_and_shares_half_the_lower_ones_height():
    places = {"a": (0, 0, 9, 9), "b": (9, 4, 20, 30), "c": (21, 5, 30, 15), "d": (60, 0, 70, 9), "e": (8, 0, 12, 9)}
    elements = tuple(screens.Element(name, "", "text", box, box) for name, box in places.items())
    told = [(each["instruction"], each["answer"]) for each in screens.relations(screens.Screen(np.zeros(0), elements))]
    assert told == [(f"what is right of {name}", other) for name, other in ("ab", "bc", "ed")]


def test_a_rule_is_found_on_some_answers_and_judged_on_others():
    boxes = [(0, 0, 16, 16), (8, 8, 24, 24), (64, 64, 80, 80)]  # of pixels; a bin has 8
    learn = [(None, {"bbox": box, "name": name}, (box[0] + 28, box[1] + 4)) for box, name in zip(boxes, "aab")]
    learn[2] = (*learn[2][:2], (4, 4))
    assert prompts.best_move([(28, 4), (36, 12)], boxes[:2]) in [(dx, dy) for dx in (-24, -16) for dy in (0, 8)]
    assert prompts.rule(learn, learn) == 2 / 3 and prompts.rule(learn, learn, "name") == 1
    given = [(None, {"bbox": (40, 40, 48, 48), "name": name}, point) for name, point in (("a", (68, 44)), ("b", None))]
    assert prompts.rule(learn, given, "name") == 1 / 2  # no point is a miss
    assert prompts.rule(learn, given, start=lambda point: (12, 12)) == 0


# 9. The main job and the comparison
def test_the_controls_of_the_probe_are_what_they_are_called():
    scores = torch.tensor([[9.0, 8, 1, 2], [7, 3, 4, 5], [0, 0, 6, 0.1]])
    chosen = {kind: train.choose_heads(train.Config(heads=kind, num_heads=5, tau=1.0), scores) for kind in train.HEADS}
    budget = {layer: len(heads) for layer, heads in chosen["top"].items()}
    assert budget == {layer: len(heads) for layer, heads in chosen["matched"].items()} and len(budget) > 1
    assert chosen["top"] == select_heads(scores, 5, 1.0) != chosen["matched"]
    assert chosen["lowest"] == {0: [0, 1, 2, 3], 1: [0]} and chosen["least"] == {0: [2, 3], 2: [0, 1, 3]}
    assert sum(map(len, chosen["random"].values())) == 5 and chosen["all"] == {k: [0, 1, 2, 3] for k in range(3)}


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """python train.py LINE, in a directory of its own, on a small base: its status, its prints, its last error line."""
    pretrain.save(tiny_vlm(vocab_size=len(tokenizer.VOCABULARY), image_size=128, patch_size=32), tmp_path / "base.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompts, "PROBE_BATCHES", 2)

    def run(line: str) -> tuple[int, str, str]:
        try:
            status = train.main(shlex.split(line))
        except SystemExit as stopped:  # of argparse
            status = stopped.code
        printed = capsys.readouterr()
        return status, printed.out, re.split("[\r\n]", printed.err.strip())[-1]

    return run


RUNS = [{"method": method} for method in train.METHODS] + [{"heads": heads} for heads in (*train.HEADS, "1:0")]
RUNS += [{"method": "lora", "tokens": "visual"}, {"method": "lora", "projections": "v"}, {"switches": "erased"}]
RUNS += [{"probe": "exact"}, {"probe": "gate"}, {"gamma_lr": 0.0}, {"controls": False}]
RUNS += [{"domain": domain} for domain in DOMAINS] + [{"domain": "dark", "prior": True, "steps": 9}]
RUNS += [{"task": "referring"}, {"history": 1, "replay": 1}, {"split": "validation"}, {"normalize": False}]
RUNS += [{"device": "cuda"}] * torch.cuda.is_available()


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_every_kind_of_run_leaves_text_as_it_promises_and_costs_what_is_computed(changes, command):
    cfg = train.Config(**SHORT | changes)
    row = json.loads(json.dumps(train.run(cfg)))
    assert all(row[name] == value for name, value in asdict(cfg).items() if name != "heads")
    all_tokens = cfg.method == "lora" and cfg.tokens == "all"
    assert (row["text_logits_max_abs_diff"] == 0) == (not all_tokens)
    if cfg.method != "none":
        flops, step = row["adapter_flops_per_screen"], row["step_flops_per_screen"]
        assert row["counted_flops_per_screen"] == flops and 0 < flops < step and row["saved_bytes_per_screen"] > 0
        whole = all_tokens and cfg.projections == "qkvo"
        assert (4 * flops == row["lora_flops_per_screen"]) == whole  # told of r = 8
    if cfg.method == "image_lora":
        assert sum(map(len, row["heads"].values())) == {"all": L * H, "1:0": 1}.get(cfg.heads, cfg.num_heads)
        assert {layer for layer in range(L) if row["changes"][f"update{layer}"]} == set(map(int, row["heads"]))
        lowest = min(map(int, row["heads"]))
        assert row["changes"][f"q{lowest}"] == row["changes"][f"k{lowest}"] == 0


def test_the_main_job_and_the_walk_print_and_write_what_they_say_and_a_row_is_the_same_run(command):
    status, printed, error = command(f"--explain {OPTIONS} --film")  # the walk makes the run first
    said = [line.split()[0] for line in printed.splitlines() if line[:1] not in ("", " ")]
    assert status == 0 and said[:9] == "base before probe select after controls text cost saved".split(), error
    assert all(text in printed for text in ("identical", "counted = computed", "of the decoder's training step"))
    out, cfg = Path("runs/row"), train.Config(**SHORT)
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert sizes.keys() == {"adapter.pt", "metrics.json", "predictions.png", "curve.png", "training.gif", "look.png"}
    assert min(sizes["look.png"], sizes["training.gif"]) > 1000 and load(train.load_base(cfg), out / "adapter.pt")
    metrics = json.loads((out / "metrics.json").read_text())
    whole, row = metrics | metrics["after"], json.loads(json.dumps(train.run(cfg)))
    assert {name for name in row if row[name] != whole[name]} <= {"film", "seconds", "step_ms"}
    assert metrics["before"].keys() == metrics["after"].keys()
    status, again, _ = command(f"--explain {OPTIONS}")  # of the finished run
    assert status == 0 and printed.endswith(again) and len(again) < len(printed)


def test_ctrl_c_says_how_to_go_on_and_that_ends_in_the_same_last_digit(command, monkeypatch):
    def interrupted(cfg, used, i, batch_of=prompts.batch_of):
        if (cfg.out, cfg.resume, i) == ("cut", False, prompts.PROBE_BATCHES + 25):
            raise KeyboardInterrupt
        return batch_of(cfg, used, i)

    monkeypatch.setattr(prompts, "batch_of", interrupted)
    assert command(f"{OPTIONS} --steps=30 --out=whole")[0] == 0
    status, printed, _ = command(f"{OPTIONS} --steps=30 --out=cut")
    assert status == 130 and not Path("cut/metrics.json").exists()
    go_on = re.search(r"^stopped; go on with: python train.py (.*)$", printed, re.M)[1]
    assert command(f"{go_on} --lr=0.1")[2].endswith("with other settings; lr is 0.1 here")
    shutil.copytree("cut", "damaged")
    Path("damaged/checkpoint.pt").write_bytes(pickle.dumps(Exploit("made")))
    assert "damaged or not a PyTorch file" in command(f"{go_on} --out=damaged")[2] and not Path("made").exists()
    status, printed, _ = command(go_on)
    assert status == 0 and "from step 20 of 30" in printed
    whole, cut = (json.loads(Path(out, "metrics.json").read_text()) for out in ("whole", "cut"))
    assert {name for name in whole if cut[name] != whole[name]} <= {"out", "resume", "seconds", "step_ms"}


def test_a_loss_that_is_not_finite_ends_with_1_the_step_and_a_hint_and_the_last_checkpoint(command):
    status, _, error = command(f"{OPTIONS} --steps=40 --lr=1e18 --out=out")
    assert status == 1 and re.fullmatch(r"error: the loss is \w+ at step \d+; try a smaller --lr than 1e\+18", error)
    assert imagelora.safe_load("out/checkpoint.pt")["step"] == 0 and not Path("out/metrics.json").exists()


BAD = ["--domain=marble", "--method=magic", "--device=abacus", "--what=1", "--steps=many", "--seed=-1", "--tau=inf"]
BAD += [f"{name}=0" for name in ("--r", "--num-heads", "--steps", "--screens", "--questions", "--test-screens")]
BAD += ["--num-heads=10", "--r=25", "--seed=1" + 30 * "0", "--lr=nan", "--lr=-1", "--lora-alpha=inf", "--heads=best"]
BAD += ["--heads=0:9", "--heads=0:1,1", "--out=/dev/null/x", "--out=base.pt", "--explain --method=lora", "extra"]
BAD += [f"--pretrain {wrong}" for wrong in ("--steps=0", "--lr=nan", "--out=no/b.pt", "--explain", "--relations=25")]
BAD += [f"--costs {wrong}" for wrong in ("--num-heads=113", "--visual-tokens=0", "--shape='1 2 3 4 5 0'", "--shape=a")]
BAD += [f"--compare {wrong}" for wrong in ("--seeds=0", "--out=base.pt", "--out=.")]
BAD += ["--device=cuda"] * (not torch.cuda.is_available())


@pytest.mark.parametrize("bad", BAD)
def test_what_the_command_cannot_do_is_one_sentence_and_writes_nothing(bad, command):
    Path("compare.json").write_text('[{"part": "ladder"}]')  # no comparison
    status, _, error = command(bad if re.match("--(pretrain|compare|costs)", bad) else f"{OPTIONS} {bad}")
    assert status == 2 and "error: " in error and len(error) < 300, error
    assert {path.name for path in Path().rglob("*") if path.is_file()} == {"base.pt", "compare.json"}


def test_the_comparison_stops_goes_on_and_runs_nothing_twice(command, monkeypatch):
    """A row a line; the rows of the repository are whole."""
    line, path, stopped_at = "--compare --quick --out=out", Path("out/compare.json"), "v"
    serial = Mock(Pool=lambda workers: nullcontext(Mock(imap=map)))  # one process
    monkeypatch.setattr(compare, "get_context", lambda method: serial)

    def run(cfg):
        if cfg.projections == stopped_at:
            raise KeyboardInterrupt
        small = replace(cfg, base="base.pt", num_heads=3, steps=2, test_screens=2)
        return RUN(small) | asdict(cfg) | {"device": "cpu"}

    monkeypatch.setattr(train, "run", run)
    status, printed, _ = command(line)
    assert status == 130 and f"go on with: python train.py {line}\n" in printed
    finished, stopped_at = json.loads(path.read_text()), "none"
    status, printed, _ = command(line)
    rows = json.loads(path.read_text())
    assert status == 0 and len(rows) == len(path.read_text().splitlines()) - 2 == len(compare.SHOWN) + 1  # the base
    assert finished == rows[: len(finished)] and 0 < len(finished) < len(rows)
    assert all(table in printed for table in compare.tables(rows).values())
    shutil.copy(ROOT / "data" / "compare.json", path)
    monkeypatch.setattr(train, "run", None)
    assert command("--compare --out=out")[0] == 0


@pytest.mark.parametrize("best, tried", [(0.02, 3), (0.01, 4), (0.0025, 6), (0.64, 7), (0.00125, 6)])
def test_a_rate_is_the_best_on_validation_screens_and_the_grid_reaches_beyond_it(best, tried):
    def finish(jobs):
        assert {job["split"] for job in jobs} == {"validation"}
        seen.update(job["lr"] for job in jobs)
        return [job | {"action_acc": -abs(math.log(job["lr"] / best))} for job in jobs]

    seen, wanted = set(), [(method, "base.pt", "row") for method in (compare.LORA, compare.IMAGE_LORA)]
    assert compare.best_rates(wanted, finish) == pytest.approx(dict.fromkeys(wanted, best)) and len(seen) == tried


# 10. The pages
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md"]


def blocks(page: Path, text="") -> list[str]:
    """The blocks of a page that hold this text."""
    found = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    return [block for block in found if text in block]


@pytest.mark.parametrize("page", PAGES, ids=["README", "data/README"])
def test_commands_links_and_figures_of_a_page_exist(page, monkeypatch):
    idle = {mode: (config, lambda cfg: None) for mode, (config, _) in train.MODES.items()}
    monkeypatch.setattr(train, "MODES", idle | {"": (train.Config, lambda cfg: None)})
    commands = re.findall(r"\bpython (?:-m )?([a-z]\S+)(.*)", "\n".join(blocks(page)))
    for name, options in commands:
        assert name.startswith("tune.py") or (ROOT / (name.removesuffix(".py").replace(".", "/") + ".py")).exists()
        assert name != "train.py" or train.main(shlex.split(options, comments=True)) == 0, (name, options)
    targets = re.findall(r"(?:\]\(|src=\")(?!\w+:|#)([^)#\"\s]+)", page.read_text())
    assert commands and targets and all((page.parent / target).exists() for target in targets), targets


def test_the_lines_costs_and_tables_of_the_readme_are_those_of_the_code(capsys):
    text, code = PAGES[0].read_text(), (ROOT / "imagelora.py").read_text().splitlines()
    named = re.findall(r"^\|.*\| *`(.+?)` *\| *(\d+) *\|$", text, re.M)
    assert len(named) >= 5 and all(quoted.replace(r"\|", "|") in code[int(line) - 1] for quoted, line in named), named
    train.main(["--costs"])
    shown = blocks(PAGES[0], "training FLOP")[0].splitlines()
    assert set(shown) <= set(capsys.readouterr().out.splitlines())
    for name, table in compare.tables(json.loads((ROOT / "data" / "compare.json").read_text())).items():
        pages = PAGES if name in ("ladder", "choices", "preserved", "skill") else PAGES[1:]
        assert all(table in page.read_text() for page in pages), name


def adapt_by_the_readme(model, adapter, visual, **options):
    """Its few lines in place of the adapter, with its weights, where `visual` [B, T] is true."""
    exec(blocks(PAGES[0], "class NaiveImageLoRA")[0], lines := {})
    decoder = next(m for name, m in model.named_modules() if re.search(r"(language|text)_model$", name))
    layers = lines["adapt"](nn.ModuleDict({"model": model, "language_model": decoder}), **options)
    for a, layer in zip(adapter.layers.values(), layers, strict=True):
        layer.load_state_dict(a.state_dict(), strict=False)
        layer.M = visual[..., None]


def test_the_few_lines_of_the_readme_compute_what_imagelora_does():
    batch = prompt(BEFORE + IMAGE + AFTER, IMAGE + AFTER + BEFORE)
    options = {"r": 4, "lora_alpha": 6, "heads": {0: [1], 1: [0, 2], 2: [0, 1, 2]}}
    adapter = attach_trained(model := tiny_vlm(), **options)
    ours = logits_of(model, batch), slopes(model, loss_of(model, batch))
    adapt_by_the_readme(adapter.detach(), adapter, batch["input_ids"] == IMG, **options)
    theirs = logits_of(model, batch), slopes(model, loss_of(model, batch))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_the_five_steps_of_the_readme_are_all_that_a_trainer_needs_and_its_loop_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, model = Mock(), tiny_vlm()
    given = {"model": model, "batches": [EARLY], "args": None, "collate": None, "examples": None, "Trainer": trainer}
    model.gradient_checkpointing_enable, given["torch"] = lambda how: checkpoint_layers(model, **how), torch
    exec(blocks(PAGES[0], "score_heads(model, batches)")[0], given)
    assert trainer.call_args.args[0] is model and trainer.return_value.train.called
    exec(blocks(PAGES[0], "optimizer.zero_grad()")[0], given)
    assert all(a.B.any() and a.gamma == 1 for a in given["adapter"].layers.values())
    assert sum(map(len, load(given["adapter"].detach(), "adapter.pt").heads.values())) == L * H // 2


def test_the_lines_of_the_readme_scale_points_to_the_picture_that_the_model_sees():
    examples = [{"image": name, "prompt": "what is at (6, 3) ?", "answer": "[12,9]"} for name in ("cat.png", None)]
    given = {"picture": lambda e: Image.new("RGB", (12, 9)), "processor": Mock(), "examples": examples}
    given["processor"].image_processor.patch_size = 4
    given["ask"] = lambda asked: {"image_grid_thw": torch.tensor([[1, 2, 4]])}  # 8 pixels high, 16 wide
    exec(blocks(PAGES[0], "def resized")[0], given)
    assert given["examples"] == [examples[0] | {"prompt": "what is at (8, 3) ?", "answer": "[16,8]"}, examples[1]]


# 11. Real Hugging Face VLMs: tiny random models of every family, built offline
PICTURE, VIDEO = 90, 91
IDS = {"image_token_id": PICTURE, "image_token_index": PICTURE, "video_token_id": VIDEO, "video_token_index": VIDEO}
DECODER = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
MROPE = {"rope_parameters": ROPE, "rope_scaling": ROPE}  # transformers 5's name and 4's
VIT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
GRID = {"depth": 1, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "hidden_size": 16}
GRID |= {"image_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "spatial_merge_size": 2}
CLIP, SIGLIP = VIT | {"model_type": "clip_vision_model"}, VIT | {"model_type": "siglip_vision_model"}
LLAMA, MISTRAL, QWEN, COHERE = ({"model_type": name} for name in ("llama", "mistral", "qwen2", "cohere2"))
LAST_LAYER, CROPS = {"vision_feature_layer": -1}, {"vision_feature_layer": -1, "image_grid_pinpoints": [[8, 8]]}
FAMILIES = {  # what differs from DECODER; the vision config; other settings
    "Qwen2VL": (MROPE, GRID | {"embed_dim": 16, "hidden_size": 32}, {}),
    "Qwen2_5_VL": (MROPE, GRID | {"window_size": 16, "fullatt_block_indexes": [0]}, {}),
    "Qwen3VL": (MROPE, GRID | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, {}),
    "Glm4v": (MROPE, GRID, {"image_start_token_id": 92, "image_end_token_id": 93}),
    "Llava": (LLAMA, CLIP, LAST_LAYER),
    "LlavaNext": (LLAMA, CLIP, CROPS),
    "LlavaOnevision": (QWEN, SIGLIP, CROPS),
    "VideoLlava": (LLAMA, CLIP, LAST_LAYER),
    "PaliGemma": ({"model_type": "gemma"}, SIGLIP | {"projection_dim": 32}, {"projection_dim": 32}),
    "Gemma3": ({}, SIGLIP, {"boi_token_index": 92, "eoi_token_index": 93, "mm_tokens_per_image": 4}),
    "Idefics2": (MISTRAL, VIT, {"perceiver_config": {"hidden_size": 32, "resampler_n_latents": 4}}),
    "Idefics3": (LLAMA, VIT, {"scale_factor": 1, "pad_token_id": 0}),
    "SmolVLM": (LLAMA, VIT, {"scale_factor": 1, "pad_token_id": 0}),
    "InternVL": (QWEN, VIT | {"image_size": [16, 16], "patch_size": [4, 4]}, {"image_seq_length": 4}),
    "Mistral3": (MISTRAL, VIT | {"model_type": "pixtral", "image_size": 16, "head_dim": 8}, LAST_LAYER),
    "AyaVision": (COHERE, SIGLIP | {"image_size": 16}, LAST_LAYER),
}
WALKS = [(family, PICTURE, "bare") for family in FAMILIES] + [(family, VIDEO, "bare") for family in list(FAMILIES)[:3]]
WALKS += [("Llava", PICTURE, "PEFT")]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [PICTURE, VIDEO]}
GREEDY |= {"output_logits": True, "return_dict_in_generate": True}


def tiny_hf_vlm(family="Llava"):
    transformers, (text, vision, other) = pytest.importorskip("transformers"), FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(text_config=DECODER | text, vision_config=vision, **IDS, **other)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("newline"):  # large enough that a change anywhere shows in every logit
            parameter.data.normal_(0, 0.15)
    return model


def hf_prompt(family="Llava", kind=PICTURE):
    """Two rows: text, an image from the 4th or 2nd token on, and text."""
    vision, other = FAMILIES[family][1:]
    crops, pixels = "image_grid_pinpoints" in other, torch.Generator().manual_seed(1)
    N = 10 if crops else 4
    ids = torch.arange(10, 16 + N).repeat(2, 1)
    ids[0, 2 : 3 + N] = ids[1, : 1 + N] = torch.tensor([92] + [kind] * N)  # 92: the start of vision
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "depth" in vision:
        names = ("pixel_values", "image_grid_thw") if kind == PICTURE else ("pixel_values_videos", "video_grid_thw")
        batch |= zip(names, (torch.randn(32, 96, generator=pixels), torch.tensor([[1, 4, 4]] * 2)))
        if pytest.importorskip("transformers").__version__ >= "5":  # 4 refuses to generate with it
            batch["mm_token_type_ids"] = (ids == kind) * (1 if kind == PICTURE else 2)
        return batch
    size = 8 if vision["image_size"] == 8 else 16
    if crops or family == "Mistral3":
        batch["image_sizes"] = torch.tensor([[size, size]] * 2)
    if family in ("PaliGemma", "Gemma3"):
        batch["token_type_ids"] = (ids == PICTURE).int()
    parts = [2] if crops else [1] * (family in ("Idefics2", "Idefics3", "SmolVLM"))  # 2: the whole image and its crop
    images = torch.randn(2, *parts, 3, size, size, generator=pixels)
    return batch | {"pixel_values_images" if family == "VideoLlava" else "pixel_values": images}


@pytest.mark.parametrize("family, kind, wrapper", WALKS)
def test_every_family_is_adapted_as_the_few_lines_of_the_readme_say(family, kind, wrapper):
    """In training, checkpointed or not, and in generate(); without an image, disabled, detached it is the base."""
    model, batch, text = tiny_hf_vlm(family), hf_prompt(family, kind), {"input_ids": torch.arange(10, 22)[None]}
    model.requires_grad_(False)  # torch chooses some kernels, and so their rounding, by it
    base, base_text, user = logits_of(model, batch), logits_of(model, text), model
    if wrapper == "PEFT":
        peft = pytest.importorskip("peft")
        user = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*q_proj"))
    options = {"r": 2, "heads": {0: [1], 1: [0, 1]}}
    adapter = attach_trained(user, **options)
    assert torch.equal(logits_of(user, text), base_text)
    with adapter.disabled():
        assert torch.equal(logits_of(user, batch), base)
    got, steps = logits_of(user, batch), slopes(user, loss_of(user, batch))
    cached, whole = (user.generate(**batch, **GREEDY, use_cache=use_cache).logits for use_cache in (True, False))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    again = slopes(user, loss_of(user, batch))
    model.eval().gradient_checkpointing_disable()
    assert adapter.detach() is model and torch.equal(logits_of(model, batch), base)
    adapt_by_the_readme(model, adapter, batch["input_ids"] == kind, **options)
    expected, theirs = logits_of(model, batch), slopes(model, loss_of(model, batch))
    assert (got - base).abs().max() > 1e-2
    torch.testing.assert_close((got, steps, again), (expected, theirs, theirs), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached[0], got[:, -1], atol=1e-4, rtol=1e-4)
    if family != "PaliGemma":  # without a cache, transformers 4 lets its prompt see the answer
        torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)


def test_on_visual_tokens_alone_it_is_pefts_lora_on_v_proj():
    """Where every token is visual M is the identity, so without 1/sqrt|S| it is PEFT's LoRA of alpha = gamma alpha."""
    ours, theirs, peft = tiny_hf_vlm(), tiny_hf_vlm(), pytest.importorskip("peft")
    batch = {"input_ids": torch.full((2, 4), PICTURE), "pixel_values": hf_prompt()["pixel_values"]}
    attach_trained(ours, r=4, lora_alpha=10, normalize=False)
    peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=7, target_modules=r".*language_model.*v_proj"))
    mine, loras = ([p for p in m.parameters() if p.requires_grad and p.ndim > 1] for m in (ours, theirs))  # A, B, A, B
    for p, lora in zip(mine, loras, strict=True):
        lora.data.copy_(p.mT.flatten(0, -2))  # [r, D], [H * d_h, r]
    torch.testing.assert_close(logits_of(ours, batch), logits_of(theirs, batch))


@pytest.mark.parametrize("family", ["Llava", "Qwen2_5_VL"])
def test_a_base_loaded_in_four_bits_is_probed_adapted_and_trained_by_the_loop_of_the_readme(family, tmp_path):
    """Its text stays the quantized base's."""
    transformers, _, _ = map(pytest.importorskip, ("transformers", "accelerate", "bitsandbytes"))
    tiny_hf_vlm(family).save_pretrained(tmp_path)
    how = {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True), "device_map": {"": "cpu"}}
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16, **how)
    model.train()  # outside of training bitsandbytes wants more features than there are, on some CPUs
    batch, text = hf_prompt(family), {"input_ids": torch.arange(10, 22)[None]}
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == PICTURE, -100)
    base, base_text = logits_of(model, batch), logits_of(model, text)
    adapter = attach(model, heads=select_heads(score_heads(model, [batch]), 3))
    given = {"model": model, "adapter": adapter, "batches": [batch, batch], "torch": torch}
    exec(blocks(PAGES[0], "optimizer.zero_grad()")[0], given)
    assert all(a.B.flatten(1).any(1).all() for a in adapter.layers.values())
    tuned = logits_of(model, batch)
    assert torch.equal(logits_of(model, text), base_text) and not torch.equal(tuned, base)
    adapter.save(tmp_path / "adapter.pt")
    load(adapter.detach(), tmp_path / "adapter.pt")
    assert torch.equal(logits_of(model, batch), tuned)


def processor_for(family: str):
    """Six words, an image in place of a text that is missing."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "cat"])}
    fast, marks, image = transformers.PreTrainedTokenizerFast, {"<image>": PICTURE}, "<image>"
    if family == "Qwen2_5_VL":
        marks = {"<|image_pad|>": PICTURE, "<|video_pad|>": VIDEO, "<|vision_start|>": 92, "<|vision_end|>": 93}
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        if transformers.__version__ < "5":  # whose processor takes no other
            fast = transformers.Qwen2TokenizerFast
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | marks, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "model_input_names": ["input_ids", "attention_mask"]}
    tokenizer = fast(tokenizer_object=tokenizer, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    template = "{% for c in messages[0]['content'] %}{{ c['text'] or 'IMAGE' }} {% endfor %}a:".replace("IMAGE", image)
    if family == "Qwen2_5_VL":
        pytest.importorskip("torchvision")
        sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64}
        pictures, videos = transformers.Qwen2VLImageProcessor(**sizes), transformers.Qwen2VLVideoProcessor(**sizes)
        return transformers.Qwen2_5_VLProcessor(pictures, tokenizer, videos, chat_template=template)
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(pictures, tokenizer, chat_template=template, **options)


FOR_LLAVA = {"# NAME, SIZE": "NAME, SIZE", "PROBE = False": "PROBE = True"}


@pytest.mark.parametrize("family, changes", [("Qwen2_5_VL", {}), ("Llava", FOR_LLAVA)])
def test_readmes_script_trains_on_two_processes_as_on_one_goes_on_and_answers(family, changes, tmp_path, monkeypatch):
    """The ranks keep equal adapters, though one may have an image where the other has none."""
    script = blocks(PAGES[0], "# tune.py:")[0]
    for old, new in ({"save_steps=100": "save_steps=2", "warmup_steps=20": "warmup_steps=0"} | changes).items():
        assert old in script
        script = script.replace(old, new)
    name = re.findall(r'^NAME, SIZE = "(.*?)"', script, re.M)[-1]
    processor_for(family).save_pretrained(tmp_path / name)
    tiny_hf_vlm(family).save_pretrained(tmp_path / name)
    Image.effect_noise((12, 9), 64).save(tmp_path / "cat.png")
    examples = [{"image": None if i % 4 else "cat.png", "prompt": "what ?", "answer": "a cat"} for i in range(16)]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it: sums of floats in one order
    script += '\ntorch.save([adapter.state_dict(), dict(collate(examples[:2]))], f"rank{args.process_index}.pt")\n'
    Path("tune.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tune.py"]

    def launch(command, forget="checkpoint-*"):
        for old in Path("run").glob(forget):
            shutil.rmtree(old)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and re.search(r"^\['.*'\]$", done.stdout, re.M), done.stderr[-3000:]
        return imagelora.safe_load("run/adapter.pt")["layers"]

    kept = launch(torchrun)
    (first, batch), (second, _) = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(saved["B"].any() and saved["B"].dtype == torch.float32 for saved in kept.values())
    assert batch["labels"].tolist() == [[-100] * 7 + [4, 5, 2]] * 2  # a cat </s>
    images = batch["input_ids"] == PICTURE
    assert images.sum(1).tolist() == [4 if family == "Llava" else 2, 0]
    assert images.equal(batch.get("mm_token_type_ids", images) == 1)  # transformers 5 needs them for Qwen
    written = Path("run/checkpoint-2/trainer_state.json").stat().st_mtime_ns
    # transformers 4 loads an optimizer on "cpu:0" if there are two processes, which torch does not know
    resumed = torchrun if pytest.importorskip("transformers").__version__ >= "5" else [sys.executable, "tune.py"]
    torch.testing.assert_close(launch(resumed, forget="checkpoint-3"), kept, rtol=0, atol=1e-6)
    assert Path("run/checkpoint-2/trainer_state.json").stat().st_mtime_ns == written  # it went on from there
    torch.testing.assert_close(launch([sys.executable, "tune.py"]), kept, rtol=0, atol=1e-6)


# 12. What is refused
def hf(architecture: str, **config):  # attaches to such a model of transformers, without weights
    def run(_):
        model = getattr(pytest.importorskip("transformers"), architecture)
        with torch.device("meta"):
            attach(model(model.config_class(**config)))

    return run


REFUSED = [
    *((partial(attach, r=r), r"r must be an integer in 1\.\.24, got") for r in (0, 25, True, 2.0, "2", None)),
    *((partial(attach, lora_alpha=a), "lora_alpha must be") for a in (0, -1, math.nan, math.inf, 10**400, True, "1")),
    *((partial(attach, heads=heads), "no head is selected") for heads in ({}, {0: []})),
    *((partial(attach, heads={k: [0]}), f"layer {k!r} of 0..2 has no such heads") for k in (3, -1, "0", True)),
    *((partial(attach, heads={0: heads}), "layer 0 of 0..2") for heads in ([3], [-1], [True], ["0"], [1, 1])),
    *((lambda m, k=k: select_heads(torch.ones(2, 2), k), r"in 1\.\.4, got") for k in (0, 5, True, 2.0, None)),
    *((lambda m, t=t: select_heads(torch.ones(2, 2), 2, t), "tau must be") for t in (-1, math.nan, 1e10, True, "1")),
    *((lambda m, s=s: select_heads(torch.tensor([s]), 1), "scores must be") for s in (1.0, [-1.0], [math.inf])),
    (partial(score_heads, batches=[EARLY], probe="rank2"), "unknown probe 'rank2'"),
    (partial(score_heads, batches=[prompt(TEXT, labels=True)]), "the 1 probe batches hold no visual"),
    (partial(score_heads, batches=[prompt(IMAGE)]), "the loss of probe batch 0 is None: do its labels hold an answer"),
    (partial(score_heads, batches=[EARLY, EARLY | {"labels": torch.full((1, 7), -100)}]), "of probe batch 1 is nan"),
    (lambda m: [setattr(m, "language_model", None), attach(m)], "found none"),
    (lambda m: [delattr(attention(m, 1), "v_proj"), attach(m)], "layers.1 has no self_attn.v_proj"),
    (lambda m: [setattr(attention(m, 1), "head_dim", 5), attach(m)], "head_dim is 5, v_proj has"),
    (lambda m: [m.language_model.layers.append(m.language_model.layers[0]), attach(m)], "layers share a v_proj"),
    (hf("LlamaForCausalLM", **DECODER), "no image_token_id"),
    (hf("Gemma3nForCausalLM", **DECODER, layer_types=None, num_kv_shared_layers=0), "values after v_proj, in .*v_norm"),
    (hf("MllamaForConditionalGeneration", text_config=DECODER | MROPE | {"cross_attention_layers": [1]}), "cross-att"),
    (hf("Phi4MultimodalForCausalLM", **DECODER, vision_config={}, audio_config={}), "fused qkv"),
    (hf("Lfm2VlForConditionalGeneration", text_config=DECODER | {"layer_types": ["conv", "full_attention"]}), "hybrid"),
]


@pytest.mark.parametrize("run, sentence", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence_and_the_model_stays_as_it_was(run, sentence):
    model = tiny_vlm()
    with pytest.raises(ValueError, match=f"^[^\n]*{sentence}[^\n]*$"):
        run(model)
    assert not hasattr(model, "image_lora") and all(p.requires_grad for p in model.parameters())
    assert not any(state_of(model)[0])
