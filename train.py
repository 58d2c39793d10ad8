"""Fine-tune the tiny VLM by Image-LoRA on a new kind of screen, and watch what the paper says happen.

    python train.py                  before, probe, select, train, after, cost: under a minute on two CPU cores
    python train.py --method lora    the same with standard LoRA (q, k, v, o of every layer, all tokens)
    python train.py --explain        a guided walk: one question through every step, tensor by tensor
    python train.py --pretrain       make a base model like data/tiny_vlm.pt from nothing
    python train.py --compare        every method, task, budget and seed: the tables of data/README.md
    python train.py ... --help       the settings of one of these

Shapes:  B sequences · T tokens · N screens · P visual tokens a screen · D hidden size · L layers · H value heads
"""

import inspect
import json
import math
import shlex
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imagelora
from data import SPLITS, Settings, figures, option, parse, progress, prompts
from data.compare import CompareConfig, compare
from data.costs import CostsConfig, lora_costs, print_costs
from data.pretrain import PretrainConfig, pretrain
from data.screens import DOMAINS
from tiny_vlm import TinyVLM

METHODS = ("image_lora", "lora", "lora_visual", "lora_value", "none")
HEADS = ("top", "matched", "lowest", "random", "least", "all")


@dataclass(frozen=True)
class Config(Settings):
    """One fine-tuning run; each field is an option of the command line too."""

    method: str = option("image_lora", "lora: q k v o, all tokens; _visual: visual tokens; _value: v", METHODS)
    task: str = option("grounding", "grounding: name -> point; referring: point -> name", ("grounding", "referring"))
    domain: str = option("settings", "the kind of screen", DOMAINS)
    heads: str = option("top", f"{' | '.join(HEADS)}: by influence; or themselves, as '0:4,5 1:2' (layer:heads)")
    num_heads: int = option(10, "value heads to adapt", least=1)
    r: int = option(8, "rank", least=1)
    lora_alpha: float = option(16.0, "the update is scaled by lora_alpha / r", least=0)
    tau: float = option(4.0, "layer budget ~ influence^tau: 0 even, 0.5 the authors', above 1 in fewer layers", least=0)
    normalize: bool = option(True, "scale by 1/sqrt|S| too")
    lr: float = option(0.04, "peak learning rate of AdamW", least=0)
    steps: int = option(500, "training steps", least=1)
    screens: int = option(8, "screens a step", least=1)
    questions: int = option(5, "questions a screen, packed into one sequence", least=1)
    history: int = option(0, "word problems told before each screen: longer text, same image", least=0)
    replay: int = option(0, "word problems trained on before each screen", least=0)
    prior: bool = option(False, "train only on targets whose place is a function of their name")
    test_screens: int = option(200, "screens that the accuracies are measured on", least=1)
    split: str = option("test", "which screens those are", SPLITS)
    seed: int = option(0, "of the data's order, the adapter's start and the probe", least=0)
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    out: str = option("", "output directory, default runs/DOMAIN; of --explain runs/explain")
    resume: bool = option(False, "go on from OUT/checkpoint.pt")

    def __post_init__(self):
        super().__post_init__()
        if self.heads not in HEADS:
            parse_heads(self.heads)


def parse_heads(text: str) -> imagelora.Heads:
    """'0:4,5 1:2' -> {0: [4, 5], 1: [2]}. Raises ValueError."""
    try:
        layers = [part.split(":") for part in text.split()]
        return {int(layer): [int(head) for head in heads.split(",")] for layer, heads in layers}
    except ValueError:
        raise ValueError(f"heads must be one of {', '.join(HEADS)} or like '0:4,5 1:2', got {text!r}") from None


# ---- The main job ----------------------------------------------------------------------------------------------------


