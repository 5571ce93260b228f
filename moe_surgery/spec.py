"""What a sparse-MoE block computes, and nothing about how.

A :class:`MoESpec` stands between the models that can be read and the targets that can be built. It is also the ground
truth of the proof: the reference forward is computed from the spec and the weights alone.

For a token ``x`` of width H, with experts ``e`` of width I and a shared expert of width S::

    logits  = W_router x  (+ b_router)                         [E]
              c * tanh(logits / c)  with a soft cap c
    scores  = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))
              or the weights that the model's own router gives, as it is
    ranked  = logits or scores  (+ correction bias)
              in the best groups only, where groups limit the choice
    ids     = the k experts that rank highest
    w       = scores[ids];  w = w / max(sum(w) + epsilon, floor) if renormalize;  w = w * scale
    routed  = sum_j w[j] * MLP[ids[j]](x)          or  sum_j MLP[ids[j]](w[j] * x)
    shared  = g * scale_s * MLP_s(x),  g = sigmoid(W_g x) or 1
    out     = routed + shared

where ``MLP(x) = W_down mix(W_gate x + b_gate, W_up x + b_up) + b_down`` and :class:`Mix` says what stands between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus", "own"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
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


@dataclass(frozen=True)
class Mix:
    """What stands between the matrices of an MLP: ``act(gate) * up``, and what models add to it.

    ``gated`` is false where there is no up projection. ``limit`` clamps ``gate`` from above and ``up`` from both sides;
    with ``limit_after`` the activated gate is clamped instead of the gate. ``alpha`` is the factor inside a silu's
    sigmoid; ``offset`` is added to ``up``.
    """

    activation: Activation
    gated: bool = True
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    offset: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether it is ``act(gate) * up`` and nothing more."""
        return self == Mix(self.activation)

    def __str__(self) -> str:
        text: str = self.activation
        text += f"(α {self.alpha:g})" if self.alpha != 1.0 else ""
        text += " ungated" if not self.gated else ""
        text += f", up + {self.offset:g}" if self.offset else ""
        if self.limit is not None:
            text += f" clamped at {self.limit:g}" + (" after" if self.limit_after else "")
        return text


@dataclass(frozen=True)
class ExpertsSpec:
    """The routed experts: ``num_experts`` MLPs of one width. ``biases`` says that every matrix has one.

    ``weights_on`` is where routing weights apply: to the experts' outputs or to their inputs. Ids from ``num_experts``
    up to ``num_experts + identities - 1`` are experts that return their input, and the ``empty`` ids after those add
    nothing: no expert of theirs is among the routed ones.
    """

    num_experts: int
    width: int
    activation: Activation
    gated: bool = True
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    offset: float = 0.0
    biases: bool = False
    weights_on: Literal["output", "input"] = "output"
    identities: int = 0
    empty: int = 0

    @property
    def acting(self) -> int:
        """How many ids stand for experts that add something."""
        return self.num_experts + self.identities

    @property
    def total(self) -> int:
        """How many experts a router chooses from."""
        return self.acting + self.empty

    @property
    def mix(self) -> Mix:
        return Mix(self.activation, self.gated, self.limit, self.limit_after, self.alpha, self.offset)


@dataclass(frozen=True)
class SharedSpec:
    """The shared expert: one MLP that every token visits, times ``gate`` and ``scale``."""

    width: int
    activation: Activation
    gate: Literal["sigmoid"] | None
    scale: float = 1.0
    gated: bool = True
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    offset: float = 0.0

    @property
    def mix(self) -> Mix:
        return Mix(self.activation, self.gated, self.limit, self.limit_after, self.alpha, self.offset)


