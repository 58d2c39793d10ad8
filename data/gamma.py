"""One number after training: gamma, the strength of a trained update, and what is kept and lost where it is lowered."""

from contextlib import contextmanager

from torch import Tensor, nn

from data.base import screens_and_features
from data.evaluate import evaluate, measure_other_questions

GAMMAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # at which a trained update is measured


def strengths(adapter: nn.Module) -> list[Tensor]:
    """The gamma of each layer of an Image-LoRA, or the only one of a LoRA."""
    return [module.gamma.data for module in adapter.modules() if hasattr(module, "gamma")]


@contextmanager
def turned_down(adapter: nn.Module, factor: float):
    """A context in which gamma is multiplied by a factor."""
    gammas = strengths(adapter)
    trained = [gamma.clone() for gamma in gammas]
    for gamma in gammas:
        gamma.mul_(factor)
    try:
        yield
    finally:
        for gamma, before in zip(gammas, trained):
            gamma.copy_(before)


def measure_curve(model, adapter: nn.Module, old_test: tuple, num_problems=0) -> list[dict]:
    """The new task on validation screens, and the other questions, where a trained update is multiplied by each of
    GAMMAS: a list of {"gamma", "validation_acc", "other_questions_acc"}.

    old_test: (screens, features [N, P, D]) of old screens."""
    validation = screens_and_features(model, "new", "validation", len(old_test[0]))
    curve = []
    for gamma in GAMMAS:
        with turned_down(adapter, gamma):
            validation_acc, _ = evaluate(model, *validation, num_problems=num_problems)
            others = measure_other_questions(model, old_test, num_problems)["other_questions_acc"]
        curve.append({"gamma": gamma, "validation_acc": validation_acc, "other_questions_acc": others})
    return curve


def smallest_gamma(curve: list[dict], cost=0.02) -> float:
    """The smallest gamma of a curve that costs at most two points of the new task on validation screens."""
    least = curve[0]["validation_acc"] - cost
    return min(point["gamma"] for point in curve if point["validation_acc"] >= least)
