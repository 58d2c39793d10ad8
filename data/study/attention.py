"""For runs.py and figures.py: where the heads of a tiny model look, and how much of that is the image.

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


def image_share(model, samples: list[dict], features: Tensor, num_problems=0) -> list[float]:
    """The share of attention that goes to the image from the tokens after it, in each layer: a mean over heads, tokens
    and samples, each asked after `num_problems` word problems and its image [B, P, D]."""
    shares = []
    for sample, image in zip(samples, features):
        prompt = prompt_batch([sample], image[None], num_problems)
        queries, keys, _ = queries_keys_values(model, prompt)
        keys = keys.repeat_interleave(queries.shape[2] // keys.shape[2], dim=2)  # [L, 1, H_q, T, d_h]
        is_visual = prompt["input_ids"][0] == model.config.image_token_id
        after_image = int(is_visual.nonzero().max()) + 1
        scores = queries[..., after_image:, :] @ keys.mT / queries.shape[-1] ** 0.5  # [L, 1, H_q, T - after_image, T]
        later = torch.ones_like(scores, dtype=torch.bool).triu(after_image + 1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        shares.append(weights[..., is_visual].sum(-1).mean((1, 2, 3)))  # [L]
    return torch.stack(shares).mean(0).tolist()
