"""Fine-tune the tiny VLM with Image-LoRA on a new kind of screen, and see what that changes and what it cannot.

python train.py                  measure, probe, select, attach, train, turn down, measure again: a minute or so
python train.py --method lora    the same with standard LoRA (q, k, v, o, all tokens)

Image-LoRA is imagelora.py, and its rivals are in data/rivals.py. The questions and the batches that are made of them
are in data/questions.py and data/prompts.py, replay in data/replay.py, the measures in data/evaluate.py, and what
turning down does in data/gamma.py.

python -m data.costs             what LoRA and Image-LoRA cost at the scale of real models
python -m data.study.compare     the tables of the pages: every method on several base models

Shapes:  B sequences · T tokens · N screens · P patches, the visual tokens of a screen · D hidden size
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

# A thread that waits for others soon goes to sleep instead of spinning. Torch reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor, nn
from tqdm import tqdm

import imagelora
from data import costs, evaluate, pictures, prompts, questions, replay, rivals
from data.base import find_device, load_base, screens_and_features
from data.command import command, make_directory, option, write_file
from data.gamma import measure_curve, smallest_gamma, turn_down
from data.heads import check_heads, choose_heads
from tiny_vlm import TinyVLM

# Validation screens of three tiny models chose these rates: Image-LoRA's in all heads, the others' on q, k, v and o
# (data/study/README.md).
RATES = {"image_lora": 0.01, "lora": 0.0025, "partial_lora": 0.00125, "none": 0.0}
FILES = ("adapter.pt", "predictions.png", "metrics.json")  # what a run can leave in OUT


@dataclass
class Config:
    """One fine-tuning run. Each field is an option of the command line, too."""

    method: str = option(
        "image_lora",
        "partial_lora is LoRA at visual tokens only; none measures the frozen model",
        ("image_lora", "lora", "partial_lora", "none"),
    )
    projections: str = option("qkvo", "which of q, k, v and o all methods but image_lora adapt", ("qkvo", "qk", "v"))
    task: str = option("grounding", "grounding: name -> point; referring: point -> name", ("grounding", "referring"))
    base: str = option("data/tiny_vlm.pt", "the model to fine-tune, made by data.study.pretrain")
    heads: str = option(
        "top",
        "top: the most influential by the probe; random: as many in each layer as top takes, but any; all;\n"
        "or a list of layer.head, such as 1.3,2.0",
    )
    num_heads: int = option(12, "number of value heads to adapt, unless heads is all or a list", minimum=1)
    r: int = option(8, "rank; alpha is 2 r", minimum=1)
    gamma: float = option(1.0, "what the update is multiplied by after training, to turn it down", minimum=0)
    train_gamma: bool = option(False, "image_lora also trains gamma, as in the paper")
    no_normalize: bool = option(False, "image_lora without selection-size normalization, the factor 1/sqrt|S|")
    lr: float | None = option(None, f"AdamW's peak rate; None: the method's own, of {RATES}", minimum=0)
    steps: int = option(500, "training steps", minimum=1)
    text: int = option(0, "word problems before each screen: longer text, same image", minimum=0)
    vary_text: bool = option(False, "train with 0 to --text word problems, a number drawn anew for each step")
    hint: str = option(
        "none",
        "where the correct place stands in training: question: <x3> <y5> click wifi; or before_image",
        ("none", *questions.HINTS),
    )
    packed: bool = option(False, "a step has 8 sequences of five questions about a screen, instead of 16 of one")
    replay: int = option(0, "how many sequences of a step hold other questions or word problems", minimum=0)
    replay_answers: str = option("own", "whose answers: the base model's own, or correct ones", ("own", "correct"))
    replay_screens: str = option("new", "about which screens replay asks", ("new", "old"))
    replay_no_switch: bool = option(False, "replay asks nothing whose correct answer is 'switch', a new word")
    test_screens: int = option(100, "new screens that a model is tested on, and about half as many old ones", minimum=1)
    seed: int = option(1, "seed for the order of the data, the adapter's initial A, and the probe", minimum=0)
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")
    out: str = option("runs/switches", "output directory")

    def __post_init__(self):
        sequences = prompts.PACKED[0] if self.packed else prompts.SCREENS_PER_STEP
        if self.replay > sequences:
            raise ValueError(f"replay must be at most {sequences}, the sequences of a step")
        requirements = [  # (options, what they do nothing without, whether this run has it)
            (["projections"], "--method lora or partial_lora", self.method in ("lora", "partial_lora")),
            (["heads", "train_gamma", "no_normalize"], "--method image_lora", self.method == "image_lora"),
            (["num_heads"], "--heads top or random", self.method == "image_lora" and self.heads in ("top", "random")),
            (["gamma", "replay", "hint", "packed"], "an adapter", self.method != "none"),
            (["hint"], "--task grounding", self.task == "grounding"),
            (["vary_text"], "--text", self.text > 0),
            (["replay_answers", "replay_screens", "replay_no_switch"], "--replay", self.replay > 0),
        ]
        for names, requirement, is_met in requirements:
            for name in names:
                if getattr(self, name) != getattr(type(self), name) and not is_met:
                    raise ValueError(f"--{name.replace('_', '-')} does nothing without {requirement}")
        if self.lr is None:
            self.lr = RATES[self.method]


# ---- One run: measure, select, attach, train, measure ----------------------------------------------------------------


class FinetuningRun(NamedTuple):
    result: dict  # the Config's fields and what was measured
    model: TinyVLM
    adapter: nn.Module | None
    base_answers: list[evaluate.Answer]
    answers: list[evaluate.Answer]


def run(cfg: Config) -> dict:
    """One run that writes no file and prints nothing. Returns the Config's fields and what was measured."""
    return finetune(cfg).result


