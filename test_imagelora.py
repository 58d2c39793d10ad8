"""The invariants of Image-LoRA, as explanation: read in order, the docstrings are the argument of the paper.

`pytest` runs all; tests with real vision-language models need transformers and peft and are skipped without them.
`python test_imagelora.py --bench` prints the overhead of a training step.
"""

import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
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
    """When no image is in the context, a trained adapter changes nothing: logits, generation, a row of a mixed batch."""
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
    """Adapted values are in the KV cache after prefill, so a decoded text token triggers no adapter product at all."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER, IMAGE + AFTER + BEFORE, images=2)
    adapter = attach_trained(model)
    cached = model.generate(**batch, max_new_tokens=6)
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=6, use_cache=False))

    def decode_flops():
        cache = model(**batch).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[5], [6]]), past_key_values=cache)
        return counter.get_total_flops()

    adapted = decode_flops()
    with adapter.disabled():
        assert adapted == decode_flops() > 0


@torch.no_grad()
def test_a_prompt_may_be_cut_anywhere():
    """A chunk that begins inside the image is adapted, a later text chunk longer than the image is not."""
    ids, images = [1, 5, *IMAGE, *IMAGE, 6, 7, 8, 9, 10, 11, 12], pictures(2)
    model = tiny_vlm()
    attach_trained(model)
    whole = model(torch.tensor([ids]), images).logits
    for cut in (2 + P, 2 + 2 * P, 3 + 2 * P):  # between the images, after them, inside the text
        first, second = torch.tensor([ids[:cut]]), torch.tensor([ids[cut:]])
        done = int((first == IMG).sum()) // P
        out = model(first, images[:done] if done else None)
        rest = model(second, images[done:] if done < 2 else None, past_key_values=out.past_key_values).logits
        torch.testing.assert_close(torch.cat([out.logits, rest], 1), whole, rtol=1e-4, atol=1e-4)


def test_embeddings_alone_need_an_explicit_mask():
    """Where input_ids are not given the visual tokens are unknown: refused, or taken from visual_mask(), never guessed."""

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
    """Every base parameter is frozen; adapter.parameters() are the trainable ones, and move with the model."""
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
    text = prompt(TEXT, images=0, labels=True)
    with_image = prompt(BEFORE + IMAGE + AFTER, labels=True)
    (model(**text).loss + 0 * model(**with_image).loss).backward()
    assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())


def test_normalization_makes_the_update_independent_of_how_many_heads_are_selected():
    """E||Delta V||^2 grows with |S|; the factor 1/sqrt|S| makes it constant, so one learning rate serves every budget."""
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
    """dL/dB = A^T X_vis^T G with A ~ N(0, I), so over draws of A the mean of its square is the exact score."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER, labels=True)
    mean = torch.stack([score_heads(model, [batch], seed=seed) for seed in range(300)]).mean(0)
    torch.testing.assert_close(mean / score_heads(model, [batch], probe="exact"), torch.ones(L, H), rtol=0, atol=0.35)


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
    """Each batch's mean gradient is squared; batches of one example are the per-example score, and it may differ."""
    model = tiny_vlm()
    one, two = prompt(BEFORE + IMAGE + AFTER, labels=True), prompt(AFTER + IMAGE + BEFORE, labels=True)
    both = score_heads(model, [one, two], probe="exact")
    each = [score_heads(model, [batch], probe="exact") for batch in (one, two)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 3.0])
def test_selection_meets_every_budget_exactly(tau):
    """k_l ~ (sum_h I)^tau, capped by the layer's heads, sums to K whatever the scores: uneven, zero, equal."""
    torch.manual_seed(0)
    for scores in (torch.rand(5, 4) ** 8, torch.zeros(5, 4), torch.ones(5, 4), torch.rand(5, 4) * torch.eye(5, 4)):
        for budget in range(1, 21):
            heads = select_heads(scores, budget, tau)
            assert sum(map(len, heads.values())) == budget
            for layer, chosen in heads.items():
                assert sorted(scores[layer].tolist())[-len(chosen)] <= min(scores[layer][chosen].tolist())


def test_tau_goes_from_even_to_proportional():
    """tau = 0 gives every layer the same, tau = 1 shares in proportion to influence."""
    scores = torch.tensor([[6.0] * 8, [2.0] * 8, [0.0] * 8])
    assert {layer: len(h) for layer, h in select_heads(scores, 6, tau=0).items()} == {0: 2, 1: 2, 2: 2}
    assert {layer: len(h) for layer, h in select_heads(scores, 8, tau=1).items()} == {0: 6, 1: 2}


# ---------------------------------------------------------------------------------------------------------------------
# 5. The cost, and why it cannot be merged


@pytest.mark.parametrize("heads", [None, {0: [1]}, {1: [0, 2], 2: [1]}])
def test_counted_flops_are_the_computed_ones(heads):
    """Forward 2Nr(D + |S|d_h) and backward dB, dz, dA, dx, as integers, over visual tokens only."""
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
    """Visual fraction x value-only x selected heads: with equal shapes the ratio to LoRA is their product."""
    tokens, visual, layers, heads = 100, 60, 4, 8
    lora = 4 * layers * lora_flops(tokens, 64, 64, 8)
    ours = image_lora_flops(visual, 64, 8, {layer: list(range(heads)) for layer in range(layers)}, 8, input_grad=True)
    assert ours / lora == pytest.approx(0.6 * (1 / 4))
    half = image_lora_flops(visual, 64, 8, {layer: list(range(4)) for layer in range(layers)}, 8, input_grad=True)
    assert half / ours == pytest.approx((64 * 3 + 32 * 3) / (64 * 6), rel=0.01) or half / ours == pytest.approx(0.75)


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

    assert residual(torch.arange(40)) < 1e-5
    assert residual(torch.arange(0, 40, 2)) > 0.3


# ---------------------------------------------------------------------------------------------------------------------
# 6. An adapter comes off, and travels


@torch.no_grad()
def test_detach_and_disabled_restore_the_base_bit_for_bit():
    """Inside disabled(), and for good after detach(), the model is the original one: outputs, names, requires_grad."""
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
    """save and load carry A, B, gamma, r, alpha and the heads; the file is the authors' layout."""
    model, batch = tiny_vlm(), prompt(BEFORE + IMAGE + AFTER)
    adapter = attach_trained(model, r=2, lora_alpha=3, heads={0: [2, 0], 2: [1]}, normalize=normalize)
    adapter.layers["0"].gamma.fill_(0.3)
    expected = model(**batch).logits
    adapter.save(tmp_path / "adapter.pt")
    adapter.detach()
    assert torch.equal(model(**batch).logits, expected) is False
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
    """A head out of range is an error that names it, never dropped."""
    model = tiny_vlm()
    with pytest.raises(ValueError, match=r"layer|head"):
        attach(model, heads=heads)
    assert not hasattr(model, "image_lora") and all(p.requires_grad for p in model.parameters())


def test_attaching_twice_is_refused():
    """Nested use would double the update."""
    model = tiny_vlm()
    attach(model)
    with pytest.raises(ValueError, match="already"):
        attach(model)
