"""What the demo prints (data/README.md explains it)."""

from pathlib import Path

from torch import Tensor

from data.gamma import smallest_gamma
from data.prompts import PROBE_BATCHES
from data.replay import ReplayData
from imagelora import Heads
from tiny_vlm import TinyVLM

METRICS = (  # the measures of data/evaluate.py
    "{when:8} new task        {task_acc:6.1%} of the switches clicked\n"
    "         other questions {other_questions_acc:6.1%}: what is at {what_is_at_acc:.1%}, "
    "what is right of {what_is_right_of_acc:.1%}, click right of {click_right_of_acc:.1%}\n"
    "         same words      {same_words_acc:6.1%} of the names clicked where there are no switches\n"
    "         word problems   {word_problem_acc:6.1%}, after an image {word_problem_after_image_acc:.1%}"
)
HINTS = (
    "         hints           with a right one {right_hint_acc:.1%} of the switches, "
    "with a wrong one {wrong_hint_acc:.1%} ({followed_acc:.1%} follow it)"
)


def print_before(cfg, model: TinyVLM, metrics: dict, replay_data: ReplayData | None) -> None:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{num_parameters / 1e6:.2f} M parameters · {model.config.num_patches} visual tokens a screen"
    print(f"base     {Path(cfg.base).name} · {size} · {model.device}")
    print(METRICS.format(when="before", **metrics))
    if replay_data:
        own = f"the base model's own answers, {replay_data.share_correct:.0%} of them correct,"
        about = f"about {len(replay_data.samples)} new screens; and to word problems"
        print(f"replay   {cfg.replay} sequences of a step: {own} {about}")


def print_heads(scores: Tensor, heads: Heads) -> None:
    """A bar for the score of each head, scaled to the largest, with brackets around the selected ones; then those."""
    heights = (8 * scores / scores.max()).ceil().int()
    marks = [["▁▁▂▃▄▅▆▇█"[height] for height in row] for row in heights]  # even without influence, a head gets a bar
    for layer, selected in heads.items():
        for head in selected:
            marks[layer][head] = f"[{marks[layer][head]}]"
    bars = " · ".join(map("".join, marks))
    num_selected = sum(len(selected) for selected in heads.values())
    layers = [f"layer {layer}: {' '.join(map(str, selected))}" for layer, selected in heads.items()]
    print(f"probe    influence of {scores.numel()} heads, {PROBE_BATCHES} batches:  {bars}")
    print(f"select   {num_selected} of {scores.numel()} heads: {' · '.join(layers)}")


def print_after(curve: list[dict], metrics: dict, max_difference: float) -> None:
    """First the new task and the other questions at each gamma, and brackets around the smallest that costs little."""
    chosen = smallest_gamma(curve)
    points = []
    for point in curve:
        text = f"{point['gamma']}: {100 * point['validation_acc']:.0f}/{100 * point['other_questions_acc']:.0f}"
        points.append(f"[{text}]" if point["gamma"] == chosen else text)
    print(f"gamma    {' · '.join(points)}  (new task/other questions)")
    print(METRICS.format(when="after", **metrics))
    if "wrong_hint_acc" in metrics:
        print(HINTS.format(**metrics))
    verdict = "changed" if max_difference else "identical"
    print(f"text     logits of 256 prompts without an image: {verdict} (max |difference| = {max_difference:.3g})")


def print_controls_and_costs(result: dict) -> None:
    reworded = f"base, asked to click right of the name {result['reworded_acc']:.1%}"
    print(f"controls {reworded} · tuned, switches erased {result['erased_acc']:.1%}")
    parameters, flops = result["trainable_parameters"], result["adapter_flops_per_screen"]
    size = f"{parameters:,} parameters, {parameters / result['lora_trainable_parameters']:.0%} of LoRA's (rank 8)"
    of_lora = f"{flops / result['lora_flops_per_screen']:.0%} of LoRA's"
    of_step = f"{flops / result['step_flops_per_screen']:.1%} of the whole step's"
    print(f"cost     {size} · training FLOPs of the adapter {of_lora}, {of_step}")