def finetune(cfg: Config, verbose=False, after_step: Callable | None = None) -> FinetuningRun:
    """Measure the base, select heads, attach an adapter, train it, measure again. Writes no file.

    after_step(step, model), if given, is called after each training step."""
    start = time.time()
    model = load_base(cfg.base, find_device(cfg.device))
    if cfg.method == "image_lora":
        check_heads(model, cfg.heads, cfg.num_heads, cfg.r)

    # Screens, and what the frozen vision tower makes of them, [N, P, D]. So the tower never runs in training.
    num_train = min((prompts.PROBE_BATCHES + cfg.steps) * prompts.SCREENS_PER_STEP, prompts.TRAIN_SCREENS)
    train_data = screens_and_features(model, "new", "train", num_train)
    replay_data = make_replay(cfg, model, train_data)
    new_test = screens_and_features(model, "new", "test", cfg.test_screens)
    # An old screen has more targets, so half as many are enough.
    old_test = screens_and_features(model, "old", "test", cfg.test_screens // 2 + 1)

    # Before training, measure the new task on new screens; other questions and the new task's own words on old screens;
    # word problems; and the logits of prompts without an image.
    before, base_answers = evaluate.measure(model, new_test, old_test, cfg.task, cfg.text)
    base_logits = evaluate.text_only_logits(model)
    if verbose:
        print_base(cfg, model)
        print_metrics("before", cfg.task, before)
        if replay_data:
            print_replay(cfg, replay_data)

    # The probe: how much could each value head lower the loss? Then select heads.
    scores = heads = None
    if cfg.method == "image_lora":
        scores = probe(cfg, model, train_data)
        heads = choose_heads(cfg.heads, scores, cfg.num_heads, cfg.seed)
        if verbose:
            print_heads(scores, heads)

    # Attach the adapter and train it. Then turn its update down, and see what comes back.
    adapter = attach_adapter(cfg, model, heads)
    curve = []
    if adapter:
        train(cfg, model, adapter, train_data, replay_data, verbose, after_step)
        validation = screens_and_features(model, "new", "validation", cfg.test_screens // 2 + 1)
        curve = measure_curve(model, adapter, validation, old_test, cfg.task, cfg.text)
        turn_down(adapter, cfg.gamma)

    # Measure the same again, at the run's own gamma.
    after, answers = evaluate.measure(model, new_test, old_test, cfg.task, cfg.text)
    if cfg.hint != "none":
        after |= evaluate.measure_hints(model, new_test, cfg.hint)
    result = {**asdict(cfg), "selected": heads, "before": before, "curve": curve, **after}
    result["replay_answers_acc"] = replay_data.share_correct if replay_data else None
    result["text_logits_max_abs_diff"] = (evaluate.text_only_logits(model) - base_logits).abs().max().item()
    result |= costs.run_costs(cfg, model, prompts.training_batch(cfg, train_data, 0)["input_ids"], heads)
    result |= {"seconds": round(time.time() - start, 1), "device": model.device.type, "torch": torch.__version__}
    if verbose:
        if adapter:
            print_curve(curve)
        print_metrics("after", cfg.task, result)
        print_text(result["text_logits_max_abs_diff"])
    return FinetuningRun(result, model, adapter, base_answers, answers)


def make_replay(cfg: Config, model: TinyVLM, train_data: tuple) -> replay.ReplayData | None:
    """What replay asks about the screens of training, or about as many old ones, and the answers that it teaches."""
    if not cfg.replay:
        return None
    old_screens = cfg.replay_screens == "old"
    options = {"old_screens": old_screens, "no_switch": cfg.replay_no_switch, "task": cfg.task}
    return replay.make_replay_data(model, train_data, cfg.replay_answers, cfg.seed, **options)


def probe(cfg: Config, model: TinyVLM, train_data: tuple) -> Tensor:
    """How much each value head could lower the loss of the first batches, [layers, heads]."""
    batches = [prompts.training_batch(cfg, train_data, i) for i in range(prompts.PROBE_BATCHES)]
    return imagelora.score_heads(model, batches, seed=cfg.seed)


def attach_adapter(cfg: Config, model: TinyVLM, heads: imagelora.Heads | None) -> nn.Module | None:
    """Freeze the model and attach the adapter of the method. It starts at B = 0, as the base model."""
    torch.manual_seed(cfg.seed)  # so that A does not depend on the random numbers that were drawn before
    if cfg.method == "none":
        return None
    if cfg.method == "image_lora":
        return imagelora.attach(model, cfg.r, 2 * cfg.r, heads, not cfg.no_normalize, cfg.train_gamma)
    tokens = "visual" if cfg.method == "partial_lora" else "all"
    return rivals.LoRA(model, cfg.r, 2 * cfg.r, cfg.projections, tokens)


def train(
    cfg: Config, model: TinyVLM, adapter: nn.Module, train_data: tuple, replay_data, verbose=False, after_step=None
) -> None:
    """Train the adapter with AdamW. FloatingPointError if the loss is not finite.

    train_data: (screens, features [N, P, D]) of new screens. replay_data: a replay.ReplayData, or None."""
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    warm_up_steps = max(cfg.steps // 20, 1)
    on_gpu = model.device.type == "cuda"

    bar = tqdm(range(cfg.steps), "train", disable=not verbose)
    for step in bar:
        # The rate warms up over a twentieth of the steps, then decays to zero.
        lr = cfg.lr * min((step + 1) / warm_up_steps, 1 - step / cfg.steps)
        optimizer.param_groups[0]["lr"] = lr

        # A batch is 16 random screens with a question about each: input_ids and labels [B, T], the labels -100 except
        # on the answer, and image_features [B, P, D]. The first PROBE_BATCHES were the probe's.
        batch = prompts.training_batch(cfg, train_data, prompts.PROBE_BATCHES + step, replay_data)

        # The loss is the cross-entropy of the answers.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            output = model(**batch)
        loss = output.loss.item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}; try a smaller --lr than {cfg.lr}")

        # Gradients flow down to the lowest adapted layer, but only the adapter's parameters keep them and change.
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
        if after_step is not None:
            after_step(step + 1, model)


# ---- What is printed and saved ---------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    """One run, then the controls. Saves OUT/metrics.json, an Image-LoRA as adapter.pt, pictures of clicks."""
    out = Path(cfg.out)
    make_directory(out)
    tuned = finetune(cfg, verbose=True)
    result = tuned.result
    if cfg.task == "grounding":
        result = result | evaluate.measure_controls(cfg, tuned.model)
        reworded = f"base, asked to click right of the name {result['reworded_acc']:.1%}"
        print(f"controls {reworded} · tuned, switches erased {result['erased_acc']:.1%}")
    if tuned.adapter:
        print_costs(result)

    for name in FILES:
        (out / name).unlink(missing_ok=True)  # Delete those of an earlier run, so that all of them are of the same run.
    if cfg.method == "image_lora":
        tuned.adapter.save(out / "adapter.pt")
    if cfg.task == "grounding":
        pictures.save([pictures.predictions(tuned.base_answers, tuned.answers)], out / "predictions.png")
    write_file(out / "metrics.json", json.dumps(result, indent=1).encode())
    saved = [name for name in FILES if (out / name).exists()]
    print(f"saved    {' '.join(saved)} in {out}/")


def print_base(cfg: Config, model: TinyVLM) -> None:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{num_parameters / 1e6:.2f} M parameters · {model.config.num_patches} visual tokens a screen"
    print(f"base     {Path(cfg.base).name} · {size} · {model.device}")


def print_metrics(when: str, task: str, metrics: dict) -> None:
    """The measures of data/evaluate.py."""
    done = "clicked" if task == "grounding" else "named"
    what_is_at = f"what is at {metrics['what_is_at_acc']:.1%}"
    right_of = f"what is right of {metrics['what_is_right_of_acc']:.1%}"
    click_right_of = f"click right of {metrics['click_right_of_acc']:.1%}"
    print(f"{when:8} new task        {metrics['task_acc']:6.1%} of the switches {done}")
    print(f"         other questions {metrics['other_questions_acc']:6.1%}: {what_is_at}, {right_of}, {click_right_of}")
    print(f"         same words      {metrics['same_words_acc']:6.1%} of the names clicked where there are no switches")
    after_image = f"after an image {metrics['word_problem_after_image_acc']:.1%}"
    print(f"         word problems   {metrics['word_problem_acc']:6.1%}, {after_image}")
    if "wrong_hint_acc" in metrics:
        wrong = f"with a wrong one {metrics['wrong_hint_acc']:.1%} ({metrics['followed_acc']:.1%} follow it)"
        print(f"         hints           with a right one {metrics['right_hint_acc']:.1%} of the switches, {wrong}")


def print_curve(curve: list[dict]) -> None:
    """The new task and the other questions at each gamma, and a bracket around the smallest that costs little."""
    chosen = smallest_gamma(curve)
    points = []
    for point in curve:
        text = f"{point['gamma']}: {100 * point['validation_acc']:.0f}/{100 * point['other_questions_acc']:.0f}"
        points.append(f"[{text}]" if point["gamma"] == chosen else text)
    print(f"gamma    {' · '.join(points)}  (new task/other questions)")


def print_replay(cfg: Config, data: replay.ReplayData) -> None:
    answers = "correct answers"
    if cfg.replay_answers == "own":
        answers = f"the base model's own answers, {data.share_correct:.0%} of them correct,"
    screens = f"{len(data.samples)} {cfg.replay_screens} screens"
    print(f"replay   {cfg.replay} sequences of a step: {answers} about {screens}; and to word problems")


def print_heads(scores: Tensor, heads: imagelora.Heads) -> None:
    """A bar for the score of each head, then the selected heads of each layer."""
    num_selected = sum(len(selected) for selected in heads.values())
    layers = [f"layer {layer}: {' '.join(map(str, selected))}" for layer, selected in heads.items()]
    bars = pictures.bars(scores, heads)
    print(f"probe    influence of {scores.numel()} heads, {prompts.PROBE_BATCHES} batches:  {bars}")
    print(f"select   {num_selected} of {scores.numel()} heads: {' · '.join(layers)}")


def print_text(max_difference: float) -> None:
    verdict = "changed" if max_difference else "identical"
    print(f"text     logits of 256 prompts without an image: {verdict} (max |difference| = {max_difference:.3g})")


def print_costs(result: dict) -> None:
    parameters, flops = result["trainable_parameters"], result["adapter_flops_per_screen"]
    size = f"{parameters:,} parameters, {parameters / result['lora_trainable_parameters']:.0%} of LoRA's (rank 8)"
    of_lora = f"{flops / result['lora_flops_per_screen']:.0%} of LoRA's"
    of_step = f"{flops / result['step_flops_per_screen']:.1%} of the whole step's"
    print(f"cost     {size} · training FLOPs of the adapter {of_lora}, {of_step}")


if __name__ == "__main__":
    sys.exit(command(Config, main, __doc__))
