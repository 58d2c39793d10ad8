"""The paper's argument, one statement per test: the docstring says it, and the body checks it.

What holds under threads and checkpointing, with files and bad arguments is tested in data/test_guarantees.py."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.costs import image_lora_flops
from data.rivals import LoRA
from imagelora import ImageLoRA, ValueAdapter, attach, score_heads, select_heads
from tiny_vlm import TinyVLM, TinyVLMConfig

torch.set_num_threads(1)  # two threads would wait for each other whenever another process runs

D = 24  # hidden size
D_H = 4  # size of a head
H = 3  # value heads of a layer


# 1. The update of one layer
def trained(adapter: nn.Module) -> nn.Module:
    """The adapter as after training: B is not zero, and gamma is not 1."""
    torch.manual_seed(2)
    for name, parameter in adapter.named_parameters():
        if name.endswith("B"):
            nn.init.normal_(parameter)
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.7)
    return adapter


def test_the_values_are_the_papers_formula():
    """V~(h) = X W_V(h) + gamma (alpha / r) 1/sqrt|S| M X A B(h) for h in S, and X W_V(h) for the other heads."""
    S = [2, 0]
    adapter = trained(ValueAdapter(D, D_H, H, heads=S, r=2, lora_alpha=6))
    A, B, gamma = adapter.parameters()
    assert A.shape == (D, 2)
    assert B.shape == (2, 2, D_H)  # [|S|, r, d_h]
    assert gamma.shape == (1,)

    X = torch.randn(5, D)
    W_V = torch.randn(D, H * D_H)
    visual = [1, 2, 4]  # of the five tokens
    value = adapter.add_update(X[None], (X @ W_V)[None], torch.tensor(visual))[0]
    for t in range(5):
        for h in range(H):
            columns = slice(h * D_H, (h + 1) * D_H)
            expected = X[t] @ W_V[:, columns]
            if t in visual and h in S:
                expected = expected + gamma * (6 / 2) * (1 / math.sqrt(2)) * X[t] @ A @ B[S.index(h)]
            torch.testing.assert_close(value[t, columns], expected)


# 2. A model with the update in its values
L = 3  # layers
P = 4  # visual tokens of an image
IMG = 3  # the id of the placeholder of an image
IMAGE = [IMG] * P
TEXT = [1, 5, 6, 7, 8, 9]
BEFORE = [1, 5, 6]
AFTER = [7, 8, 9, 10]


def tiny_vlm(**changes) -> TinyVLM:
    """Three layers of six query heads and three value heads, with random weights."""
    sizes = {
        "vocab_size": 40,
        "image_size": 32,
        "hidden_size": D,
        "num_hidden_layers": L,
        "num_key_value_heads": H,
        "vision_hidden_size": 16,
        "vision_num_hidden_layers": 1,
        "vision_num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = TinyVLMConfig(**(sizes | changes))
    return TinyVLM(config).eval()


def prompt(*rows: list[int], labels: bool = False) -> dict:
    """The model's arguments: rows of token ids, all of one length, and a picture for each image in them."""
    input_ids = torch.tensor(rows)
    num_images = int((input_ids == IMG).sum()) // P
    generator = torch.Generator(input_ids.device).manual_seed(1)
    pictures = torch.rand(num_images, 3, 32, 32, generator=generator)
    batch = {"input_ids": input_ids, "pixel_values": pictures if num_images else None}
    if labels:
        batch["labels"] = input_ids.masked_fill(input_ids == IMG, -100)
    return batch


# Two batches of the same shape. Their visual tokens are tokens 0 to 3, and tokens 0, 4, 5, 6.
EARLY = prompt(IMAGE + BEFORE, labels=True)
LATE = prompt(IMAGE[:1] + BEFORE + IMAGE[1:], labels=True)


def attach_trained(model, train_gamma=True, **options) -> ImageLoRA:
    return trained(attach(model, train_gamma=train_gamma, **options))


