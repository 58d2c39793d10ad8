"""Where the heads of a tiny model look, and how much of that is the image.

Shapes:  L layers · B sequences · H value, H_q query heads · T tokens · d_h their size · P visual tokens
"""

import torch
from torch import Tensor

from data.prompts import prompt_batch
from tiny_vlm import rotate


@torch.no_grad()
def queries_keys_values(model, prompt: dict) -> tuple[Tensor, Tensor, Tensor]:
    """What all layers make of a prompt: rotated queries [L, B, H_q, T, d_h] and keys, and values [L, B, H, T, d_h]."""
    queries = []

    def keep_queries(attention, arguments):
        x, angles, *_ = arguments
        queries.append(rotate(attention.split_heads(attention.q_proj(x)), angles))

    hooks = [layer.self_attn.register_forward_pre_hook(keep_queries) for layer in model.language_model.layers]
    keys, values = zip(*model(**prompt).past_key_values.layers)
    for hook in hooks:
        hook.remove()
    return torch.stack(queries), torch.stack(keys), torch.stack(values)


def attention_weights(queries: Tensor, keys: Tensor, first: int) -> Tensor:
    """How much each token from number `first` on looks at each token, [..., H_q, T - first, T]. Nothing is padded."""
    keys = keys.repeat_interleave(queries.shape[-3] // keys.shape[-3], dim=-3)  # [..., H_q, T, d_h]
    scores = queries[..., first:, :] @ keys.mT / queries.shape[-1] ** 0.5  # [..., H_q, T - first, T]
    later = torch.ones_like(scores, dtype=torch.bool).triu(first + 1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def image_share(model, samples: list[dict], features: Tensor, num_problems=0) -> list[float]:
    """The share of attention that goes to the image from the tokens after it, in each layer: a mean over heads, tokens
    and samples, each asked after `num_problems` word problems and its image [B, P, D]."""
    shares = []
    for sample, image in zip(samples, features):
        prompt = prompt_batch([sample], image[None], num_problems)
        queries, keys, _ = queries_keys_values(model, prompt)
        is_visual = prompt["input_ids"][0] == model.config.image_token_id
        after_image = int(is_visual.nonzero().max()) + 1
        weights = attention_weights(queries, keys, after_image)  # [L, 1, H_q, T - after_image, T]
        shares.append(weights[..., is_visual].sum(-1).mean((1, 2, 3)))  # [L]
    return torch.stack(shares).mean(0).tolist()
