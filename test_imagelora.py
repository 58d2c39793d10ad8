"""Read in order: each test is a sentence of the method, and its body is the proof. 1 to 6 are the paper's argument."""

import asyncio
import copy
import math
import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import imagelora
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
    ids, seed = torch.tensor(rows), torch.Generator(torch.get_default_device()).manual_seed(1)
    pictures = torch.rand(int((ids == IMG).sum()) // P, 3, 32, 32, generator=seed)
    batch = {"input_ids": ids, "pixel_values": pictures if len(pictures) else None}
    return batch | ({"labels": ids.masked_fill(ids == IMG, -100)} if labels else {})


EARLY, LATE = prompt(IMAGE + BEFORE, labels=True), prompt([IMG, *BEFORE, *IMAGE[1:]], labels=True)
SOME = {"r": 2, "heads": {0: [1], 2: [0, 1]}}


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


def watch(model, batch: dict, *modules: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(What goes into a module, what comes out of it) in one forward pass, in the order in which they run."""
    found = []
    hooks = [m.register_forward_hook(lambda module, x, y: found.append((x[0], y))) for m in modules]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


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
    """V~(h) = X W_V(h) + gamma (alpha / r) 1/sqrt|S| M X A B(h) for h in S. A layer without selected heads has none."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    adapter = attach_trained(model, r=2, lora_alpha=6, heads={0: [2, 0], 1: []})
    assert list(adapter.layers) == ["0"] and sum(p.numel() for p in adapter.parameters()) == D * 2 + 2 * 2 * D_H + 1
    A, B, gamma = adapter.parameters()
    ((X, value),) = watch(model, batch, attention(model, 0).v_proj)
    W_V = attention(model, 0).v_proj.weight.T  # [D, H * d_h]
    for t, token in enumerate(batch["input_ids"][0]):
        for h in range(H):
            columns = slice(h * D_H, (h + 1) * D_H)
            expected = X[0, t] @ W_V[:, columns]
            if token == IMG and h in (0, 2):
                expected = expected + gamma * (6 / 2) * (1 / math.sqrt(2)) * X[0, t] @ A @ B[[0, 2].index(h)]
            torch.testing.assert_close(value[0, t, columns], expected)


def test_it_starts_as_the_base_model_so_the_first_gradient_reaches_b_only():
    """B starts at zero, so the loss does not depend on A or gamma yet: A is uniform in +-1/sqrt(D), gamma is 1."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER, labels=True)
    base, adapter = model(**batch).logits, attach(model, heads={0: [0, 2], 1: [1]})
    adapted = model(**batch)
    assert torch.equal(adapted.logits, base)
    adapted.loss.backward()
    for a in adapter.layers.values():
        assert not a.A.grad.any() and not a.gamma.grad.any() and a.B.grad.flatten(1).any(1).all()
        assert a.gamma.item() == 1 and a.A.shape == (D, 8) and 0.9 < a.A.abs().max() * D**0.5 <= 1


@pytest.mark.parametrize("autocast", [False, True])
def test_text_with_no_image_before_it_is_the_base_models_bit_for_bit(autocast):
    """Attention is causal: only what comes after an image can read its values. A text, a text's row, answers stay."""
    model, text, mixed = tiny_vlm(), prompt(TEXT), prompt(TEXT + AFTER + [2], BEFORE + IMAGE + AFTER)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        base, base_mixed = logits_of(model, text), logits_of(model, mixed)
        answer, _ = model.generate(**text, max_new_tokens=6), attach_trained(model)
        assert torch.equal(logits_of(model, text), base)
        assert torch.equal(model.generate(**text, max_new_tokens=6), answer)
        changed = (logits_of(model, mixed) != base_mixed).any(-1)
        assert all(step.isfinite().all() and step.any() for step in slopes(model, loss_of(model, mixed)))
    assert changed.tolist() == [[False] * 11, [False] * len(BEFORE) + [True] * len(IMAGE + AFTER)]


def test_where_the_first_adapted_layer_looks_does_not_change_only_what_it_reads():
    """Queries and keys are untouched, to the bit, and so are the values of other tokens and of other heads."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + [5] + IMAGE + AFTER)
    parts = [getattr(attention(model, 1), f"{name}_proj") for name in "qkv"]
    adapter, visual = attach_trained(model, heads={1: [0, 2], 2: [1]}), batch["input_ids"] == IMG
    adapted, base = watch(model, batch, *parts), adapter.disabled()(watch)(model, batch, *parts)
    for name, (_, new), (_, old) in zip("qkv", adapted, base):
        changed = (new != old).unflatten(-1, (-1, D_H)).any(-1)  # [B, T, heads]
        selected = torch.tensor([name == "v" and h in (0, 2) for h in range(changed.shape[2])])
        assert torch.equal(changed, visual[..., None] & selected), name


def test_normalization_makes_the_first_update_as_large_for_every_number_of_heads():
    """Adam's first step moves every entry of B by the learning rate. With 1/sqrt|S| the update ||Delta V||^2 of all the
    heads is then the mean of what each of them gets when adapted alone; without the factor it is the sum."""
    batch = prompt(BEFORE + IMAGE + AFTER, labels=True)

    def first_update(heads, normalize):
        adapter = attach(model := tiny_vlm(), heads={1: heads}, normalize=normalize)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01, eps=1e-30)
        model(**batch).loss.backward()
        optimizer.step()
        ((x, value),) = watch(model, batch, attention(model, 1).v_proj)
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
    """Adapted values are in the KV cache after prefill, whole or cut between images: decoding triggers nothing."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + IMAGE + AFTER)
    (ids, pictures), adapter = batch.values(), attach_trained(model)
    cached, whole = model.generate(**batch, max_new_tokens=6), model(**batch).logits
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=6, use_cache=False))
    for cut in (1, 3 + P, 3 + 2 * P, 4 + 2 * P):
        done = int((ids[:, :cut] == IMG).sum()) // P
        first = model(ids[:, :cut], pictures[:done] if done else None)
        rest = model(ids[:, cut:], pictures[done:] if done < 2 else None, past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)
    for a in adapter.layers.values():
        a.add_update = None  # it is not even called
    assert model(ids[:, -1:], past_key_values=rest.past_key_values).logits.any()


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
    for wrong, told in ((mask[:, 1:], r"\[2, 5\]"), (mask[:1], r"\[1, 6\]")):
        told = rf"tell of tokens .*{told}.*, v_proj got .*\[2, 6\].*; for beams, mask.repeat_interleave\(num_beams, 0\)"
        with adapter.visual_mask(wrong), pytest.raises(RuntimeError, match=told):
            model(inputs_embeds=x)


