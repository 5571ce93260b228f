"""Answering as the replaced block did: its arguments, and the results that it returned beside its output."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_surgery.answers import (
    Always,
    Constant,
    OfSeveral,
    Replayed,
    Result,
    ShapeOfInput,
    SizeOfInput,
    Structure,
    Updated,
    Written,
)
from moe_surgery.calling import Calling
from moe_surgery.replay import Begun
from moe_surgery.spec import MoESpec
from moe_surgery.targets.formula import Arithmetic, capped, ranked, scored, weighted
from moe_surgery.targets.own_part import OwnPart
from moe_surgery.weights.tensors import BlockTensors


@dataclass(frozen=True, eq=False)
class Convention:
    """How the replaced block was called, what it returned, and which attributes it wrote.

    Tensors are the router's own, by reference. ``own`` is the part of the block that its own operations go on
    computing; ``written`` are attributes, by module and name, that come of it, or None for the input's shape.
    ``state`` are the buffers of the block that every call changes, and what of ``own`` they are changed to. A ``bare``
    one takes the input alone, and answers with the output alone.
    """

    calling: Calling
    results: Structure | None = None
    own: OwnPart | None = None
    written: tuple[tuple[tuple[str, str], Written], ...] = ()
    state: tuple[tuple[str, str], ...] = ()
    bare: bool = False
    spec: MoESpec | None = None
    router: Tensor | None = None
    router_bias: Tensor | None = None
    correction_bias: Tensor | None = None

    @classmethod
    def of(
        cls,
        spec: MoESpec,
        calling: Calling,
        results: Structure | None,
        tensors: BlockTensors,
        own: OwnPart | None = None,
        kept: Sequence[tuple[tuple[str, str], Any]] = (),
    ) -> Convention:
        """The convention of a block that was read so; ``kept`` are the attributes that it writes."""
        state = tuple((name, value.where) for (_, name), value in kept if isinstance(value, Updated))
        written = tuple(
            (place, value) for place, value in kept if isinstance(value, Written) and not isinstance(value, Updated)
        )
        if results is None:
            bare = calling.plain and own is None and not written and not state
            return cls(calling, None, own, written, state, bare)
        router = tensors.router, tensors.router_bias, tensors.correction_bias
        return cls(calling, results, own, written, state, False, spec, *router)

    def answer(self, x: Tensor, output: Tensor, replayed: Mapping[str, Tensor]) -> Any:
        """The results of a call with ``x`` [..., H] whose output is ``output``, and what was ``replayed`` of it."""
        if self.results is None:
            return output
        values: dict[str, Any] = {}

        def leaf(leaf: Any) -> Any:
            if isinstance(leaf, Constant):
                return _full(leaf, x)
            if isinstance(leaf, Replayed):
                return leaf.of(replayed)
            if isinstance(leaf, SizeOfInput):
                return leaf.of(x.shape)
            if not isinstance(leaf, Result):
                return leaf
            if leaf.value == "output":
                return output.reshape(-1, output.shape[-1]) if leaf.flat else output
            if not values:
                values.update(self.routed(x.reshape(-1, x.shape[-1])))
            value = self._valued(leaf, values)
            dtype = x.dtype if leaf.dtype == "native" else getattr(torch, leaf.dtype)
            return value.to(dtype).reshape(*((-1,) if leaf.flat else x.shape[:-1]), value.shape[-1])

        return self.results.made(leaf)

    def values(self, x: Tensor, replayed: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, str], Any]]:
        """What a call with ``x`` writes, by the old block's module or object and the attribute's name."""

        def made(value: Any) -> Any:
            match value:
                case Replayed():
                    return value.of(replayed)
                case SizeOfInput():
                    return value.of(x.shape)
                case ShapeOfInput():
                    shape = x.shape if "batch" in value.leads else x.reshape(-1, x.shape[-1]).shape
                    return tuple(shape) if value.plain else shape
                case Always():
                    same = value.value
                    return _full(same, x) if isinstance(same, Constant) else same
            return value

        for place, value in self.written:
            if isinstance(value, OfSeveral):
                if x.shape[:-1].numel() == 1:
                    continue
                value = value.value
            yield place, value.made(made) if isinstance(value, Structure) else made(value)

    def begun(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Begun | None:
        """What the block's own operations compute of its input and of ``tensors`` beside it, if anything."""
        form, given = self.calling.form, tensors.get("hidden_states")
        sides = None if form is None or given is None else form.lead(given)[1:]
        return None if self.own is None else self.own.replay(x, tensors, sides)

    def routed(self, x: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Logits, scores, what is ranked, and ids, of tokens [T, H]; computed in ``dtype``, or as the block does."""
        assert self.spec is not None and self.router is not None
        router = self.spec.router
        arithmetic = Arithmetic(x.dtype) if dtype is None else Arithmetic(dtype, dtype)
        work = arithmetic.of(router.logits_dtype)
        bias = None if self.router_bias is None else self.router_bias.to(work)
        logits = F.linear(x.to(work), self.router.to(work), bias)
        limited = capped(router, logits, arithmetic)
        scores = scored(router, limited, arithmetic)
        by = ranked(router, limited, scores, self.correction_bias, arithmetic)
        return {"logits": logits, "scores": scores, "ranked": by, "ids": by.topk(router.top_k, -1).indices}

    @staticmethod
    def _valued(leaf: Result, values: dict[str, Any]) -> Tensor:
        if leaf.weighting is None:
            found: Tensor = values[leaf.value]
            return found
        return weights_of(leaf, values)


def _full(leaf: Constant, x: Tensor) -> Tensor:
    """A tensor that is the same in every call, in a call with ``x``."""
    dtype = x.dtype if leaf.dtype == "native" else getattr(torch, leaf.dtype)
    return torch.full(leaf.shape, leaf.value, dtype=dtype, device=x.device)


def weights_of(leaf: Result, values: dict[str, Any]) -> Tensor:
    """The routing weights that a result is, [T, k], or [T, E] where it is dense."""
    assert leaf.weighting is not None
    scores, ids = values["scores"], values["ids"]
    weights = weighted(leaf.weighting, scores, ids)
    if leaf.value == "weights":
        return weights
    return torch.zeros_like(scores).scatter(-1, ids, weights)


Forward = TypeVar("Forward", bound=Callable[..., Any])


def answering(forward: Forward) -> Forward:
    """A block's forward, of its input alone, that is called and answers as the block's ``convention`` says."""

    @functools.wraps(forward)
    def answered(self: Any, *given: Any, **named: Any) -> Any:
        convention: Convention | None = self.convention
        if convention is None:
            return forward(self, *given, **named)
        if convention.bare and len(given) == 1 and not named:
            convention.calling.check(given[0])
            return forward(self, given[0])
        tensors = convention.calling.taken(given, named)
        x = convention.calling.tokens(tensors["hidden_states"])
        return self.answer(x, forward(self, x), convention.begun(x, tensors), tensors["hidden_states"])

    return answered  # type: ignore[return-value]


def without_renormalising(leaf: Result) -> Result:
    """A wrong twin of weights: those that the other kind of router would return."""
    assert leaf.weighting is not None
    return replace(leaf, weighting=replace(leaf.weighting, renormalize=not leaf.weighting.renormalize))
