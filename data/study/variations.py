"""What the study varies in the runs of train.py beyond its options: tasks, sequences, text, heads, replay."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

import imagelora
import train
from data import prompts
from data.base import screens_and_features
from data.questions import KINDS, random_samples
from data.replay import ReplayData, make_replay_data
from imagelora import Heads

TASKS = {"grounding": "click", "referring": "what_is_at"}  # {task: the kind of question that it asks}
PACKED = 8, 5  # screens of a step, and questions about each, which share a sequence


@dataclass
class Config(train.Config):
    """The fields are those of data/study/plan.py. No other has to be refused."""

    heads: str = "top"  # the most influential; "random": as many in each layer; "all"; or a list, such as 1.3,2.0
    num_heads: int = 12  # unless heads is "all" or a list
    train_gamma: bool = False
    task: str = "grounding"  # one of TASKS: name -> point, or point -> name
    packed: bool = False
    vary_text: bool = False  # 0 to `text` word problems, a number drawn anew for each step
    replay_answers: str = "own"  # or "correct"
    replay_screens: str = "new"  # or "old"
    replay_no_switch: bool = False  # ask nothing whose correct answer is "switch", a new word
    test_screens: int = 100

    def __post_init__(self):
        pass


def training_batch(cfg: Config, data: tuple, index: int, replay_data: ReplayData | None = None) -> dict:
    """As data.prompts.training_batch. There is no replay with `packed`, and none of other tasks."""
    if cfg.packed or cfg.task == "referring":
        screens, features = data
        num_screens, num_questions = PACKED if cfg.packed else (prompts.SCREENS_PER_STEP, 1)
        rng = np.random.default_rng([cfg.seed, index])
        picks = rng.choice(len(screens), num_screens, replace=False)
        refer = float(cfg.task == "referring")
        samples = [random_samples(screens[pick], num_questions, rng, refer, distinct=True) for pick in picks]
        features = features[picks]
    else:
        samples, features = prompts.training_samples(cfg.seed, index, data, replay_data, cfg.replay, cfg.hint)
    num_problems = cfg.text
    if cfg.vary_text:
        num_problems = np.random.default_rng([cfg.seed, index, 1]).integers(cfg.text, endpoint=True)
    return prompts.batch_after_text(samples, features, index, num_problems, cfg.text)


def correct_answers(model, samples: list[dict], features) -> list[str]:
    return [sample["answer"] for sample in samples]


def make_replay(cfg: Config, model, data: tuple) -> ReplayData | None:
    """Own or correct answers about the screens of training, or about as many old ones, also in the new task's words."""
    if not cfg.replay:
        return None
    options = {"no_switch": cfg.replay_no_switch}
    if cfg.replay_answers == "correct":
        options["answer"] = correct_answers
    if cfg.replay_screens == "old":
        screens, _ = data
        data = screens_and_features(model, "old", "train", len(screens))
        options["kinds"] = KINDS
    return make_replay_data(model, data, cfg.seed, **options)


def choose_heads(cfg: Config, model, data: tuple) -> Heads:
    """Those of cfg.heads; the probe reads the first batches of data."""
    num_layers, heads_in_layer = model.config.num_hidden_layers, model.config.num_key_value_heads
    if cfg.heads == "all":
        return {layer: list(range(heads_in_layer)) for layer in range(num_layers)}
    selected = {}
    if "." in cfg.heads:
        for item in cfg.heads.split(","):
            layer, head = map(int, item.split("."))
            selected.setdefault(layer, []).append(head)
        return selected
    batches = [training_batch(cfg, data, i) for i in range(prompts.PROBE_BATCHES)]
    rng = np.random.default_rng(cfg.seed)
    scores = imagelora.score_heads(model, batches, seed=cfg.seed)
    for layer, heads in imagelora.select_heads(scores, cfg.num_heads).items():
        random = rng.permutation(heads_in_layer)[: len(heads)].tolist()
        selected[layer] = sorted(random) if cfg.heads == "random" else heads
    return selected


def fine_tune(cfg: Config, model, data: tuple, replay_data: ReplayData | None) -> nn.Module:
    """The adapter, trained as train.py trains it; a module without parameters for "none"."""
    if cfg.method == "none":
        model.requires_grad_(False)
        return nn.Module()
    heads = choose_heads(cfg, model, data) if cfg.method == "image_lora" else None
    adapter = train.attach_adapter(cfg, model, heads)
    if cfg.train_gamma:
        for layer in adapter.layers.values():
            layer.gamma.requires_grad_(True)
    train.train(cfg, model, adapter, partial(training_batch, cfg, data, replay_data=replay_data))
    return adapter