# 3. Training moves A, B and gamma, and nothing else
def test_only_the_adapter_is_trained():
    """No other parameter of the model has a gradient. Without visual tokens, or disabled(), it is zero, not missing."""
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


def test_a_state_dict_loads_also_averaged_and_not_into_other_heads_layers_or_scales():
    adapter, batch = attach_trained(model := tiny_vlm(), heads={0: [1], 2: [0, 2]}), prompt(IMAGE + AFTER)
    attach(other := tiny_vlm(), heads=adapter.heads)
    averaged = {name: 0.7 * t + 0.3 * t for name, t in model.state_dict().items()}
    for state, strict in ((averaged, True), (tiny_vlm().state_dict(), False)):  # of the base: the adapter stays
        other.load_state_dict(state, strict)
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits)
    for heads in ({0: [2], 2: [0, 2]}, {0: [1]}, {0: [1], 1: [0], 2: [0, 2]}, {0: [1], 2: [0, 1, 2]}, None):
        attach(other := tiny_vlm(), heads=heads or adapter.heads, normalize=heads is not None)
        for each, state in ((other, model.state_dict()), (other.image_lora, adapter.state_dict())):
            with pytest.raises(RuntimeError, match="in other layers or heads|size mismatch for .*layers.2.B"):
                each.load_state_dict(state, strict=False)


def test_a_narrower_type_is_the_models_alone_and_torchs_defaults_change_nothing(request):
    """A, B, gamma and the scores are float32 or wider, where the model is; to_empty() does not unset the heads."""
    adapter = attach_trained(model := tiny_vlm())
    trained = [p.clone() for p in adapter.parameters()]
    assert attention(model.bfloat16(), 0).v_proj.weight.dtype == torch.bfloat16
    assert all(map(torch.equal, adapter.parameters(), trained))
    assert model.double().image_lora.layers["0"].A.dtype == torch.double != model.float().image_lora.layers["0"].A.dtype
    adapter.detach()
    scores = [score_heads(model, [EARLY], probe=probe) for probe in ("rank1", "exact")]
    request.addfinalizer(partial(torch.set_default_dtype, torch.float32))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        again = [score_heads(model, [EARLY], probe=probe) for probe in ("rank1", "exact")]
        assert {(p.dtype, p.device) for p in attach(model).parameters()} == {(torch.float32, model.device)}
    assert all(map(torch.equal, again, scores)) and again[1].dtype == torch.float32