@torch.no_grad()
def logits_of(model, batch: dict) -> torch.Tensor:
    return model(**batch).logits


def test_it_starts_as_the_base_model_and_the_first_gradient_reaches_b_only():
    """B starts at zero, so the loss does not depend on A or gamma yet. A is uniform in +-1/sqrt(D), and gamma is 1."""
    model = tiny_vlm()
    base = logits_of(model, EARLY)
    adapter = attach(model, heads={0: [0, 2], 1: [1], 2: []}, train_gamma=True)
    assert list(adapter.layers) == ["0", "1"]  # none in a layer without selected heads
    adapted = model(**EARLY)
    assert torch.equal(adapted.logits, base)
    adapted.loss.backward()
    for layer in adapter.layers.values():
        assert layer.A.shape == (D, 8)
        assert 0.98 / math.sqrt(D) < layer.A.abs().max() <= 1 / math.sqrt(D)
        assert layer.gamma.item() == 1
        assert not layer.A.grad.any()
        assert not layer.gamma.grad.any()
        assert all(gradient.any() for gradient in layer.B.grad)  # one [r, d_h] for each head


def text_stays_the_bases(adapt) -> bool:
    """Whether adapt(model) leaves the logits and the answer of a prompt without an image as they were, to the bit."""
    model = tiny_vlm()
    text = prompt(TEXT)
    base = logits_of(model, text)
    base_answer = model.generate(**text, max_new_tokens=6)
    adapt(model)
    same_answer = torch.equal(model.generate(**text, max_new_tokens=6), base_answer)
    return torch.equal(logits_of(model, text), base) and same_answer


def test_text_before_any_image_is_the_base_models_bit_for_bit():
    """Attention is causal, so only the image and what follows it can read the image's values."""
    assert text_stays_the_bases(attach_trained)
    model = tiny_vlm()
    mixed = prompt(TEXT + AFTER + [2], BEFORE + IMAGE + AFTER)
    base = logits_of(model, mixed)
    attach_trained(model)
    changed = (logits_of(model, mixed) != base).any(-1)  # [2, T]
    assert changed[0].tolist() == [False] * 11
    assert changed[1].tolist() == [False] * len(BEFORE) + [True] * len(IMAGE + AFTER)


def lora(model, tokens="all", projections="qkvo", r=8) -> None:
    """LoRA, by default on queries, keys, values and outputs, as after training."""
    torch.manual_seed(2)
    model.lora = LoRA(model, r, 2 * r, projections, tokens)
    for B in model.lora.B:
        nn.init.normal_(B, std=0.1)


def test_partial_lora_gives_the_same_guarantee():
    """LoRA on all projections passes the same test if it is restricted to visual tokens, and fails it if it is not."""
    assert text_stays_the_bases(partial(lora, tokens="visual"))
    assert not text_stays_the_bases(lora)


def attention(model, layer: int) -> nn.Module:
    return model.language_model.layers[layer].self_attn


