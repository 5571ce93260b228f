"""Reading a block: from its dataflow to a :class:`~moe_surgery.spec.MoESpec`, refusing whatever isn't accounted for.

The block is recorded four times: with 3-D input in bfloat16 and every token on the same few experts; with many more
tokens in float32 and every expert visited; with one token; and with 2-D input where the block takes it, in the dtype
of its own weights. All records must say the same. So a branch on load, batch shape or dtype that one record can't show
is seen as a difference between two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from moe_surgery.find.check import check_complete, check_site
from moe_surgery.find.dataflow import record
from moe_surgery.find.experts import own_forward
from moe_surgery.find.flow import Flow, Route
from moe_surgery.find.interpret import Interpreter
from moe_surgery.find.parse import MLPRead, SharedRead, TokenParser, TokenRead
from moe_surgery.find.result import ChildShape, Reading, Unfollowed, Unreadable
from moe_surgery.find.rows import vectors
from moe_surgery.find.terms import Terms
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
from moe_surgery.weights.layout import Layout, Piece

_BATCHES = ((3, 5), (5, 7), (7, 11), (11, 13), (13, 17), (17, 19), (19, 23), (23, 29), (29, 31), (37, 41))
_MANY = 65  # tokens: more than the thresholds that blocks are known to branch at


@dataclass(frozen=True)
class _Record:
    tokens: tuple[TokenRead, ...]
    ids: Tensor


def read(block: nn.Module) -> Reading:
    """What ``block`` computes. No weight is touched; weights may be on the meta device.

    Raises :class:`~moe_surgery.find.result.Unreadable` with the reason if anything in it can't be accounted for.
    """
    state = check_site(block)
    hidden = _hidden_sizes(state)
    with own_forward(block):
        crowded = _first(block, hidden, state)
        router = crowded.tokens[0].router
        width = crowded.width
        own = next(iter(state.values())).dtype
        tokens = max(_MANY, router.num_experts // router.top_k + 1)
        batch = _batch(state, tokens, router.num_experts, router.top_k)
        records = [
            crowded.record,
            _tokens(block, (*batch, width), torch.float32, _spread),
            _parse(record(block, (1, 1, width), own, _spread, plain=True), own),
        ]
        records += _if_it_takes(block, (2, 3, width), own, plain=True)
        few = _batch(state, 16, router.num_experts, router.top_k)
        records += _if_it_takes(block, (few[0] * few[1], width), own, plain=False)
    first = crowded.tokens[0]
    experts = _experts(records, first)
    layout = Layout(
        router=router.piece,
        experts=tuple(expert.pieces for expert in experts),
        shared=first.shared.mlp.pieces if first.shared else None,
        shared_gate=first.shared.gate if first.shared else None,
    )
    spec = MoESpec(
        hidden=width,
        router=RouterSpec(
            num_experts=router.num_experts,
            top_k=router.top_k,
            scoring=router.scoring,
            renormalize=router.renormalize,
            scale=router.scale,
            logits_dtype=first.logits_dtype,
            weights_dtype=first.weights_dtype,
        ),
        experts=ExpertsSpec(len(experts), experts[0].width, experts[0].activation),
        shared=_shared_spec(first.shared),
    )
    check_complete(state, layout, spec)
    return Reading(spec, layout, _combine(spec, layout), _children(spec, layout))


def _hidden_sizes(state: dict[str, Tensor]) -> list[int]:
    """The sizes that the input's last dimension may have, likeliest first: those most weights share."""
    count: Counter[int] = Counter()
    for tensor in state.values():
        if tensor.ndim >= 2:
            count.update(set(tensor.shape[-2:]))
    return [size for size, _ in count.most_common()]


def _batch(state: dict[str, Tensor], tokens: int, *avoid: int) -> tuple[int, int]:
    """A batch of at least ``tokens`` tokens whose sizes are mistaken for no other size in the block.

    One more than a size is a size too: of one-hot masks with a class for no expert.
    """
    sizes = {size + more for tensor in state.values() for size in tensor.shape for more in (0, 1)} | set(avoid)
    for first, second in _BATCHES:
        if first * second >= tokens and not {first, second, first * second} & sizes:
            return first, second
    raise Unreadable("no batch to probe it with differs from all of its sizes")


@dataclass(frozen=True)
class _Crowded:
    record: _Record
    width: int

    @property
    def tokens(self) -> tuple[TokenRead, ...]:
        return self.record.tokens


def _first(block: nn.Module, widths: list[int], state: dict[str, Tensor]) -> _Crowded:
    """The first record; it also finds the input's width, the number of experts and top-k.

    With a wrong width the block's own forward fails; whatever else is wrong is wrong with any width.
    """
    problem: Unreadable = Unreadable("it has no weights")
    for width in widths:
        try:
            batch = _batch(state, 1)
            found = _tokens(block, (*batch, width), torch.bfloat16, _crowded)
            router = found.tokens[0].router
            known = _batch(state, 1, router.top_k, router.num_experts)
            if known != batch:  # the batch could have been mistaken for top-k
                found = _tokens(block, (*known, width), torch.bfloat16, _crowded)
            return _Crowded(found, width)
        except Unfollowed as error:
            problem = error if width == widths[0] else problem
    raise problem


def _crowded(rows: int, choices: int, k: int) -> Tensor:
    """Every token on one of two sets of experts, in descending order."""
    return (choices - 1 - torch.arange(k)[None, :] - torch.arange(rows)[:, None] % 2) % choices


