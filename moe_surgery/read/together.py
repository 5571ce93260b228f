"""What several records of a module say together of its experts: the same of every token, and of each by its number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

from moe_surgery.read.parse.mlp import MLPRead
from moe_surgery.read.parse.router import Precisions, RouterRead
from moe_surgery.read.parse.token_output import SharedRead, TokenRead
from moe_surgery.read.parsed import Record
from moe_surgery.read.reading import Unreadable
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from moe_surgery.weights.layout import Layout


def same_experts(
    records: Iterable[Record], first: TokenRead, total: int, *, split: bool = False
) -> tuple[MLPRead | None, ...]:
    """Every expert's MLP, checked to be met by the routing weight of its own number, the same in all records.

    None for one that no token sent to it meets, which only a block may have that is ``split``.
    """
    found: dict[int, MLPRead | None] = {}
    for record_ in records:
        for number, (token, ids) in enumerate(zip(record_.tokens, record_.ids.tolist(), strict=True)):
            if _alike(token) != _alike(first, token):
                raise Unreadable(f"it treats tokens or batches differently: {_difference(token, first)}")
            if len(ids) != len(token.slots):
                raise Unreadable(f"it uses {len(token.slots)} of {len(ids)} routing weights")
            for expert, mlp in zip(ids, token.slots, strict=True):
                if mlp is None and not split:
                    raise Unreadable(f"expert {expert} takes no part in the output of token {number}")
                if found.setdefault(expert, mlp) != mlp:
                    raise Unreadable(f"expert {expert} is {_named(mlp)} for token {number}, elsewhere another")
    if sorted(found) != list(range(total)):
        raise Unreadable(f"its router scores {total} experts, of which {len(found)} are used")
    return tuple(found[number] for number in range(total))


def _named(mlp: MLPRead | None) -> str:
    return "none" if mlp is None else "its input" if mlp.identity else str(mlp.pieces.down)


def renumbered(experts: tuple[MLPRead | None, ...]) -> tuple[int, ...]:
    """The new number of each expert: those that have weights come first, then identities, then those that are none."""
    kinds = [2 if expert is None else int(expert.identity) for expert in experts]
    order = sorted(range(len(experts)), key=lambda number: kinds[number])
    return tuple(order.index(number) for number in range(len(experts)))


def layout_of(first: TokenRead, experts: Sequence[MLPRead | None]) -> Layout:
    """Where the weights of a block are that was read so."""
    return Layout(
        router=first.router.piece,
        experts=tuple(expert.pieces for expert in experts if expert is not None and not expert.identity),
        shared=first.shared.mlp.pieces if first.shared else None,
        shared_gate=first.shared.gate if first.shared else None,
        router_bias=first.router.bias,
        correction_bias=first.router.correction,
        output_bias=first.output_bias,
    )


def router_spec(router: RouterRead, precisions: Precisions, *, wide_matrix: bool) -> RouterSpec:
    """The spec of a router that was read so and rounds with such ``precisions``."""
    return RouterSpec(
        num_experts=router.num_experts,
        top_k=router.top_k,
        scoring=router.scoring,
        renormalize=router.renormalize,
        scale=router.scale,
        logits_dtype=precisions.logits,
        weights_dtype=precisions.weights,
        scores_dtype=precisions.scores,
        bias=router.bias is not None,
        soft_cap=router.soft_cap,
        correction_bias=router.correction is not None,
        groups=router.groups,
        epsilon=router.epsilon,
        floor=router.floor,
        norm=router.norm,
        ranks=router.ranks,
        ranked_dtype=precisions.ranked,
        cap_dtype=precisions.cap,
        wide_matrix=wide_matrix,
    )


def experts_spec(experts: Sequence[MLPRead | None], first: TokenRead) -> ExpertsSpec:
    """What all experts have in common."""
    acting = [expert for expert in experts if expert is not None]
    real = [expert for expert in acting if not expert.identity]
    if not real:
        raise Unreadable("none of its experts has weights")
    for what, values in (
        ("width", {expert.width for expert in real}),
        ("activation", {str(expert.mix) for expert in real}),
        ("what they add", {"their input" if expert.residual else "nothing" for expert in real}),
        ("biases", {tuple(bias is not None for bias in expert.pieces.biases()) for expert in real}),
    ):
        if len(values) > 1:
            raise Unreadable(f"its experts differ in {what}: {', '.join(sorted(map(str, values)))}")
    pieces, mix = real[0].pieces, real[0].mix
    return ExpertsSpec(
        len(real),
        real[0].width,
        mix.activation,
        mix.gated,
        mix.limit,
        mix.limit_after,
        mix.alpha,
        mix.offset,
        biases=any(bias is not None for bias in pieces.biases()),
        weights_on="input" if first.on_input else "output",
        identities=len(acting) - len(real),
        empty=len(experts) - len(acting),
    )


def adds_inputs(experts: Sequence[MLPRead | None]) -> bool:
    """Whether every expert adds its input to what it makes.

    Raises :class:`Unreadable` if there are others beside these, that return their input or nothing.
    """
    if not any(expert is not None and expert.residual for expert in experts):
        return False
    if any(expert is None or expert.identity for expert in experts):
        raise Unreadable("its experts add their input, and some return it, or nothing")
    return True


def with_inputs(spec: MoESpec) -> MoESpec:
    """The spec of experts that add their input: each token visits one more, which returns it."""
    router = replace(spec.router, num_experts=spec.router.num_experts + 1, top_k=spec.router.top_k + 1)
    return replace(spec, router=router, experts=replace(spec.experts, identities=1))


def _alike(token: TokenRead, other: TokenRead | None = None) -> tuple[object, ...]:
    """What must be the same of two tokens: less, if either of them meets no expert."""
    alone = token.silent or (other is not None and other.silent)
    return (token.shared, token.output_bias) if alone else but_slots(token)


def but_slots(token: TokenRead) -> tuple[object, ...]:
    """What was read of a token but for its experts, which are others for another token."""
    return token.router, token.shared, token.output_bias, token.on_input


def _difference(token: TokenRead, first: TokenRead) -> str:
    for mine, other in ((token.router, first.router), (token.shared, first.shared)):
        if mine is not None and other is not None:
            for field in fields(mine):
                values = getattr(mine, field.name), getattr(other, field.name)
                if values[0] != values[1]:
                    return f"{field.name} is {values[0]} for one, {values[1]} for another"
    return "not all meet a shared expert"


def shared_spec(shared: SharedRead | None) -> SharedSpec | None:
    """The spec of the shared expert that all tokens meet, if they meet one."""
    if shared is None:
        return None
    mlp, mix = shared.mlp, shared.mlp.mix
    return SharedSpec(
        mlp.width,
        mix.activation,
        "sigmoid" if shared.gate is not None else None,
        shared.scale,
        mix.gated,
        mix.limit,
        mix.limit_after,
        mix.alpha,
        mix.offset,
    )


def check_identities(slots: Iterable[MLPRead | None], split: bool) -> None:
    """Experts that return their input are taken where the block is split in front of all of them."""
    if not split and any(slot is not None and slot.identity for slot in slots):
        raise Unreadable("some of what its router scores are experts that return their input")