def test_a_seed_starts_alike_on_every_device_and_the_heads_stay_on_the_one_that_uses_them():
    states = []
    for device in (torch.device("meta"), torch.get_default_device()):
        torch.manual_seed(0)
        with device:
            a = imagelora.ValueAdapter(D, D_H, H, [0, 2], 2, 4).to_empty(device=device)
            states.append(torch.get_rng_state())
            a.load_state_dict({"A": torch.ones(D, 2), "B": torch.ones(2, 2, D_H), "gamma": torch.ones(1)})
            update = a.add_update(torch.ones(1, 1, D), torch.zeros(1, 1, H * D_H), torch.tensor([0]))
        assert a.heads.device == device
    assert update.view(H, D_H).any(1).tolist() == [True, False, True] and torch.equal(*states)


# 4. Which heads: the probe and the budget
def test_the_exact_probe_is_the_squared_gradient_of_the_value_weights_over_visual_tokens():
    """I(l, h) = ||X_vis^T G_l(h)||^2, squared batch by batch: batches of one example give another, the examples'."""
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
    """dL/dB = A^T X_vis^T G, a new A ~ N(0, I) each batch: its square has the exact score as its mean, and a relative
    deviation of at most sqrt(2 sum_b s_b^2) / sum_b s_b, s_b being batch b's exact score. One visual token has it."""
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


SHARES = [([9, 1], 6, 4, 0.5, {0: 3, 1: 1}), ([6, 2, 0], 8, 6, 0, {0: 2, 1: 2, 2: 2})]  # roots of 9 and 1; evenly
SHARES += [([6, 2, 0], 8, 8, 1, {0: 6, 1: 2}), ([6, 2, 0], 8, 10, 20, {0: 8, 1: 2})]  # in proportion; best layers first
SHARES += [([0, 0], 8, 6, 0.5, {0: 3, 1: 3}), ([46, 34, 20], 7, 7, 1, {0: 3, 1: 3, 2: 1})]  # d'Hondt: 4, 2, 1
SHARES += [([9e37, 1e37], 4, 2, 1e9, {0: 2}), ([9e-30, 1e-30], 4, 2, 20, {0: 2})]  # no power overflows, or is lost


@pytest.mark.parametrize("influence, size, budget, tau, expected", SHARES)
def test_the_layers_share_the_budget_by_their_influence_to_the_power_of_tau(influence, size, budget, tau, expected):
    scores = torch.tensor(influence)[:, None].float().expand(-1, size) / size
    assert {layer: len(heads) for layer, heads in select_heads(scores, budget, tau).items()} == expected


# 5. The cost, and why it cannot be merged
@pytest.mark.parametrize("heads", [None, {0: [1]}, {1: [0, 2], 2: [1]}])
def test_counted_flops_are_the_computed_ones(heads):
    """Forward 2Nr(D + |S|d_h), backward dB, dz, dA, and dx in all adapted layers but the lowest; N visual tokens."""
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


def test_no_value_weight_reproduces_the_adapter_on_mixed_tokens():
    """On visual tokens alone one W reproduces it; with text among them none does: what is added depends on the kind."""
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
    lower = score_heads(model, [batch], lambda m, b: watch(m, b, attention(m, 1).k_proj)[0][1].sum())
    assert lower.any(1).tolist() == [True, False, False]  # the loss is of what layer 0 wrote
    assert state_of(model) == before and torch.equal(model(**batch).logits, base)
    adapter = attach_trained(model)
    for other in (model, Mock(["get_base_model"], get_base_model=lambda: model)):  # it would double the update
        with pytest.raises(ValueError, match="already has an Image-LoRA; call its detach"):
            attach(other)
    with adapter.disabled(), adapter.disabled():
        assert torch.equal(model(**batch).logits, base)
    assert not torch.equal(model(**batch).logits, base)
    assert adapter.detach() is model and state_of(model) == before and torch.equal(model(**batch).logits, base)


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
class Exploit(str):  # unpickled without care, it makes a file of that name
    def __reduce__(self):
        return Path.touch, (Path(self),)


