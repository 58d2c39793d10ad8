"""The base model: its file, the device that it computes on, and what its vision tower makes of screens.

Shapes:  N screens · P visual tokens of each · D hidden size
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.screens import Screen, draw_screen
from tiny_vlm import TinyVLM

ROOT = Path(__file__).parent.parent
CHUNK = 256  # screens or prompts that run at once where nothing is learned


def find_device(name: str) -> str:
    """The device of this name; "auto" is the accelerator if there is one. ValueError if there is no such device."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [accelerator.type, "cpu"] if accelerator else ["cpu"]
    if name == "auto":
        return devices[0]
    if name not in devices:
        raise ValueError(f"there is no device {name} here; expected one of auto, {', '.join(devices)}")
    return name


def file_path(base: str) -> Path:
    """A file's path from the current directory or, if it exists only there, from the project's."""
    if not Path(base).exists() and (ROOT / base).exists():
        return ROOT / base
    return Path(base)


def load_base(base: str, device="cpu") -> TinyVLM:
    """The model in this file, see `file_path`. ValueError if it holds none."""
    return TinyVLM.from_pretrained(file_path(base)).to(device)


def pixel_values(screens: list[Screen]) -> Tensor:
    """The pictures of screens, [N, 3, side, side] in 0..1."""
    images = torch.from_numpy(np.stack([screen.image for screen in screens]))
    return images.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def image_features(encoder, screens: list[Screen], device="cpu") -> Tensor:
    """What a vision encoder makes of screens, [N, P, D]."""
    features = []
    for start in range(0, len(screens), CHUNK):
        pixels = pixel_values(screens[start : start + CHUNK])
        features.append(encoder(pixels.to(device)))
    return torch.cat(features)


def screens_and_features(model: TinyVLM, domain: str, split: str, count: int, erased=False) -> tuple[list, Tensor]:
    """(The first screens of a split, what the model's vision tower and projector make of them [N, P, D])."""
    screens = [draw_screen(domain, split, i, erased=erased) for i in range(count)]
    return screens, image_features(model.get_image_features, screens, model.device)