def _spread(rows: int, choices: int, k: int) -> Tensor:
    """Sets of experts without a pattern, of which the first visit every expert."""
    generator = torch.Generator().manual_seed(rows)
    order = torch.randperm(choices, generator=generator)
    first = [order[start : start + k] for start in range(0, choices - k, k)] + [order[choices - k :]]
    others = torch.rand(max(rows - len(first), 0), choices, generator=generator).argsort(-1)[:, :k]
    return torch.cat([torch.stack(first)[:rows], others])


def _if_it_takes(block: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, plain: bool) -> list[_Record]:
    """A record; none where the block's own forward doesn't take such an input."""
    try:
        flow = record(block, shape, dtype, _crowded, plain=plain)
    except Unfollowed:
        return []
    return [_parse(flow, dtype)]


def _tokens(block: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, route: Route) -> _Record:
    return _parse(record(block, shape, dtype, route), dtype)


def _parse(flow: Flow, dtype: torch.dtype) -> _Record:
    terms = Terms()
    run = Interpreter(flow, terms)
    output = vectors(run.rows(flow.output), terms)
    size = flow.ops[flow.output.index].shape[-1]
    native = str(dtype).removeprefix("torch.")
    if len(flow.choices) != 1:
        raise Unreadable(f"it ranks {len(flow.choices)} times, not once" if flow.choices else "it has no top-k")
    choice = flow.choices[0]
    if not choice.largest:
        raise Unreadable("it chooses the lowest scores")
    tokens = tuple(
        TokenParser(terms.token(number, size), native).parse(term)
        for number, term in enumerate(output.lead.reshape(-1))
    )
    ids = choice.ids.reshape(len(tokens), -1) if choice.ids.numel() == len(tokens) * choice.k else None
    if ids is None:
        raise Unreadable("it doesn't rank once per token")
    return _Record(tokens, ids)


def _experts(records: Iterable[_Record], first: TokenRead) -> tuple[MLPRead, ...]:
    """Every expert's MLP, checked to be met by the routing weight of its own number, the same in all records."""
    found: dict[int, MLPRead] = {}
    for record_ in records:
        for number, (token, ids) in enumerate(zip(record_.tokens, record_.ids.tolist(), strict=True)):
            if (token.router, token.shared) != (first.router, first.shared):
                raise Unreadable(f"it treats tokens or batches differently: {_difference(token, first)}")
            for expert, mlp in zip(ids, token.slots, strict=True):
                if found.setdefault(expert, mlp) != mlp:
                    raise Unreadable(f"expert {expert} is {mlp.pieces.down} for token {number}, elsewhere another")
    total = first.router.num_experts
    if sorted(found) != list(range(total)):
        raise Unreadable(f"its router scores {total} experts, of which {len(found)} are used")
    experts = tuple(found[number] for number in range(total))
    for what in ("width", "activation"):
        values = {getattr(expert, what) for expert in experts}
        if len(values) > 1:
            raise Unreadable(f"its experts differ in {what}: {', '.join(map(str, sorted(values)))}")
    return experts


def _difference(token: TokenRead, first: TokenRead) -> str:
    for mine, other in ((token.router, first.router), (token.shared, first.shared)):
        if mine is not None and other is not None:
            for field in fields(mine):
                values = getattr(mine, field.name), getattr(other, field.name)
                if values[0] != values[1]:
                    return f"{field.name} is {values[0]} for one, {values[1]} for another"
    return "not all meet a shared expert"


def _shared_spec(shared: SharedRead | None) -> SharedSpec | None:
    if shared is None:
        return None
    gate = "sigmoid" if shared.gate is not None else None
    return SharedSpec(shared.mlp.width, shared.mlp.activation, gate, shared.scale)  # type: ignore[arg-type]


def _owner(pieces: Iterable[Piece], role: str) -> str:
    """The block's child that holds all ``pieces``, or the role's own name if no single child does."""
    names = {piece.path.split(".")[0] for piece in pieces}
    return names.pop() if len(names) == 1 else role


def _names(layout: Layout) -> tuple[str, str, str]:
    experts = _owner((piece for mlp in layout.experts for piece in (mlp.gate, mlp.up, mlp.down)), "experts")
    shared = (
        _owner((layout.shared.gate, layout.shared.up, layout.shared.down), "shared_expert") if layout.shared else ""
    )
    gate = _owner((layout.shared_gate,), "") if layout.shared_gate else ""
    return experts, shared, gate


def _combine(spec: MoESpec, layout: Layout) -> str:
    experts, shared, gate = _names(layout)
    text = experts if spec.router.scale == 1.0 else f"{spec.router.scale:g} * {experts}"
    if spec.shared is None:
        return text
    factors = [f"{spec.shared.scale:g}"] if spec.shared.scale != 1.0 else []
    factors += [f"sigmoid({gate})"] if gate else []
    return f"{text} + {' * '.join([*factors, shared])}"


def _children(spec: MoESpec, layout: Layout) -> tuple[tuple[str, ChildShape], ...]:
    experts, shared, gate = _names(layout)
    router = _owner((layout.router,), "router")
    children = [(router, ChildShape("matrix", (spec.router.num_experts, spec.hidden)))]
    children.append((experts, ChildShape("experts", (spec.experts.num_experts, spec.experts.width, spec.hidden))))
    if spec.shared:
        children.append((shared, ChildShape("mlp", (spec.shared.width, spec.hidden))))
    if gate:
        children.append((gate, ChildShape("matrix", (1, spec.hidden))))
    return tuple(children)
