"""A whole block: a function of its input, a line for people, and data for plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from moe_surgery.spec.experts import ExpertsSpec, SharedSpec
from moe_surgery.spec.router import Groups, RouterSpec


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
        parts = ["experts alone, behind its own router"] if self.at == "experts" else [self.router.sentence()]
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