def main_job(cfg: Config) -> None:
    """`finetune`, said and saved: OUT/metrics.json, adapter.pt and predictions.png."""
    out = Path(cfg.out or f"runs/{cfg.domain}")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # fails now, rather than after training
    (out / "metrics.json").unlink(missing_ok=True)  # of an earlier run
    result = asdict(cfg) | finetune(cfg, out)
    text = json.dumps(result, indent=1) + "\n"
    imagelora.safe_write(text.encode(), out / "metrics.json")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"saved    {out}/ {' '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")


def run(cfg: Config) -> dict:
    """`finetune` without prints and files: the Config's fields and what was measured."""
    torch.set_num_threads(1)
    result = finetune(cfg)
    return asdict(cfg) | result.pop("after") | result


def finetune(cfg: Config, out: Path | None = None) -> dict:
    """before -> probe -> select -> attach -> train -> after -> cost; with `out`, printed and saved there."""
    start, say = time.time(), print if out else lambda line: None
    model = load_base(cfg.device)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    patches = model.config.num_patches
    say(f"base     {prompts.BASE.name} · {size:.2f} M parameters · {patches} visual tokens a screen · {model.device}")
    before, base_given = None, []
    if out or cfg.method == "none":
        before, base_given = prompts.measure(cfg, model)
        say(f"before   {prompts.score_line(cfg.domain, before)}")
    base_text = prompts.text_logits(model)

    data, batches = prompts.training_data(cfg, model.device)
    heads = None
    if cfg.method == "image_lora":
        scores = imagelora.score_heads(model, batches, seed=cfg.seed)
        heads = choose_heads(cfg, scores)
        shown = f"{len(batches)}×{cfg.screens} screens:  {figures.bars(scores, heads)}"
        say(f"probe    rank-1 influence of {scores.numel()} heads, {shown}")
        chosen = " · ".join(f"layer {layer}: {' '.join(map(str, h))}" for layer, h in heads.items())
        say(f"select   {sum(map(len, heads.values()))} of {scores.numel()} heads: {chosen}")

    torch.manual_seed(cfg.seed)
    adapter = make_adapter(cfg, model, heads)
    result = {
        "heads": heads,
        "heads_from": cfg.heads,
        "device": str(model.device),
        "torch": torch.__version__,
    }
    if adapter is None:
        after, given = before, base_given
    else:
        begun = time.time()
        train(cfg, model, adapter, data, out)
        result["step_ms"] = 1000 * (time.time() - begun) / cfg.steps
        after, given = prompts.measure(cfg, model)
        result |= costs(cfg, model, adapter, prompts.batch_of(cfg, data, prompts.PROBE_BATCHES)[0])
    difference = prompts.text_logits(model) - base_text
    result |= {
        "before": before,
        "after": after,
        "text_logits_max_abs_diff": difference.abs().max().item(),
    }
    result |= prompts.controls(cfg, model, base_given, given)
    if cfg.method == "none" and not out:
        result["scores"] = prompts.all_scores(model, batches)
    if out:
        report(cfg, result)
        figures.save(figures.predictions(base_given, given), out / "predictions.png")
        if adapter is not None:
            adapter.save(out / "adapter.pt")
    return result | {"seconds": round(time.time() - start, 1)}


def load_base(device: str) -> TinyVLM:
    found = torch.accelerator.current_accelerator(check_available=True)
    there = [found.type, "cpu"] if found else ["cpu"]
    if device not in ("auto", *there):
        raise ValueError(f"device {device} is not available here; expected one of {', '.join(there)}")
    if device == "auto":
        device = there[0]
    return TinyVLM.from_pretrained(prompts.BASE).to(device)


