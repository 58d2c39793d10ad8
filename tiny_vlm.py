"""A tiny vision-language model from scratch: ViT + projector + GPT, with Hugging Face's module and argument names.

    pixel_values ── vision_tower (ViT) ── multi_modal_projector ──┐ visual embeddings
    input_ids ───── embed_tokens ── placeholders replaced by them ┴─ language_model (GPT) ── logits

An image is a run of `config.image_token_id` placeholders in `input_ids`, as in most Hugging Face VLMs, one per patch.

Shapes: B batch · T tokens · N images · P patches · D hidden size · H value, H_q query heads · d their size · V words
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyVLMConfig:
    """Architecture of a TinyVLM; fields are named as in Hugging Face configs. Sizes in pixels, tokens or features.

    ValueError if image_size is not a multiple of patch_size."""

    vocab_size: int = 143
    image_token_id: int = 3
    pad_token_id: int = 0
    eos_token_id: int = 2
    image_size: int = 128
    patch_size: int = 16
    vision_hidden_size: int = 96
    vision_num_hidden_layers: int = 3
    vision_num_attention_heads: int = 6
    hidden_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    rope_theta: int = 10000

    def __post_init__(self):
        if self.image_size % self.patch_size:  # no patch would show the picture's right and bottom edges
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def num_patches(self) -> int:
        """Visual tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass
class KVCache:
    """Keys and values of all tokens so far, a pair [B, H, T, d] for each layer; and how many were text tokens [B]."""

    layers: list[tuple[Tensor, Tensor]]
    num_text_tokens: Tensor