def test_a_damaged_file_is_refused_in_one_sentence_or_loads_exactly_what_was_saved(tmp_path):
    """A flipped bit at every 53rd byte and in the zip's directory, a cut, foreign files, pickles that run code."""
    path, made = tmp_path / "file.pt", tmp_path / "made"
    attach_trained(tiny_vlm(), **SOME).save(path)
    data, saved = path.read_bytes(), load(tiny_vlm(), path).state_dict()
    mutants = [data[: len(data) // 2], b"", b"not a model\n", pickle.dumps(Exploit(made))]
    flips = [*range(0, len(data), 53), *(entry.start() + 33 for entry in re.finditer(b"PK\1\2", data))]
    mutants += [data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :] for i in flips]
    for content in ([1, 2], {"r": Exploit(made)}):
        torch.save(content, path)
        mutants.append(path.read_bytes())
    for mutant in mutants:
        path.write_bytes(mutant)
        try:
            found = load(tiny_vlm(), path).state_dict()
        except ValueError as error:
            assert re.fullmatch(r"[^\n]* is missing, damaged or not a PyTorch file \([^\n]+\)", str(error)), error
        else:
            assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    assert not made.exists()


MISFITS = [("r", 3), ("r", 0), ("alpha", 0.0), ("normalize", "no"), ("layers", {}), ("head_counts", [3, 3])]
MISFITS += [("kv_indices", k) for k in ({"0": [1]}, {"0": [3], "2": [0, 1]}, {"0": [1], "2": [0]}, None)]
MISFITS += [("B", B) for B in (torch.ones(1, 2, 3), torch.full((1, 2, 4), math.nan), None)]
MISFITS += [("C", torch.ones(1)), ("kv_indices", {"0": [1], "2": [0, 1], "1": [0]})]
MISFITS += [("A", A) for A in (torch.ones(2, D), torch.full((D, 2), 1e300, dtype=torch.double), 1)]
MISFITS += [("A", torch.ones(D, 2, dtype=kind)) for kind in (torch.long, torch.bool, torch.cfloat)]
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
    """It is stopped before the new file has its name, the weights are not finite, or were frozen before training."""
    path, adapter = tmp_path / "adapter.pt", attach_trained(tiny_vlm())
    adapter.save(path)
    saved = path.read_bytes()
    for step in ("os.replace", "pathlib.Path.write_bytes"):  # as where a disk is full
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(step, lambda *_: Path("/dev/full").write_text("x"))
            adapter.save(path)
    adapter.requires_grad_(False).save(path)  # trained, then frozen
    for wrong in (torch.full((D, 8), math.nan), torch.zeros(0)):
        adapter.layers["1"].A.data = wrong
        with pytest.raises(ValueError, match="A of layer 1 is empty or not finite"):
            adapter.save(path)
    with pytest.raises(ValueError, match=r"frozen and B still zero, .* did get_peft_model\(\) come after attach"):
        attach(tiny_vlm()).requires_grad_(False).save(path)
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
    barrier = threading.Barrier(2 if model.device.type == "cpu" else 1, timeout=60)  # others have one thread a device
    model.language_model.layers[1].input_layernorm.register_forward_pre_hook(lambda *_: barrier.wait() * 0 or None)
    with ThreadPoolExecutor(2) as pool, model.image_lora.disabled():
        losses = list(pool.map(partial(loss_of, model), (EARLY, LATE)))
        list(pool.map(torch.autograd.backward, losses))
    return [p.grad for p in model.image_lora.parameters()]


def test_a_context_is_of_its_coroutine_or_thread():
    """Also where two overlap in one thread; asyncio.to_thread() takes it along."""
    adapter, base = attach_trained(model := tiny_vlm()), tiny_vlm()(**EARLY).logits

    async def ask(context):
        with context:
            await asyncio.sleep(0)  # the others enter theirs
            return logits_of(model, EARLY), await asyncio.to_thread(logits_of, model, EARLY)

    async def at_once():
        return await asyncio.gather(ask(adapter.disabled()), ask(nullcontext()), ask(adapter.disabled()))

    same = [[torch.equal(logits, base) for logits in pair] for pair in asyncio.run(at_once())]
    assert same == [[True, True], [False, False], [True, True]] and not torch.equal(model(**EARLY).logits, base)


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
    """The next forward goes by its own visual tokens; before it, after Ctrl-C, a CPU may refuse to run layers again."""
    adapter = attach_trained(model := checkpoint_layers(tiny_vlm()))
    expected, loss = model(**LATE).logits, loss_of(model, LATE)
    handle = model.language_model.layers[1].register_forward_pre_hook(Mock(side_effect=error))
    for context in (nullcontext, adapter.disabled, partial(adapter.visual_mask, EARLY["labels"] < 0), torch.no_grad):
        for batch in (EARLY, prompt(TEXT)):
            with pytest.raises(error), context():
                model(**batch)
    handle.remove()
    refused = pytest.raises(RuntimeError, match="memory of another call's, which has other visual tokens")
    with refused if error is KeyboardInterrupt and model.device.type == "cpu" else nullcontext():
        loss.backward()
    assert torch.equal(model(**LATE).logits, expected)


def offloaded(model):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):  # as activation offloading copies
        loss_of(checkpoint_layers(model), EARLY).backward()