def train(cfg: Config, model: TinyVLM, adapter: nn.Module, data: tuple, out: Path | None) -> None:
    """AdamW on the loss of the answers, the rate warmed up over a twentieth of the steps, then decayed to zero.

    With `out`, progress is shown and OUT/checkpoint.pt written every 20 steps; resume=True goes on from there.
    Raises FloatingPointError at a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=cfg.lr, weight_decay=0.0)
    first = load_checkpoint(cfg, adapter, optimizer, out) if cfg.resume else 0
    warm_up, click = max(cfg.steps // 20, 1), None
    for step in (bar := progress(first, cfg.steps, "train", quiet=out is None)):
        lr = cfg.lr * min((step + 1) / warm_up, 1 - step / cfg.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch, boxes = prompts.batch_of(cfg, data, prompts.PROBE_BATCHES + step)  # after the probe's
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            output = model(**batch)
        logits, loss = output.logits, output.loss
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; try a smaller --lr than {cfg.lr}")
        if out and step % 20 == 0:  # what is kept has just given a finite loss
            save_checkpoint(cfg, adapter, optimizer, step, out)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        if out:
            text = f"loss {loss.item():.3f}"
            if cfg.task == "grounding" and not cfg.replay:
                now = prompts.hit_rate(logits, batch["labels"], boxes)
                click = now if click is None else 0.9 * click + 0.1 * now
                text += f"  click {click:.0%}"
            bar.set_postfix_str(text, refresh=False)


def save_checkpoint(cfg: Config, adapter: nn.Module, optimizer, step: int, out: Path) -> None:
    content = {
        "settings": asdict(cfg),
        "step": step,
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    imagelora.safe_save(content, out / "checkpoint.pt")


def load_checkpoint(cfg: Config, adapter: nn.Module, optimizer, out: Path) -> int:
    """Puts OUT/checkpoint.pt into adapter and optimizer; returns the steps done. ValueError if of another run."""
    path = out / "checkpoint.pt"
    if not path.exists():
        print(f"resume   there is no {path}; from the start")
        return 0
    saved = imagelora.safe_load(path)
    settings = saved.get("settings", {})
    for name, value in asdict(cfg).items():
        if name not in ("device", "out", "resume") and settings.get(name) != value:
            raise ValueError(f"{path} is of a run with other settings; {name} is {value!r} here")
    adapter.load_state_dict(saved["adapter"])
    optimizer.load_state_dict(saved["optimizer"])
    print(f"resume   from step {saved['step']} of {cfg.steps}")
    return saved["step"]


# ---- Heads, and what is said -----------------------------------------------------------------------------------------


def choose_heads(cfg: Config, scores: Tensor) -> imagelora.Heads:
    """The heads that cfg.heads names; scores [L, H]. matched: random, with as many in each layer as the probe's."""
    if cfg.heads not in HEADS:
        return parse_heads(cfg.heads)
    num_heads, rng = scores.shape[1], np.random.default_rng(cfg.seed)
    if cfg.heads in ("top", "matched"):
        top = imagelora.select_heads(scores, cfg.num_heads, cfg.tau)
        if cfg.heads == "top":
            return top
        return {layer: sorted(rng.permutation(num_heads)[: len(heads)].tolist()) for layer, heads in top.items()}
    order = {
        "all": range(scores.numel()),
        "lowest": range(cfg.num_heads),
        "random": rng.permutation(scores.numel())[: cfg.num_heads],
        "least": scores.flatten().argsort()[: cfg.num_heads],
    }
    heads = {}
    for i in sorted(map(int, order[cfg.heads])):
        heads.setdefault(i // num_heads, []).append(i % num_heads)
    return heads


def report(cfg: Config, result: dict) -> None:
    """The lines after training."""
    print(f"after    {prompts.score_line(cfg.domain, result['after'])}")
    named = {"constant": "best constant", "offset": "base + best offset"}
    named |= {"erased": "switches erased", "exchanged": "exchanged with their names"}
    shown = [f"{text} {result[f'{key}_acc']:.1%}" for key, text in named.items() if f"{key}_acc" in result]
    if shown:
        print(f"controls {' · '.join(shown)}")
    difference = result["text_logits_max_abs_diff"]
    verdict = f"{'changed' if difference else 'identical'} (max |difference| = {difference:.3g})"
    print(f"text     logits of 256 text-only prompts: {verdict}")
    if cfg.method == "none":
        return
    parameters, of_lora = result["trainable_parameters"], result["lora_trainable_parameters"]
    flops, lora, step = (result[f"{name}_flops_per_screen"] for name in ("adapter", "lora", "step"))
    counted = "counted = computed" if result["counted_flops_per_screen"] == flops else "counted differs from computed"
    small = f"cost     {parameters:,} parameters ({parameters / of_lora:.0%} of LoRA)"
    print(f"{small} · adapter {flops / 1e6:.2f} MFLOP a screen ({flops / lora:.0%} of LoRA), {counted}")
    print(f"         {flops / step:.1%} of the whole training step's {step / 1e6:.0f} MFLOP a screen")


# ---- The baseline: standard LoRA on whole Linear layers --------------------------------------------------------------


class LoRA(nn.Module):
    """y + (alpha / r) x A B on these projections of every language layer; the rest of the model is frozen.

    names: letters of q, k, v, o. visual_only: only the rows of visual tokens are updated, as in Image-LoRA.
    """

    def __init__(self, model: TinyVLM, r: int, lora_alpha: float, names: str = "qkvo", visual_only: bool = False):
        super().__init__()
        self.r, self.scaling = r, lora_alpha / r
        self.names, self.visual_only = names, visual_only
        self.shape = shape_of(model)
        self.enabled, self.rows = True, None
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()
        model.requires_grad_(False)
        model.register_forward_pre_hook(self._find_rows, with_kwargs=True)
        for layer in model.language_model.layers:
            for name in names:
                linear = getattr(layer.self_attn, f"{name}_proj")
                linear.register_forward_hook(partial(self._add, len(self.A)))
                A = torch.empty(linear.in_features, r, device=model.device)
                nn.init.kaiming_uniform_(A.T, a=math.sqrt(5))
                self.A.append(A)
                self.B.append(torch.zeros(r, linear.out_features, device=model.device))

    def _find_rows(self, model, args, kwargs) -> None:
        """The rows of B * T that are updated: None for all of them; inside `disabled()` none."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        visual = (ids == model.config.image_token_id).flatten() & self.enabled
        self.rows = None
        if self.visual_only or not self.enabled:
            self.rows = visual.nonzero().squeeze(1)

    def _add(self, i: int, linear, inputs, y: Tensor) -> Tensor:
        x = inputs[0].flatten(0, -2)  # [B * T, d_in]
        if self.rows is not None:
            x = x[self.rows]
        update = self.scaling * (x @ self.A[i]) @ self.B[i]
        if self.rows is None:
            return y + update.view_as(y)
        return y.flatten(0, -2).index_add(0, self.rows, update).view_as(y)

    @contextmanager
    def disabled(self):
        """Within it the model is the base model."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def flops(self, num_tokens: int) -> int:
        """FLOPs of the adapter in one training step (forward and backward) over so many tokens."""
        return lora_costs(*self.shape, num_tokens, self.r, self.names)[1]

    def save(self, path: Path) -> None:
        imagelora.safe_save({"r": self.r, "scaling": self.scaling, "lora": self.state_dict()}, path)


def shape_of(model: TinyVLM) -> tuple[int, int, int, int, int]:
    """Layers, hidden size, query heads, value heads, head size: what `lora_costs` takes."""
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size
    return config.num_hidden_layers, size, heads, config.num_key_value_heads, size // heads


def make_adapter(cfg: Config, model: TinyVLM, heads: imagelora.Heads | None) -> nn.Module | None:
    if cfg.method == "image_lora":
        return imagelora.attach(model, cfg.r, cfg.lora_alpha, heads, cfg.normalize)
    if cfg.method == "none":
        return None
    names = "v" if cfg.method == "lora_value" else "qkvo"
    return LoRA(model, cfg.r, cfg.lora_alpha, names, visual_only=cfg.method == "lora_visual")


def costs(cfg: Config, model: TinyVLM, adapter: nn.Module, batch: dict) -> dict:
    """Parameters, and FLOPs of a training step a screen: the adapter's, computed and counted, and the whole step's."""
    ids = batch["input_ids"]
    tokens, visual = ids.numel(), int((ids == model.config.image_token_id).sum())
    updated = tokens if cfg.method in ("lora", "lora_value") else visual
    lora_parameters, lora_flops = lora_costs(*shape_of(model), tokens, r=8)
    step, kept = prompts.count_step(model, batch)
    norms = {}  # root mean square over visual tokens of ||Delta V_l||
    if cfg.method == "image_lora":
        for layer, (_, update) in watch(model, batch, **adapter.layers).items():
            norms[layer] = update.square().sum(1).mean().sqrt().item()
    with adapter.disabled():
        floor, kept_by_backbone = prompts.count_step(model, batch)
    adapter.zero_grad()
    return {
        "trainable_parameters": sum(p.numel() for p in adapter.parameters()),
        "lora_trainable_parameters": lora_parameters,
        "adapter_flops_per_screen": adapter.flops(updated) / len(ids),
        "counted_flops_per_screen": (step - floor) / len(ids),
        "lora_flops_per_screen": lora_flops / len(ids),
        "step_flops_per_screen": step / len(ids),
        "saved_bytes_per_screen": (kept - kept_by_backbone) / len(ids),
        "visual_fraction": visual / tokens,
        "update_norms": norms,
    }


# ---- A guided walk: one screen and one question through base, probe, selection, training steps and decoding ----------


def station(title: str, text: str, ran=None) -> None:
    """A line of the walk; `ran` is the function of imagelora.py that has just run."""
    where = f"   [imagelora.py:{inspect.getsourcelines(ran)[1]}]" if ran else ""
    print(f"{title:13}{text}{where}")


@torch.no_grad()
def watch(model: TinyVLM, batch: dict, **modules: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(What goes into a module, what comes out of it) in one forward pass."""
    found = {}

    def keep(name, module, inputs, output):
        found[name] = inputs[0], output

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def explain(cfg: Config) -> None:
    """Print, station by station, the tensors of the method, their shapes and the numbers that matter."""
    if cfg.method != "image_lora" or cfg.task != "grounding":
        raise ValueError(f"the walk is one of image_lora and grounding, not of {cfg.method} and {cfg.task}")
    out, model = Path(cfg.out or "runs/explain"), load_base(cfg.device)
    out.mkdir(parents=True, exist_ok=True)
    drawn, features = prompts.seen(cfg.domain, "test", 4, model.device)
    asked = [prompts.exam([screen])[0][1] for screen in drawn]  # the first target of each screen
    questions = [prompts.questions([sample], features[[i]]) for i, sample in enumerate(asked)]
    one = questions[0]
    base_answers = prompts.answer(model, asked, features)
    station("1 prompt", f"<bos>, {model.config.num_patches} x <image>, {asked[0]['instruction']}")
    station("", f"right answer {asked[0]['answer']} (cells of a 16 x 16 grid), the base model's {base_answers[0]}")

    data, batches = prompts.training_data(cfg, model.device)
    scores = imagelora.score_heads(model, batches, seed=cfg.seed)
    station("2 probe", "I(l, h) = ||dL/dB_l(h)||^2, a line a layer, the largest = 1", imagelora.score_heads)
    for row in (scores / scores.max()).tolist():
        station("", "  ".join(f"{score:.2f}" for score in row))
    heads = choose_heads(cfg, scores)
    chosen = sum(map(len, heads.values()))
    station("3 selection", f"{chosen} of {scores.numel()} heads: {heads}", imagelora.select_heads)
    lowest = min(heads)
    layer = next((k for k in heads if len(heads[k]) < scores.shape[1]), lowest)  # some of its heads are not selected
    first, attention = (model.language_model.layers[k].self_attn for k in (lowest, layer))
    parts = {"q": first.q_proj, "k": first.k_proj, "v": attention.v_proj}
    base, base_text = watch(model, one, **parts), prompts.text_logits(model)
    torch.manual_seed(cfg.seed)
    adapter = make_adapter(cfg, model, heads)
    values = adapter.layers[str(layer)]
    station("4 attach", f"layer {layer}: A {list(values.A.shape)}, B {list(values.B.shape)} = 0", imagelora.attach)
    model(**batches[0]).loss.backward()
    norms = ", ".join(f"{name} {p.grad.norm():.2g}" for name, p in values.named_parameters())
    station("5 backward", f"norms of the gradients: {norms}; while B = 0, A and gamma have none")
    train(cfg, model, adapter, data, out)
    (out / "checkpoint.pt").unlink(missing_ok=True)

    now = watch(model, one, **parts)
    x, value = now["v"]
    update = (value - F.linear(x, attention.v_proj.weight))[0]  # [T, H * d_h]
    rows = update.abs().sum(1).nonzero().squeeze(1)
    station("6 M X", f"trained; rows adapted: {rows[0]} .. {rows[-1]}, the image's", imagelora.ValueAdapter.add_update)
    norms = update.unflatten(1, (-1, attention.head_dim)).norm(dim=(0, 2)).tolist()
    shown = "  ".join(f"{norm:.3f}{'*' * (head in heads[layer])}" for head, norm in enumerate(norms))
    station("7 update", f"norm over rows by head, layer {layer} (* selected): {shown}", imagelora.ValueAdapter.forward)
    queries, keys = ((now[name][1] - base[name][1]).abs().max() for name in "qk")
    station("8 looking", f"layer {lowest}: queries changed by {queries:g}, keys by {keys:g}: it looks where it looked")
    change = (prompts.text_logits(model) - base_text).abs().max()
    station("9 text", f"logits of {len(base_text)} prompts without an image: max change {change:g}")
    adapted = []  # rows, in each forward pass
    model.register_forward_pre_hook(lambda module, inputs: adapted.append(0))
    values.register_forward_pre_hook(lambda module, inputs: adapted.append(adapted.pop() + len(inputs[0])))
    tuned_answers = prompts.answer(model, asked, features)
    station("10 decoding", f"{len(asked)} questions, rows adapted by pass: {adapted}", imagelora.ImageLoRA._find_rows)
    station("11 answer", f"{base_answers[0]} before, {tuned_answers[0]} now; right {asked[0]['answer']}")
    (layer, head), looks = figures.where_it_looks(model, adapter, questions)
    picture = figures.look(drawn, asked, looks, base_answers, tuned_answers)
    figures.save(picture, out / "look.png")
    station("12 picture", f"{out}/look.png: where head {head} of layer {layer} looks, the most focused one")


# ---- The command line ------------------------------------------------------------------------------------------------


MODES = {  # option -> (its settings, the job)
    "--explain": (Config, explain),
    "--pretrain": (PretrainConfig, pretrain),
    "--costs": (CostsConfig, print_costs),
    "--compare": (CompareConfig, lambda cfg: compare(cfg, Config, run, shape_of(load_base("cpu")))),
}


def main(arguments: list[str]) -> int:
    """Runs a job; returns the exit status: 0, 1 the loss was not finite, 2 bad input, 130 interrupted."""
    mode = next((argument for argument in arguments if argument in MODES), "")
    config_class, job = MODES.get(mode, (Config, main_job))
    try:
        options = [argument for argument in arguments if argument != mode]
        job(parse(config_class, options, f"train.py {mode}".strip(), __doc__))
    except KeyboardInterrupt:
        goes_on = {"": " --resume", "--compare": ""}  # the others start anew
        again = shlex.join(a for a in arguments if a != "--resume") + goes_on.get(mode, "")
        print(f"\nstopped; {'go on' if mode in goes_on else 'start anew'} with: python train.py {again}")
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
