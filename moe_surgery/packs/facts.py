"""What a rule may ask of a reading: each fact by its name, with the values that it can have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, get_args

from moe_surgery.spec import Activation, GroupScore, MoESpec, Precision, Ranks, Scoring

Plain = bool | int | float | str

# What configs call an activation -> what a spec calls it (transformers' ACT2FN).
ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Fact:
    """One thing a reading knows: the type it is written in, where the spec holds it, the letter it is the size of."""

    kind: type[bool] | type[int] | type[float] | tuple[str, ...]
    get: Callable[[MoESpec], Plain | None]
    letter: str | None = None

    def problem(self, value: object) -> str | None:
        """What is wrong with ``value`` as this fact's, or None."""
        if isinstance(self.kind, tuple):
            return None if value in self.kind else f"must be one of {', '.join(self.kind)}"
        if self.kind is bool:
            return None if isinstance(value, bool) else "must be true or false"
        if self.kind is int:
            return None if type(value) is int and value > 0 else "must be an integer above 0"
        return None if type(value) in (int, float) and math.isfinite(cast(float, value)) else "must be a finite number"


FACTS: dict[str, Fact] = {
    "scoring": Fact(get_args(Scoring), lambda spec: spec.router.scoring),
    "top_k": Fact(int, lambda spec: spec.router.top_k),
    "renormalize": Fact(bool, lambda spec: spec.router.renormalize),
    "scale": Fact(float, lambda spec: spec.router.scale),
    "num_experts": Fact(int, lambda spec: spec.router.num_experts, "E"),
    "hidden": Fact(int, lambda spec: spec.hidden, "H"),
    "width": Fact(int, lambda spec: spec.experts.width, "I"),
    "activation": Fact(get_args(Activation), lambda spec: spec.experts.activation),
    "shared_width": Fact(int, lambda spec: spec.shared.width if spec.shared else None, "S"),
    "shared_activation": Fact(get_args(Activation), lambda spec: spec.shared.activation if spec.shared else None),
    "shared_scale": Fact(float, lambda spec: spec.shared.scale if spec.shared else None),
    "bias": Fact(bool, lambda spec: spec.router.bias),
    "soft_cap": Fact(float, lambda spec: spec.router.soft_cap),
    "correction_bias": Fact(bool, lambda spec: spec.router.correction_bias),
    "groups": Fact(int, lambda spec: spec.router.groups.count if spec.router.groups else 1),
    "groups_chosen": Fact(int, lambda spec: spec.router.groups.chosen if spec.router.groups else 1),
    "group_score": Fact(get_args(GroupScore), lambda spec: spec.router.groups.score if spec.router.groups else None),
    "epsilon": Fact(float, lambda spec: spec.router.epsilon),
    "floor": Fact(float, lambda spec: spec.router.floor),
    "norm": Fact(float, lambda spec: spec.router.norm),
    "gated": Fact(bool, lambda spec: spec.experts.gated),
    "limit": Fact(float, lambda spec: spec.experts.limit),
    "limit_after": Fact(bool, lambda spec: spec.experts.limit_after),
    "alpha": Fact(float, lambda spec: spec.experts.alpha),
    "offset": Fact(float, lambda spec: spec.experts.offset),
    "biases": Fact(bool, lambda spec: spec.experts.biases),
    "weights_on": Fact(("output", "input"), lambda spec: spec.experts.weights_on),
    "identities": Fact(int, lambda spec: spec.experts.identities),
    "empty": Fact(int, lambda spec: spec.experts.empty),
    "shared_gated": Fact(bool, lambda spec: spec.shared.gated if spec.shared else None),
    "shared_limit": Fact(float, lambda spec: spec.shared.limit if spec.shared else None),
    "shared_limit_after": Fact(bool, lambda spec: spec.shared.limit_after if spec.shared else None),
    "shared_alpha": Fact(float, lambda spec: spec.shared.alpha if spec.shared else None),
    "shared_offset": Fact(float, lambda spec: spec.shared.offset if spec.shared else None),
    "output_bias": Fact(bool, lambda spec: spec.output_bias),
    "at": Fact(("block", "experts"), lambda spec: spec.at),
    "logits_dtype": Fact(get_args(Precision), lambda spec: spec.router.logits_dtype),
    "scores_dtype": Fact(get_args(Precision), lambda spec: spec.router.scores_dtype),
    "weights_dtype": Fact(get_args(Precision), lambda spec: spec.router.weights_dtype),
    "ranks": Fact(get_args(Ranks), lambda spec: spec.router.ranks),
    "ranked_dtype": Fact(get_args(Precision), lambda spec: spec.router.ranked_dtype),
    "cap_dtype": Fact(get_args(Precision), lambda spec: spec.router.cap_dtype),
    "wide_matrix": Fact(bool, lambda spec: spec.router.wide_matrix),
}