def watch(model, batch: dict, *modules: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One forward pass: the input and the output of each of these modules, in the order in which they run."""
    inputs_and_outputs = []

    def note(module, args, output):
        inputs_and_outputs.append((args[0], output))

    hooks = [module.register_forward_hook(note) for module in modules]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return inputs_and_outputs


def test_the_first_adapted_layer_looks_where_it_looked_before_and_reads_something_else():
    """Queries and keys are untouched, to the bit, and so are the values of other tokens and of other heads."""
    model = tiny_vlm()
    batch = prompt(BEFORE + IMAGE + [5] + IMAGE + AFTER)
    adapter = attach_trained(model, heads={1: [0, 2], 2: [1]})
    layer = attention(model, 1)
    projections = layer.q_proj, layer.k_proj, layer.v_proj
    query, key, value = (output for _, output in watch(model, batch, *projections))
    with adapter.disabled():
        base_query, base_key, base_value = (output for _, output in watch(model, batch, *projections))

    assert torch.equal(query, base_query)
    assert torch.equal(key, base_key)
    changed = (value != base_value).unflatten(-1, (H, D_H)).any(-1)  # [B, T, H]
    visual = batch["input_ids"] == IMG  # [B, T]
    selected = torch.tensor([True, False, True])
    assert torch.equal(changed, visual[..., None] & selected)


def test_normalization_makes_the_first_update_as_large_for_every_number_of_heads():
    """Adam's first step moves every entry of B by the learning rate. With 1/sqrt|S| the update ||Delta V||^2 of all the
    heads is then the mean of what each of them gets when adapted alone; without the factor it is the sum."""

    def first_update(heads, normalize):
        model = tiny_vlm()
        batch = prompt(BEFORE + IMAGE + AFTER, labels=True)
        adapter = attach(model, heads={1: heads}, normalize=normalize)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01, eps=1e-30)
        model(**batch).loss.backward()
        optimizer.step()
        v_proj = attention(model, 1).v_proj
        ((X, value),) = watch(model, batch, v_proj)
        return (value - X @ v_proj.weight.T).square().sum().item()

    alone = [first_update([h], normalize=True) for h in range(H)]
    assert first_update([0, 1, 2], normalize=True) == pytest.approx(sum(alone) / H, rel=1e-3)
    assert first_update([0, 1, 2], normalize=False) == pytest.approx(sum(alone), rel=1e-3)


# 3. Which tokens are visual follows from input_ids, in every forward pass
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_batch_is_adapted_as_if_it_were_alone(side):
    """Images at different places, two images, none, padding: each row is adapted at its own visual tokens."""
    model = tiny_vlm()
    attach_trained(model)
    rows = [BEFORE + IMAGE + AFTER, IMAGE + AFTER, [1, *IMAGE, 5, *IMAGE, 6, 7], TEXT]
    padded = []
    for row in rows:
        padding = [0] * (12 - len(row))
        padded.append(padding + row if side == "left" else row + padding)
    batch = prompt(*padded)
    mask = batch["input_ids"] != 0
    together = model(**batch, attention_mask=mask).logits

    pictures = batch["pixel_values"]
    pictures_of_rows = [pictures[0:1], pictures[1:2], pictures[2:4], None]
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row]), pictures_of_rows[i]).logits[0]
        torch.testing.assert_close(together[i][mask[i]], alone, rtol=1e-4, atol=1e-4)


def test_decoding_with_a_cache_equals_decoding_without():
    """After prefill the adapted values are in the KV cache, so a decoded token needs nothing from the adapter."""
    model = tiny_vlm()
    batch = prompt(BEFORE + IMAGE + IMAGE + AFTER)
    attach_trained(model)
    cached = model.generate(**batch, max_new_tokens=6)
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=6, use_cache=False))


# 4. Training moves A, B and gamma, and nothing else
def loss_of(model, batch: dict) -> torch.Tensor:
    """A loss that depends on every logit."""
    return model(**batch).logits.logsumexp(-1).sum()


def slopes(model, *losses: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of the sum of these losses, one for each trainable parameter."""
    model.zero_grad()
    sum(losses).backward(retain_graph=True)
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def test_the_class_and_the_hook_of_the_front_page_are_image_lora():
    """README's class computes V~, and its hook finds M. While decoding, M is zero, and the cache holds the image."""
    model = tiny_vlm()
    heads = {0: [1], 2: [0, 2]}
    adapter = attach_trained(model, heads=heads, r=2, lora_alpha=6)
    ours = logits_of(model, EARLY)
    decoded = model.generate(**prompt(IMAGE + BEFORE), max_new_tokens=5)
    adapter.detach()

    page = Path(__file__).with_name("README.md").read_text()
    (code,) = re.findall(r"^```python\n(import torch\n.*?)^```", page, re.M | re.S)
    (hook,) = re.findall(r"^```python\n(def set_M.*?)^```", page, re.M | re.S)
    names = {"model": model}
    exec(code + hook, names)
    for layer, selected in heads.items():
        naive = names["NaiveImageLoRA"](attention(model, layer).v_proj, D_H, selected, r=2, lora_alpha=6)
        naive.load_state_dict(adapter.layers[str(layer)].state_dict(), strict=False)
        attention(model, layer).v_proj = naive
    torch.testing.assert_close(logits_of(model, EARLY), ours)
    assert torch.equal(model.generate(**prompt(IMAGE + BEFORE), max_new_tokens=5), decoded)


def test_only_the_adapter_is_trained():
    """Every A, B and gamma has a gradient, and no other parameter of the model has one."""
    model = tiny_vlm()
    adapter = attach_trained(model)
    own = set(adapter.parameters())
    assert {p for p in model.parameters() if p.requires_grad} == own
    gradients = slopes(model, loss_of(model, EARLY))
    assert len(gradients) == 3 * L
    assert all(gradient.any() for gradient in gradients)
    assert {p for p in model.parameters() if p.grad is not None} == own


def test_without_visual_tokens_the_gradient_is_zero_but_not_missing():
    """Text teaches the adapter nothing. Data-parallel training waits for every gradient, so it has to be there."""
    model = tiny_vlm()
    attach_trained(model)
    gradients = slopes(model, loss_of(model, prompt(TEXT)))
    assert len(gradients) == 3 * L
    assert not any(gradient.any() for gradient in gradients)


# 5. Which heads: the probe and the budget
def test_a_step_of_gradient_descent_on_a_head_lowers_the_loss_by_the_rate_times_its_influence():
    """That is what influence means: L(B - rate dL/dB) = L(B) - rate ||dL/dB||^2, if the rate is small."""
    rate = 1e-6
    early, late = [
        batch | {"pixel_values": batch["pixel_values"].double()} for batch in (EARLY, LATE)
    ]  # a difference of two losses needs many digits
    scores = score_heads(tiny_vlm().double(), [early], loss_of, probe="exact")
    for layer, head in ((0, 0), (1, 2), (2, 1)):
        model = tiny_vlm().double()
        adapter = attach(model, r=D, lora_alpha=D, heads={layer: [head]}).double()
        adapter.layers[str(layer)].A.data = torch.eye(D).double()
        loss = loss_of(model, early)
        loss.backward()
        torch.optim.SGD([adapter.layers[str(layer)].B], lr=rate).step()
        gain = loss - loss_of(model, early)
        assert gain.item() == pytest.approx(rate * scores[layer, head].item(), rel=0.01)
    of_both = [score_heads(tiny_vlm().double(), batches, loss_of, probe="exact") for batches in ([late], [early, late])]
    torch.testing.assert_close(of_both[1], (scores + of_both[0]) / 2)  # a mean over batches


@pytest.mark.parametrize("num_batches, noise", [(1, 1.41), (4, 0.71)])
def test_the_rank_1_probe_is_unbiased_and_more_batches_make_it_less_noisy(num_batches, noise):
    """With one visual token x, X_vis^T G is a product x g^T, and a random A ~ N(0, I) makes of it z^2 times the exact
    score, where z = A^T x / ||x|| is a normal number. The mean of z^2 is 1, and its standard deviation is sqrt(2): one
    batch is off by 141 %. Every batch has an A of its own, so the mean of n is off by sqrt(2 / n): 71 % with four."""
    model = tiny_vlm(image_size=16, num_hidden_layers=12)
    ids = torch.tensor([[1, IMG, 5, 6]])
    batch = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 16, 16), "labels": ids.masked_fill(ids == IMG, -100)}
    exact = score_heads(model, [batch], probe="exact")
    draws = [score_heads(model, [batch] * num_batches, seed=seed) for seed in range(25)]
    relative = torch.stack(draws) / exact
    assert relative.mean() == pytest.approx(1, abs=0.1)
    assert relative.std() == pytest.approx(noise, rel=0.15)


