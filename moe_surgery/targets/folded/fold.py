"""What the folded kernels are given: the spec in their numbers, and the weights as they lie in the model."""

from __future__ import annotations

from dataclasses import replace

from moe_surgery.kernels.arguments import RouterTerms, Terms, Weights
from moe_surgery.spec import MoESpec
from moe_surgery.targets.folded.fitness import beside as objections_to_fold
from moe_surgery.targets.folded.fitness import outside
from moe_surgery.targets.shared_as_experts import slices, unfoldable
from moe_surgery.weights.tensors import BlockTensors


def terms_of(spec: MoESpec, *, given: bool = False, beside: bool = False) -> Terms:
    """The spec in the kernels' numbers; its shared width must be a multiple of the expert width.

    Where experts and their weights are ``given``, the router's numbers say nothing. A shared expert that is computed
    ``beside`` the kernels has no slices.
    """
    router, experts, shared = spec.router, spec.experts, None if beside else spec.shared
    for reason in () if beside else unfoldable(spec):
        raise ValueError(reason)
    terms = Terms(
        experts=experts.num_experts,
        top_k=router.top_k,
        slices=0 if beside else slices(spec),
        hidden=spec.hidden,
        width=experts.width,
        # The factor in a silu's sigmoid makes a silu of whatever it is in.
        activation="silu" if experts.alpha != 1.0 else experts.activation,
        given=given,
        up=experts.gated,
        limit=float(experts.limit or 0.0),
        limit_after=experts.limit_after,
        alpha=float(experts.alpha),
        offset=float(experts.offset),
        on_input=experts.weights_on == "input",
        biases=experts.biases,
    )
    if given:
        return terms
    return replace(
        terms,
        sigmoid=router.scoring == "sigmoid",
        renormalize=router.renormalize,
        scale=float(router.scale),
        shared_scale=float(shared.scale) if shared is not None else 1.0,
        gated=shared is not None and shared.gate is not None,
        native=router.logits_dtype == "native",
        by_sigmoid=router.scoring == "sigmoid" and router.ranks == "scores",
    )


def folded_terms(spec: MoESpec, dtype: str, *, scaled: bool = False) -> Terms:
    """The numbers that the folded target's block of ``spec`` gives the kernels in a model of ``dtype``.

    ``scaled`` where its experts are in e4m3.
    """
    given, apart = is_given(spec, dtype)
    return replace(terms_of(spec, given=given, beside=apart), scaled=scaled)


def is_given(spec: MoESpec, dtype: str) -> tuple[bool, bool]:
    """Whether experts are chosen outside of the experts' kernels, and whether the shared expert is computed beside."""
    given = spec.at == "experts" or next(outside(spec, dtype), None) is not None
    return given, given and spec.shared is not None and next(objections_to_fold(spec), None) is not None


def router_terms_of(spec: MoESpec, *, beside: bool = False) -> RouterTerms:
    """The router of ``spec`` in the numbers of its kernel, which gives the shared expert's weight too.

    It doesn't where that expert is computed ``beside`` the kernels.
    """
    router, groups, shared = spec.router, spec.router.groups, None if beside else spec.shared
    return RouterTerms(
        experts=router.num_experts,
        top_k=router.top_k,
        slices=0 if beside else slices(spec),
        hidden=spec.hidden,
        scoring=router.scoring,
        by_logits=router.ranks == "logits",
        native=router.logits_dtype == "native",
        soft_cap=float(router.soft_cap or 0.0),
        groups=1 if groups is None else groups.count,
        chosen=1 if groups is None else groups.chosen,
        top2=groups is not None and groups.score == "top2",
        lowest=groups is not None and groups.outside != 0.0,
        renormalize=router.renormalize,
        epsilon=float(router.epsilon),
        floor=float(router.floor),
        squares=router.norm == 2.0,
        scale=float(router.scale),
        shared_scale=float(shared.scale) if shared is not None else 1.0,
        biased=router.bias,
        corrected=router.correction_bias,
        gated=shared is not None and shared.gate is not None,
    )


def fold(tensors: BlockTensors, *, beside: bool = False) -> Weights:
    """The kernels' weights, by reference to all that is contiguous; ``beside`` without the shared expert's."""
    t = tensors
    parts = (t.router, t.w13, t.w2, t.shared_gate, t.shared_gate_proj, t.shared_up_proj, t.shared_down_proj)
    router, w13, w2, *shared = (None if part is None else part.contiguous() for part in parts)
    assert router is not None and w13 is not None and w2 is not None
    biases = (None if bias is None else bias.contiguous() for bias in (t.w13_bias, t.w2_bias))
    return Weights(router, w13, w2, *([None] * 4 if beside else shared), *biases)