@dataclass(frozen=True)
class MoESpec:
    """A sparse-MoE block as a function of its input ``[..., hidden]``; it returns one tensor of the same shape.

    ``at`` is "block" where the whole block was read. It is "experts" where only the module of its routed experts was:
    a function of tokens, expert ids and routing weights, around which the rest of the block stays as it is. ``results``
    is what the block returns, in words, if that isn't its output alone.

    ``own_rest`` says that more stands around the routed experts than is said here (a norm or a residual, several shared
    experts, a learned mix), all of which goes on being computed by the block's own operations. ``latent`` is the size
    of what these give the experts and take from them, where it is another than the block's.
    """

    hidden: int
    router: RouterSpec
    experts: ExpertsSpec
    shared: SharedSpec | None
    at: Literal["block", "experts"] = "block"
    output_bias: bool = False
    results: str = ""
    own_rest: bool = False
    latent: int | None = None

    @property
    def inner(self) -> int:
        """The size of what the routed experts are given, and return."""
        return self.latent or self.hidden

    @property
    def sizes(self) -> tuple[int, ...]:
        """The rows and columns that the experts' matrices have, the shared expert's too."""
        return (self.hidden, self.inner, self.experts.width, *((self.shared.width,) if self.shared else ()))

    @property
    def built(self) -> MoESpec:
        """What a target builds of it: the experts alone, where the block's own router runs as it is."""
        if self.at == "experts" or not self.router.own:
            return self
        alone = replace(self, at="experts", shared=None, output_bias=False, results="", own_rest=False)
        return replace(alone, hidden=self.inner, latent=None)

    def sentence(self) -> str:
        """One line a person can read, stable enough to group sites by."""
        e, s = self.experts, self.shared
        parts = ["experts alone, behind its own router"] if self.at == "experts" else [self._routing()]
        count = f"{e.num_experts} " if self.at == "experts" else ""
        parts.append(f"{count}experts {self.inner}→{e.width} {e.mix}" + (" with biases" if e.biases else ""))
        if e.weights_on == "input":
            parts[-1] += ", weighted inputs"
        if e.identities:
            parts[-1] += f", {e.identities} identity experts"
        if e.empty:
            parts[-1] += f", {e.empty} ids for no routed expert"
        if s is not None:
            gate = f", {s.gate} gate" if s.gate else ""
            scale = f", ×{s.scale:g}" if s.scale != 1.0 else ""
            parts.append(f"shared {s.width} {s.mix}{gate}{scale}")
        if self.output_bias:
            parts.append("output bias")
        if self.own_rest:
            parts.append("the rest its own")
        if self.results:
            parts.append(f"returns {self.results}")
        return " · ".join(parts)

    def _routing(self) -> str:
        r = self.router
        text = f"{'its own' if r.own else r.scoring} top-{r.top_k} of {r.num_experts}"
        if r.wide_matrix:
            text += " by a float32 router"
        if r.ranks == "logits":
            text += " by logits"
        if r.bias:
            text += " with logit bias"
        if r.soft_cap is not None:
            text += f" soft-capped at {r.soft_cap:g}"
        if r.correction_bias:
            text += " with correction bias"
        if r.groups is not None:
            g = r.groups
            text += f" in {g.chosen} of {g.count} groups ({g.score}, {g.outside:g} outside)"
        if r.renormalize:
            text += " renormalised" + (f" by its {r.norm:g}-norm" if r.norm != 1.0 else "")
        if r.scale != 1.0:
            text += f" ×{r.scale:g}"
        return text

    def beyond_plain(self) -> tuple[str, ...]:
        """What it has beyond a plain router (softmax or sigmoid of one map), gated MLPs and their sum."""
        r, e, s = self.router, self.experts, self.shared
        has = {
            "only its experts": self.at == "experts",
            "a float32 router": r.wide_matrix,
            "a logit bias": r.bias,
            "a soft cap": r.soft_cap is not None,
            "a correction bias": r.correction_bias,
            "groups": r.groups is not None,
            "an epsilon, floor or norm": (r.epsilon, r.floor, r.norm) != (0.0, 0.0, 1.0),
            f"scores of {r.scoring}": r.scoring == "sqrtsoftplus",
            f"experts of {e.mix}": not e.mix.plain,
            "biases in its experts": e.biases,
            "weighted inputs": e.weights_on == "input",
            "identity experts": e.identities > 0,
            "ids for no routed expert": e.empty > 0,
            "a shared expert of another kind": s is not None and not s.mix.plain,
            "an output bias": self.output_bias,
            "more around its experts": self.own_rest,
            "other results than its output": bool(self.results),
        }
        return tuple(what for what, held in has.items() if held)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data. Fields that came later are left out at their defaults, so that older plans stay the same."""
        data: dict[str, Any] = _finite(asdict(self))
        for name in _LATER:
            if data["router"][name] == _DEFAULTS[name]:
                del data["router"][name]
        for later, held in (("own_rest", data), ("latent", data), ("empty", data["experts"])):
            if not held[later]:
                del held[later]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MoESpec:
        router, shared = dict(data["router"]), data["shared"]
        if router.get("groups") is not None:
            groups = dict(router["groups"])
            router["groups"] = Groups(**{**groups, "outside": float(groups["outside"])})
        return cls(
            hidden=data["hidden"],
            router=RouterSpec(**router),
            experts=ExpertsSpec(**data["experts"]),
            shared=None if shared is None else SharedSpec(**shared),
            at=data.get("at", "block"),
            output_bias=data.get("output_bias", False),
            results=data.get("results", ""),
            own_rest=data.get("own_rest", False),
            latent=data.get("latent"),
        )


_LATER = ("ranks", "ranked_dtype", "cap_dtype")
_DEFAULTS = {field.name: field.default for field in fields(RouterSpec)}


def _finite(value: Any) -> Any:
    """Numbers that JSON has no form for, as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and value in (float("inf"), -float("inf")) else value
