"""A tiny vision-language model from scratch: ViT + projector + GPT, with Hugging Face's module and argument names.

    pixel_values ── vision_tower (ViT) ── multi_modal_projector ──┐ visual embeddings
    input_ids ───── embed_tokens ── placeholders replaced by them ┴─ language_model (GPT) ── logits

An image is a run of `config.image_token_id` placeholders in `input_ids`, as in most Hugging Face VLMs, one per patch.

Shapes: B batch · T tokens · N images · P patches · D hidden size · H value, H_q query heads · d their size · V words
"""

import zipfile
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyVLMConfig:
    """Architecture of a TinyVLM; fields are named as in Hugging Face configs. Sizes in pixels, tokens or features."""

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
        for whole, part in (
            ("image_size", "patch_size"),  # or the picture's edge would not be seen
            ("vision_hidden_size", "vision_num_attention_heads"),
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}")

    @property
    def num_patches(self) -> int:
        """Visual tokens an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass
class KVCache:
    """Keys and values of all tokens so far, a pair [B, H, T, d] per layer, and the text tokens so far [B]."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    text_length: Tensor | None = None


@dataclass
class TinyVLMOutput:
    logits: Tensor  # [B, T, V]
    loss: Tensor | None = None  # scalar
    past_key_values: KVCache | None = None


def rotate(x, angles: Tensor) -> Tensor:
    """Rotary embedding: pairs (x_i, x_{i + d/2}) of x [B, H or H_q, T, d], turned by their angles [B, 1, T, d/2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
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
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H_q or H, T, d]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        groups = q.shape[1] // k.shape[1]  # query heads that share a key/value head
        keys, values = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal and mask is None)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (k, v)  # [B, T, D]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention, x + MLP. [B, T, D] -> [B, T, D]"""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.self_attn = Attention(hidden_size, num_heads, num_kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=1e-6)
        wide = 4 * hidden_size
        self.mlp = nn.Sequential(nn.Linear(hidden_size, wide), nn.GELU(), nn.Linear(wide, hidden_size))

    def forward(self, x: Tensor, angles=None, mask=None, past=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, present = self.self_attn(self.input_layernorm(x), angles, mask, self.causal, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), present


class VisionTransformer(nn.Module):
    """Images [N, 3, S, S] with values in 0..1 -> patch features [N, P, D_vision]; patches in raster order."""

    def __init__(self, config: TinyVLMConfig):
        super().__init__()
        d, side = config.vision_hidden_size, config.image_size // config.patch_size
        self.image_size = config.image_size
        self.patch_embedding = nn.Conv2d(3, d, config.patch_size, stride=config.patch_size)
        self.row_embedding = nn.Parameter(torch.randn(side, 1, d) * 0.3)
        self.column_embedding = nn.Parameter(torch.randn(1, side, d) * 0.3)
        heads, layers = config.vision_num_attention_heads, range(config.vision_num_hidden_layers)
        self.layers = nn.ModuleList(Block(d, heads, heads, causal=False) for _ in layers)
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
        d, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        half = d // heads // 2
        self.register_buffer("frequencies", config.rope_theta ** -(torch.arange(half) / half), persistent=False)
        self.layers = nn.ModuleList(Block(d, heads, kv_heads, causal=True) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(d, eps=1e-6)

    def forward(self, x: Tensor, positions: Tensor, mask=None, past: KVCache | None = None) -> tuple[Tensor, list]:
        angles = (positions[..., None] * self.frequencies)[:, None]  # [B, 1, T, d/2]
        presents = []
        for i, layer in enumerate(self.layers):
            x, present = layer(x, angles, mask, past.layers[i] if past else None)
            presents.append(present)
        return self.norm(x), presents


class TinyVLM(nn.Module):
    """The model. `forward` returns a TinyVLMOutput; `generate` decodes greedily."""

    logit_scale = 0.3  # tied embeddings have standard deviation 0.3, hidden states 1

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
        """The model in the file {"config", "state"}, float32, for evaluation. ValueError where the file holds none."""
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load itself would not notice a flipped bit
            if damaged:
                raise ValueError(f"its part {damaged} is damaged")
            content = torch.load(path, map_location="cpu", weights_only=True)
            model = cls(TinyVLMConfig(**content["config"]))
            model.load_state_dict(content["state"])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ValueError(f"{path} is not a saved TinyVLM ({reason})") from None
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
        """input_ids [B, T], with P placeholders for each image, images in row-major order of their placeholders.
        pixel_values [N, 3, S, S] in 0..1, or image_features [N, P, D], what `get_image_features` made of them.
        labels [B, T], -100 where nothing is to be predicted: `loss` is the mean cross-entropy of next tokens.
        attention_mask [B, T_past + T], 0 for padding on either side; default: no padding.
        past_key_values: the KVCache of the tokens before these.
        Raises ValueError where placeholders and images do not match.
        """
        visual = input_ids == self.config.image_token_id  # [B, T]
        text = ~visual if attention_mask is None else ~visual & attention_mask[:, -input_ids.shape[1] :].bool()
        # Positions count text tokens only: a question's positions do not depend on the images before it.
        seen = past_key_values.text_length if past_key_values else text.new_zeros(len(text), dtype=torch.long)  # [B]
        positions = (seen[:, None] + text.cumsum(1) - 1).clamp(min=0)  # [B, T]
        lm = self.language_model
        x = lm.embed_tokens(input_ids)  # [B, T, D]
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values)  # [N, P, D]
        given = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        asked, patches = int(visual.sum()), self.config.num_patches
        if asked != given:
            raise ValueError(f"{asked} image placeholder tokens for {given // patches} images; each needs {patches}")
        if given:
            x = x.masked_scatter(visual[..., None], image_features.to(x.dtype))
        mask = self._attention_mask(attention_mask, past_key_values, input_ids)
        x, presents = lm(x, positions, mask, past_key_values)
        logits = x @ lm.embed_tokens.weight.T * self.logit_scale  # [B, T, V]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return TinyVLMOutput(logits, loss, KVCache(presents, seen + text.sum(1)))

    def _attention_mask(self, attention_mask: Tensor | None, past: KVCache | None, input_ids: Tensor) -> Tensor | None:
        """[B or 1, 1, T, T_past + T] bool, True where a query may look; None where plain causal attention is right."""
        new = input_ids.shape[1]
        total = new + (past.layers[0][0].shape[2] if past else 0)
        if attention_mask is None and total == new:
            return None
        causal = torch.ones(new, total, dtype=torch.bool, device=input_ids.device).tril(total - new)[None, None]
        if attention_mask is not None:
            itself = torch.eye(total, dtype=torch.bool, device=input_ids.device)[-new:]  # or padding would see nothing
            causal = causal & (attention_mask[:, None, None, :].bool() | itself)
        return causal

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

        Raises ValueError on right padding, whose last token would not be the prompt's.
        """
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("generate needs prompts padded on the left; attention_mask ends with 0 in some row")
        ids, done, cache = input_ids, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device), None
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        for _ in range(max_new_tokens):
            new = ids[:, -1:] if cache else ids
            images = None if cache else image_features  # they are in the cache
            out = self(new, attention_mask=attention_mask, past_key_values=cache, image_features=images)
            cache = out.past_key_values if use_cache else None
            out.logits[:, -1, self.config.image_token_id] = -torch.inf  # a placeholder is no answer
            token = out.logits[:, -1].argmax(-1).masked_fill(done, self.config.pad_token_id)  # [B]
            ids = torch.cat([ids, token[:, None]], dim=1)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, 1), value=1)
            done = done | (token == self.config.eos_token_id)
            if done.all():
                break
        return ids