@dataclass
class TinyVLMOutput:
    logits: Tensor  # [B, T, V]
    loss: Tensor | None = None  # scalar
    past_key_values: KVCache | None = None  # None if there are labels, because nothing is decoded then


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: turns the pairs (x_i, x_{i + d/2}) of x [B, H or H_q, T, d] by their angles [B, 1, T, d/2]."""
    a, b = x.chunk(2, dim=-1)
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (H <= H_q heads), separate q, k, v, o projections, no bias."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, angles=None, mask=None, causal=False, past=None) -> tuple[Tensor, tuple]:
        """x [B, T, D] -> attention's output [B, T, D], and the keys and values of all tokens so far.

        past: keys and values of the tokens before these. mask: bool, True where a query may look."""
        q = self.split_heads(self.q_proj(x))  # [B, H_q, T, d]
        k = self.split_heads(self.k_proj(x))  # [B, H, T, d]
        v = self.split_heads(self.v_proj(x))  # [B, H, T, d]
        if angles is not None:
            q = rotate(q, angles)
            k = rotate(k, angles)
        if past is not None:
            past_k, past_v = past
            k = torch.cat([past_k, k], dim=2)
            v = torch.cat([past_v, v], dim=2)
        group_size = q.shape[1] // k.shape[1]  # query heads that share a key and value head
        keys = k.repeat_interleave(group_size, dim=1)  # [B, H_q, T, d]
        values = v.repeat_interleave(group_size, dim=1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal and mask is None)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (k, v)  # [B, T, D]

    def split_heads(self, features: Tensor) -> Tensor:
        """[B, T, heads * d] -> [B, heads, T, d]"""
        return features.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention, then x + MLP. [B, T, D] -> [B, T, D]"""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.self_attn = Attention(hidden_size, num_heads, num_kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=1e-6)
        mlp_size = 4 * hidden_size
        self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp_size), nn.GELU(), nn.Linear(mlp_size, hidden_size))

    def forward(self, x: Tensor, angles=None, mask=None, past=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, keys_values = self.self_attn(self.input_layernorm(x), angles, mask, self.causal, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


class VisionTransformer(nn.Module):
    """Images [N, 3, S, S] with values in 0..1 -> patch features [N, P, D_vision]; patches in raster order."""

    def __init__(self, config: TinyVLMConfig):
        super().__init__()
        d = config.vision_hidden_size
        side = config.image_size // config.patch_size  # patches in a row
        self.image_size = config.image_size
        self.patch_embedding = nn.Conv2d(3, d, config.patch_size, stride=config.patch_size)
        self.row_embedding = nn.Parameter(torch.randn(side, 1, d) * 0.3)
        self.column_embedding = nn.Parameter(torch.randn(1, side, d) * 0.3)
        heads = config.vision_num_attention_heads
        blocks = [Block(d, heads, heads, causal=False) for _ in range(config.vision_num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(d, eps=1e-6)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, self.image_size, self.image_size):
            expected = f"[images, 3, {self.image_size}, {self.image_size}]"
            raise ValueError(f"pixel_values must have shape {expected}, got {list(pixel_values.shape)}")
        x = self.patch_embedding(pixel_values * 2 - 1)  # [N, D_vision, side, side]
        x = (x.permute(0, 2, 3, 1) + self.row_embedding + self.column_embedding).flatten(1, 2)  # [N, P, D_vision]
        for layer in self.layers:
            x, _ = layer(x)
        return self.norm(x)


class LanguageModel(nn.Module):
    """GPT over embeddings [B, T, D] and their positions [B, T] -> normalized hidden states [B, T, D]."""

    def __init__(self, config: TinyVLMConfig):
        super().__init__()
        d = config.hidden_size
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        num_pairs = d // heads // 2  # pairs of features that the rotary embedding turns
        frequencies = config.rope_theta ** -(torch.arange(num_pairs) / num_pairs)
        self.register_buffer("frequencies", frequencies, persistent=False)
        blocks = [Block(d, heads, kv_heads, causal=True) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(d, eps=1e-6)

    def forward(self, x: Tensor, positions: Tensor, mask=None, past: KVCache | None = None) -> tuple[Tensor, list]:
        angles = (positions[..., None] * self.frequencies)[:, None]  # [B, 1, T, d/2]
        keys_values = []
        for i, layer in enumerate(self.layers):
            x, keys_values_of_layer = layer(x, angles, mask, past.layers[i] if past else None)
            keys_values.append(keys_values_of_layer)
        return self.norm(x), keys_values


class TinyVLM(nn.Module):
    """The model. `forward` returns a TinyVLMOutput; `generate` decodes greedily."""

    logit_scale = 0.3  # the tied embeddings start with standard deviation 0.3, hidden states have 1

    def __init__(self, config: TinyVLMConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTransformer(config)
        self.multi_modal_projector = nn.Linear(config.vision_hidden_size, config.hidden_size)
        self.language_model = LanguageModel(config)
        for name, parameter in self.named_parameters():
            if name.endswith("embed_tokens.weight"):
                nn.init.normal_(parameter, std=0.3)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    @classmethod
    def from_pretrained(cls, path) -> "TinyVLM":
        """The model in a file of {"config", "state"}, float32, for evaluation. ValueError if the file holds none."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            model = cls(TinyVLMConfig(**content["config"]))
            model.load_state_dict(content["state"])
        except Exception as error:
            raise ValueError(f"{path} is missing, damaged or not a saved TinyVLM ({type(error).__name__})") from error
        return model.eval()

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] in 0..1 -> visual embeddings [N, P, D]. Raises ValueError on another image size."""
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        image_features: Tensor | None = None,
    ) -> TinyVLMOutput:
        """The logits of the next token at every position and, if there are labels, the loss.

        input_ids [B, T], with P placeholders for each image, images in row-major order of their placeholders.
        pixel_values [N, 3, S, S] in 0..1, or image_features [N, P, D], what `get_image_features` made of them.
        labels [B, T], -100 where nothing is to be predicted: `loss` is the mean cross-entropy of next tokens.
        attention_mask [B, T_past + T], 0 for padding on either side; default: no padding.
        past_key_values: the KVCache of the tokens before these. ValueError if placeholders and images do not match."""
        visual = input_ids == self.config.image_token_id  # [B, T]
        text = ~visual
        if attention_mask is not None:
            text = text & attention_mask[:, -input_ids.shape[1] :].bool()  # padding is not text
        # Positions count text tokens only, so a question's positions do not depend on the images before it. All patches
        # of an image share one position, that of the text before it: where a patch is in the image, it knows from the
        # vision tower's row and column embeddings.
        num_past = text.new_zeros(len(text), dtype=torch.long)  # text tokens so far, [B]
        if past_key_values:
            num_past = past_key_values.num_text_tokens
        positions = (num_past[:, None] + text.cumsum(1) - 1).clamp(min=0)  # [B, T]

        lm = self.language_model
        x = lm.embed_tokens(input_ids)  # [B, T, D]
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values)  # [N, P, D]
        num_features = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        num_placeholders = int(visual.sum())
        if num_placeholders != num_features:
            patches = self.config.num_patches
            images = num_features // patches
            raise ValueError(f"{num_placeholders} image placeholder tokens for {images} images; each needs {patches}")
        if num_features:
            x = x.masked_scatter(visual[..., None], image_features.to(x.dtype))

        mask = self._attention_mask(attention_mask, past_key_values, input_ids)
        x, keys_values = lm(x, positions, mask, past_key_values)
        logits = x @ lm.embed_tokens.weight.T * self.logit_scale  # [B, T, V]
        if labels is None:
            return TinyVLMOutput(logits, past_key_values=KVCache(keys_values, num_past + text.sum(1)))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return TinyVLMOutput(logits, loss)

    def _attention_mask(self, attention_mask: Tensor | None, past: KVCache | None, input_ids: Tensor) -> Tensor | None:
        """[B or 1, 1, T, T_past + T] bool, True where a query may look; None where plain causal attention will do."""
        num_new = input_ids.shape[1]
        num_past = 0
        if past:
            keys, _ = past.layers[0]
            num_past = keys.shape[2]
        if attention_mask is None and not num_past:
            return None
        total = num_past + num_new
        causal = torch.ones(num_new, total, dtype=torch.bool, device=input_ids.device).tril(num_past)[None, None]
        if attention_mask is None:
            return causal
        # A padding token looks at itself, because a softmax over nothing would be nan.
        itself = torch.eye(total, dtype=torch.bool, device=input_ids.device)[-num_new:]
        return causal & (attention_mask[:, None, None, :].bool() | itself)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        max_new_tokens: int = 8,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Greedy decoding: input_ids [B, T] (padded on the left, if at all) -> [B, T + new], pad after <eos>.

        Raises ValueError on right padding, because the last token would not be the prompt's.
        """
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("generate needs prompts padded on the left; attention_mask ends with 0 in some row")
        ids = input_ids
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        cache = None
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        for _ in range(max_new_tokens):
            if cache:
                output = self(ids[:, -1:], attention_mask=attention_mask, past_key_values=cache)
            else:
                output = self(ids, attention_mask=attention_mask, image_features=image_features)
            if use_cache:
                cache = output.past_key_values
            logits = output.logits[:, -1]  # [B, V]
            logits[:, self.config.image_token_id] = -torch.inf  # a placeholder is not an answer
            token = logits.argmax(-1).masked_fill(done, self.config.pad_token_id)  # [B]
            ids = torch.cat([ids, token[:, None]], dim=1)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, 1), value=1)
            done = done | (token == self.config.eos_token_id)
            if done.all():
                break
        return ids