NORM, X, OUTSIDE = "language_model.layers.0.input_layernorm", torch.zeros(1, 7, D), r"v_proj ran outside of model\("
REPLACED, COPIED = "v_proj or its input_layernorm was not called: apply", "a checkpoint of several layers or of a copy"
NOT_RIGHT = [
    *((context(lambda m: attention(m, 0).v_proj(X)), OUTSIDE) for context in (torch.enable_grad(), torch.no_grad())),
    (lambda m: [m(**EARLY), m.language_model.layers[0](X)], OUTSIDE),
    (lambda m: m.language_model.layers[0](watch(m, EARLY, m.get_submodule(NORM))[0][0][:, :5]), OUTSIDE),
    (lambda m: m.forward(**EARLY), OUTSIDE),
    (offloaded, COPIED),
    (lambda m: loss_of(checkpoint_layers(m, layers=[m.language_model]), EARLY).backward(), COPIED),
    (lambda m: loss_of(checkpoint_layers(m, True, input_grads=False), EARLY), "needs model.enable_input_require_grads"),
    (lambda m: [setattr(attention(m, 2), "v_proj", nn.Linear(D, 12)), m(**EARLY)], REPLACED),
    (lambda m: [setattr(m.get_submodule(NORM), "forward", nn.RMSNorm(D).forward), m(**EARLY)], REPLACED),  # as Liger
    (lambda m: torch.jit.trace(m, (EARLY["input_ids"], EARLY["pixel_values"])), "would fix which tokens are visual"),
    *((lambda m, t=t: m.image_lora.visual_mask(t), r"be a bool tensor \[B, T\], got") for t in (X[0], X[0, 0] > 0)),
    (lambda m: [a := m.image_lora, a.detach(), a.detach()], "already detached"),
    (lambda m: [a := m.image_lora, attach(a.detach()), a.disabled().__enter__()], "detached; use the one that"),
    (lambda m: m.image_lora.layers["0"].add_update(X, X[..., :4], X), "4 features, not 3 heads of 4: are heads split"),
]