@pytest.mark.parametrize("probe", ["rank1", "exact"])
def test_the_probe_finds_the_only_head_that_can_help_even_when_it_is_silent(probe):
    """B has a gradient where the value is read, even if the base writes nothing there (a gate on it would score 0)."""
    model = tiny_vlm(num_key_value_heads=6)
    for layer in range(L):
        attention(model, layer).o_proj.weight.data.zero_()  # no head is read ...
    columns = slice(2 * D_H, 3 * D_H)
    attention(model, 1).o_proj.weight.data[:, columns].normal_()  # ... but head 2 of layer 1,
    attention(model, 1).v_proj.weight.data[columns].zero_()  # whose base value is zero
    scores = score_heads(model, [EARLY], probe=probe)
    assert scores.nonzero().tolist() == [[1, 2]]
    assert select_heads(scores, 1) == {1: [2]}


@pytest.mark.parametrize("num_heads", [1, 7, 13, 20])
def test_as_many_heads_are_selected_as_were_asked_for_the_best_of_each_layer(num_heads):
    torch.manual_seed(0)
    scores = torch.rand(5, 4) ** 8
    heads = select_heads(scores, num_heads)
    assert sum(len(selected) for selected in heads.values()) == num_heads
    for layer, selected in heads.items():
        best = scores[layer].argsort(descending=True)[: len(selected)]
        assert selected == sorted(best.tolist())


