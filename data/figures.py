"""Makes the pictures on the pages anew, in about a minute: python -m data.figures

training.gif       a few clicks while they move to the switches
tensors.png        what fine-tuning changes, layer by layer and token by token
look.png           where a head looks before and after fine-tuning

The diagrams heads.png and trade_off.png are drawn by data/study/diagrams.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import train
from data import pictures
from data.base import find_device, image_features, load_base, screens_and_features
from data.command import command, make_directory, option
from data.evaluate import Answer, evaluate
from data.prompts import VOCABULARY, prompt_batch
from tiny_vlm import rotate


@dataclass
class FiguresConfig:
    out: str = option("data/figures", "directory of the pictures")
    device: str = option("auto", "where to compute: cpu, cuda, mps, or auto")


def make_figures(cfg: FiguresConfig) -> None:
    """The demo's run, filmed; then its pictures."""
    out = Path(cfg.out)
    make_directory(out)
    run = train.Config(device=cfg.device)
    # Many frames at the start, where clicks move, and few at the end.
    filmed_steps = {round(run.steps * (frame / 32) ** 2) for frame in range(33)}
    film = {}  # {step: answers, ...}

    def film_step(step: int, model) -> None:
        if step in filmed_steps:
            # Every seventh of the answers about nine screens, which gives six on six screens, of words and icons.
            _, answers = evaluate(model, *screens_and_features(model, "switches", "test", 9))
            film[step] = answers[::7]

    film_step(0, load_base(run.base, find_device(run.device)))
    tuned = train.finetune(run, verbose=True, after_step=film_step)
    frames = []
    for step, answers in film.items():
        hits = sum(map(pictures.is_correct, answers))
        headline = f"step {step:,} of {run.steps:,}:  {hits} of {len(answers)} clicks hit"
        frames.append(pictures.page(list(map(pictures.clicks_panel, film[0], answers)), 3, headline))
    pictures.save(frames, out / "training.gif")
    draw_changes(tuned, out / "tensors.png")
    draw_attention(tuned, out / "look.png")


def draw_changes(tuned: train.FinetuningRun, path: Path) -> None:
    """How far each head's value and query have moved at each token of a prompt: the norm of the change, relative to
    the norm of the base's."""
    answer = tuned.answers[0]
    prompt = prompt_of(tuned, answer, history=1)
    queries, _, values = queries_keys_values(tuned, prompt)
    moves = []
    for before, after in (values, queries):
        moves.append((after - before).norm(dim=-1) / before.norm(dim=-1))  # [L, H or H_q, T]
    tokens = [VOCABULARY[i] for i in prompt["input_ids"][0]]
    pictures.save([pictures.changes(*moves, tuned.adapter.heads, tokens, answer.screen.image)], path)


def draw_attention(tuned: train.FinetuningRun, path: Path) -> None:
    """Find the head that has turned to the targets the most, and draw where it looks for four of the answers."""
    answers = tuned.answers
    counted = answers[:100]  # enough for a mean
    shares = [pictures.share_on(answer.sample["bbox"], attention_maps(tuned, answer)) for answer in counted]
    base_share, share = torch.stack(shares).mean(0)  # [L, H_q]
    layer, head = divmod(int((share - base_share).argmax()), share.shape[1])
    wrong = [i for i, answer in enumerate(answers) if not pictures.is_correct(answer)]
    last_wrong = max(wrong, default=len(answers) - 1)
    shown = [0, len(answers) // 5, 2 * len(answers) // 5, last_wrong]

    maps = {i: attention_maps(tuned, answers[i])[:, layer, head] for i in shown}
    # A row for each: before, after, the clicks
    panels = [pictures.attention_panel(answers[i], maps[i][moment]) for moment in (0, 1) for i in shown]
    panels += [pictures.clicks_panel(tuned.base_answers[i], answers[i]) for i in shown]
    name = f"head {head} of layer {layer}"
    before = f"Before fine-tuning: where {name} looks (bright), and how much of its attention is on the target"
    picture = pictures.page(panels, len(shown), titles=(before, "After fine-tuning", "The clicks"))
    pictures.save([picture], path)
    growth = f"from {base_share[layer, head]:.0%} to {share[layer, head]:.0%}, averaged over {len(counted)} questions"
    print(f"look     the attention of {name} to the target grew the most: {growth}")


def prompt_of(tuned: train.FinetuningRun, answer: Answer, history=0) -> dict:
    """The model's arguments for the question that was answered."""
    features = image_features(tuned.model.get_image_features, [answer.screen], tuned.model.device)
    return prompt_batch([answer.sample], features, history)


def attention_maps(tuned: train.FinetuningRun, answer: Answer) -> Tensor:
    """How much every head looks at each patch from the last token of a question, before and after fine-tuning:
    [2, L, H_q, rows, columns]."""
    config = tuned.model.config
    prompt = prompt_of(tuned, answer)
    queries, keys, _ = queries_keys_values(tuned, prompt)
    keys = keys.repeat_interleave(queries.shape[2] // keys.shape[2], dim=2)  # [2, L, H_q, T, d_h]
    scores = queries[..., -1:, :] @ keys.mT / queries.shape[-1] ** 0.5  # [2, L, H_q, 1, T]
    is_visual = prompt["input_ids"][0] == config.image_token_id  # [T]
    side = config.image_size // config.patch_size  # patches in a row
    return scores.softmax(-1)[..., 0, is_visual].unflatten(-1, (side, side))


@torch.no_grad()
def queries_keys_values(tuned: train.FinetuningRun, prompt: dict) -> list[Tensor]:
    """Queries [2, L, H_q, T, d_h], keys and values [2, L, H, T, d_h] of one sequence, before and after fine-tuning;
    queries and keys are rotated."""
    model = tuned.model
    queries = []

    def keep_queries(attention, arguments):
        x, angles, *_ = arguments
        queries.append(rotate(attention.split_heads(attention.q_proj(x)), angles))

    hooks = [layer.self_attn.register_forward_pre_hook(keep_queries) for layer in model.language_model.layers]
    with tuned.adapter.disabled():
        before = model(**prompt).past_key_values.layers
    after = model(**prompt).past_key_values.layers
    for hook in hooks:
        hook.remove()
    keys, values = zip(*before, *after)  # of L layers before, and then of L layers after
    return [torch.cat(tensors).unflatten(0, (2, -1)) for tensors in (queries, keys, values)]


if __name__ == "__main__":
    sys.exit(command(FiguresConfig, make_figures, __doc__))
