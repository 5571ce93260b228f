"""How a block chooses experts and weighs them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus", "own"]
Precision = Literal["native", "float32"]
GroupScore = Literal["max", "top2"]
Ranks = Literal["scores", "logits"]

# A sigmoid's float32 steps are coarser than its slope's above this, and coarser still in half precision.
_SATURATED = 4.0


@dataclass(frozen=True)
class Groups:
    """Experts may be chosen from the ``chosen`` best of ``count`` equal groups only.

    A group's score is the highest of its experts' ranked scores ("max") or the sum of the two highest ("top2"). Experts
    of the other groups rank as ``outside``, which is 0 or minus infinity.
    """

    count: int
    chosen: int
    score: GroupScore
    outside: float


@dataclass(frozen=True)
class RouterSpec:
    """How experts are chosen and weighted.

    ``ranks`` is what experts are ranked by. The order of scores is that of their logits until they are rounded: a
    float32 sigmoid is 1 for every logit above 17.

    The fields ``…_dtype`` say what is kept in the input's dtype ("native") and what in float32: the router's linear
    layer, its soft cap, the scores, what is ranked, and the routing weights as they meet the experts' outputs. With
    ``scoring`` "own" the model's own router runs as it is and hands over ids and weights; how it finds them is not said
    here.

    ``wide_matrix`` says that the router's matrix is stored in float32 though the block's weights are not.
    ``bias`` is one on the logits; ``correction_bias`` is added to the scores for ranking only. Renormalised weights are
    divided by ``max(sum + epsilon, floor)``, where the sum is their ``norm``-norm if that isn't 1.
    """

    num_experts: int
    top_k: int
    scoring: Scoring
    renormalize: bool
    scale: float = 1.0
    logits_dtype: Precision = "native"
    weights_dtype: Precision = "native"
    scores_dtype: Precision = "float32"
    bias: bool = False
    soft_cap: float | None = None
    correction_bias: bool = False
    groups: Groups | None = None
    epsilon: float = 0.0
    floor: float = 0.0
    norm: float = 1.0
    ranks: Ranks = "scores"
    ranked_dtype: Precision = "float32"
    cap_dtype: Precision = "float32"
    wide_matrix: bool = False

    @property
    def follows_logits(self) -> bool:
        """Whether the experts of the highest logits are those chosen, but for rounding."""
        return self.scoring != "own" and not self.correction_bias and self.groups is None

    @property
    def saturates(self) -> bool:
        """Whether scores tie where logits don't: a sigmoid's, if no soft cap keeps its logits small."""
        return self.scoring == "sigmoid" and (self.soft_cap is None or self.soft_cap > _SATURATED)

    def within(self, dtype: str) -> RouterSpec:
        """The same in a block of ``dtype``: in float32 nothing is native that isn't float32."""
        if dtype != "float32":
            return self
        names = [field.name for field in fields(self) if field.name.endswith("_dtype")]
        changed: dict[str, Any] = dict.fromkeys(names, "float32")
        return replace(self, **changed)

    def ranking(self) -> str:
        """What experts are ranked by, in words."""
        if self.own:
            return "what its own router ranks by"
        text = self.ranks if self.ranks == "logits" else f"{self.scoring} scores"
        text += " with their correction bias" if self.correction_bias else ""
        return text + (" in float32" if self.ranked_dtype == "float32" else " in the block's dtype")

    @property
    def own(self) -> bool:
        return self.scoring == "own"

    def sentence(self) -> str:
        """The same in words, for a line a person can read."""
        text = f"{'its own' if self.own else self.scoring} top-{self.top_k} of {self.num_experts}"
        if self.wide_matrix:
            text += " by a float32 router"
        if self.ranks == "logits":
            text += " by logits"
        if self.bias:
            text += " with logit bias"
        if self.soft_cap is not None:
            text += f" soft-capped at {self.soft_cap:g}"
        if self.correction_bias:
            text += " with correction bias"
        if self.groups is not None:
            g = self.groups
            text += f" in {g.chosen} of {g.count} groups ({g.score}, {g.outside:g} outside)"
        if self.renormalize:
            text += " renormalised" + (f" by its {self.norm:g}-norm" if self.norm != 1.0 else "")
        if self.scale != 1.0:
            text += f" ×{self.scale:g}"
        return text