SHARES = [  # influence of each layer, heads per layer, heads in all, tau, heads that each layer gets
    ([9, 1], 6, 4, 0.5, {0: 3, 1: 1}),  # by the roots of 9 and 1
    ([6, 2, 0], 8, 6, 0, {0: 2, 1: 2, 2: 2}),  # evenly
    ([2, 6, 4], 8, 2, 0, {1: 1, 2: 1}),  # evenly, and where that is not possible to the layers with more influence
    ([6, 2, 0], 8, 8, 1, {0: 6, 1: 2}),  # in proportion
    ([6, 2, 0], 8, 10, 20, {0: 8, 1: 2}),  # the best layer is filled first
    ([0, 6, 2], 2, 5, 1, {0: 1, 1: 2, 2: 2}),  # a layer without influence comes last
    ([46, 34, 20], 7, 7, 1, {0: 3, 1: 3, 2: 1}),  # by Sainte-Lague; d'Hondt's method would give 4, 2, 1
]


@pytest.mark.parametrize("influence, heads_a_layer, num_heads, tau, expected", SHARES)
def test_the_layers_share_the_heads_by_their_influence_to_the_power_of_tau(
    influence, heads_a_layer, num_heads, tau, expected
):
    scores = torch.tensor(influence)[:, None].float().expand(-1, heads_a_layer) / heads_a_layer
    selected = select_heads(scores, num_heads, tau)
    assert {layer: len(heads) for layer, heads in selected.items()} == expected


# 6. The cost
def counted_flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("heads", [None, {0: [1]}, {1: [0, 2], 2: [1]}])
def test_counted_flops_match_the_formula(heads):
    """Forward 2Nr(D + |S|d_h), backward dB, dz, dA, and dx in all adapted layers but the lowest; N visual tokens."""
    model = tiny_vlm()
    batch = prompt(BEFORE + IMAGE + AFTER, AFTER + IMAGE + BEFORE, labels=True)
    adapter = attach_trained(model, r=5, heads=heads)

    def step():
        model(**batch).loss.backward()

    with_adapter = counted_flops(step)
    with adapter.disabled():
        without_adapter = counted_flops(step)
    assert image_lora_flops(2 * P, D, D_H, adapter.heads, r=5) == with_adapter - without_adapter