@pytest.mark.parametrize("run, sentence", NOT_RIGHT)
def test_what_cannot_be_right_is_refused_in_one_sentence(run, sentence):
    attach_trained(model := tiny_vlm(), **SOME)
    with pytest.raises((RuntimeError, ValueError), match=f"^[^\n]*{sentence}"):
        run(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(copied):
    attach_trained(model := tiny_vlm(), **SOME)
    expected, base, twin = slopes(model, loss_of(model, EARLY)), tiny_vlm()(**EARLY).logits, copied(model)
    model.image_lora.layers["0"].gamma.data.zero_()
    torch.testing.assert_close(slopes(twin, loss_of(twin, EARLY)), expected)
    assert torch.equal(twin.image_lora.detach()(**EARLY).logits, base) and not any(state_of(twin)[0])
    assert not torch.equal(model(**EARLY).logits, base)


@pytest.mark.parametrize("what, limit", [("model", 2), ("model", 8), ("layers", 8)])  # torch's own limit at last
def test_compiled_code_follows_attach_disabled_and_detach(what, limit):
    """Also where the compiler gives up, after `limit` variants. Beside it a debugger steps past no frame of its own."""
    torch._dynamo.config.cache_size_limit = limit
    model, twin = tiny_vlm(num_hidden_layers=2), tiny_vlm(num_hidden_layers=2)
    compiled = model if what == "layers" else torch.compile(model, backend="eager")  # attach() looks through it
    for layer in model.language_model.layers if what == "layers" else ():
        layer.compile(backend="eager")
    compiled(**EARLY)
    adapter, files, debugger = attach_trained(compiled), set(), sys.gettrace()
    attach_trained(twin).load_state_dict(adapter.state_dict())
    for batch in (EARLY, prompt(IMAGE + AFTER, AFTER + IMAGE), prompt(TEXT)):
        sys.settrace(lambda frame, event, argument: files.add(frame.f_code.co_filename))
        loss = loss_of(twin, batch)
        sys.settrace(debugger)
        torch.testing.assert_close(slopes(model, loss_of(compiled, batch)), slopes(twin, loss), rtol=1e-4, atol=1e-4)
        with adapter.disabled(), twin.image_lora.disabled():
            torch.testing.assert_close(logits_of(compiled, batch), logits_of(twin, batch))
    assert imagelora.__file__ in files and not [name for name in files if "_dynamo" in name]
    adapter.detach()
    torch.testing.assert_close(logits_of(compiled, LATE), logits_of(twin.image_lora.detach(), LATE))


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


# 8. What is refused
REFUSED = [
    *((partial(attach, r=r), r"r must be an integer in 1\.\.24, got") for r in (0, 25, True, 2.0, "2", None)),
    *((partial(attach, lora_alpha=a), "lora_alpha must be") for a in (0, -1, math.nan, math.inf, 10**400, True, "1")),
    *((partial(attach, heads=heads), "no head is selected|heads must be {layer:") for heads in ({}, {0: []}, [1])),
    *((partial(attach, heads={k: [0]}), f"layer {k!r} of 0..2 has no such heads") for k in (3, -1, "0", True)),
    *((partial(attach, heads={0: heads}), "layer 0 of 0..2") for heads in ([3], [-1], [True], [[1]], [1, 1], 3)),
    *((lambda m, k=k: select_heads(torch.ones(2, 2), k), r"in 1\.\.4, got") for k in (0, 5, True, 2.0, None)),
    *((lambda m, t=t: select_heads(torch.ones(2, 2), 2, t), "tau must be") for t in (-1, math.nan, 1e10, True, "1")),
    *((lambda m, s=s: select_heads(torch.tensor([s]), 1), "scores must be") for s in (1.0, [-1.0], [math.inf])),
    (partial(score_heads, batches=[EARLY], probe="rank2"), "unknown probe 'rank2'"),
    (partial(score_heads, batches=[prompt(TEXT, labels=True)]), "the 1 probe batches hold no visual"),
    (partial(score_heads, batches=[]), "the 0 probe batches hold no visual"),
    (partial(score_heads, batches=[prompt(IMAGE)]), "the loss of probe batch 0 is None: do its labels hold an answer"),
    (partial(score_heads, batches=[EARLY, EARLY | {"labels": torch.full((1, 7), -100)}]), "of probe batch 1 is nan"),
    (lambda m: attach(nn.ModuleDict({"module": m})), "config has no image_token_id .* the whole VLM, unwrapped"),
    (lambda m: [setattr(m, "language_model", None), attach(m)], "found none"),
    (lambda m: [delattr(attention(m, 1), "v_proj"), attach(m)], "layers.1 has no self_attn.v_proj"),
    (lambda m: [setattr(attention(m, 1), "head_dim", 5), attach(m)], "head_dim is 5, v_proj has"),
    (lambda m: [m.language_model.layers.append(m.language_model.layers[0]), attach(m)], "layers share a v_proj"),
]


@pytest.mark.parametrize("run, sentence", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence_and_the_model_stays_as_it_was(run, sentence):
    model = tiny_vlm()
    with pytest.raises(ValueError, match=f"^[^\n]*{sentence}[^\n]*$"):
        run(model)
    assert not (hasattr(model, "image_lora") or any(state_of(model)[0]))
    assert all(p.requires_grad for p in model.parameters())
