"""A record with a meaning: what it says of every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moe_surgery.answers import Replayed, Result, Structure, Updated, mapped_leaves
from moe_surgery.read.meaning.interpreter import Interpreter
from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.rows import vectors
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.parse.above_zero import check_above_zero
from moe_surgery.read.parse.results import parse_results
from moe_surgery.read.parse.rounding import Rounding
from moe_surgery.read.parse.successive import joined
from moe_surgery.read.parse.token_output import TokenParser, TokenRead, Unweighted
from moe_surgery.read.parse.top_k import Ranking
from moe_surgery.read.reading import Outside, Silent, Unreadable
from moe_surgery.read.record.attributes import Attributes
from moe_surgery.read.record.flow import Choice, Flow, Given, Ref
from moe_surgery.read.record.lineage import form

NO_TOP_K = "it has no top-k"
MIXES = "it has no top-k: every token goes through all of its experts, and each has a weight"
COMPARES = "it has no top-k: which of its experts counts is told by comparing what it computes with a number"


@dataclass(frozen=True)
class Cut:
    """Where a record is split: at the first ``count`` ids of choices, and the operation that gives their weights.

    ``entering`` is the operation that gives the experts' input, where that isn't the block's; ``routed`` the one that
    gives their weighted sum, where the block's output is more than that. ``computed`` are the ids [T, count], where
    they are calculated from what was chosen, as those of the best expert of every group. ``turned`` weights are [k, T].
    There may be no ``weights``: then each is 1.
    """

    choices: tuple[int, ...]
    weights: int | None
    count: int
    entering: int | None = None
    routed: int | None = None
    computed: Given | None = None
    turned: bool = False

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is alike in the cuts of two records of one block."""
        computed = None if self.computed is None else form(self.computed.origin)
        return *self.choices, self.count, computed, self.turned, self.weights is None


@dataclass(frozen=True)
class Record:
    """A parsed record: every token's output, the experts it was sent to, ``ids`` [T, k], results, and attributes.

    ``ranked`` is how many experts were ranked to find these k. ``cut`` is where a block with a router of its own is
    split, and ``flow`` the record itself.
    """

    tokens: tuple[TokenRead, ...]
    ids: Tensor
    ranked: int
    results: Structure | None = None
    kept: Attributes = field(default_factory=dict)
    lone: bool = False
    used: frozenset[str] = frozenset()
    flow: Flow | None = None
    cut: Cut | None = None

    def with_replayed(self, flow: Flow) -> Record:
        """The same with the results and attributes of ``flow``, all of which its own operations go on computing."""
        lead = next(op.shape[:-1] for op in flow.ops if op.name == "input")
        known = {"flat": (torch.Size(lead).numel(),), "batch": lead}

        def leaf(leaf: Any) -> Any:
            if not isinstance(leaf, Given) or leaf.value is not None:
                return Replayed(leaf.where, leaf.number) if isinstance(leaf, Given) else leaf
            leads = frozenset(name for name, shape in known.items() if leaf.shape[:-1] == shape)
            return Result("output", frozenset(["native"]), leads)

        results = None if flow.results is None else flow.results.mapped(leaf)
        return replace(self, results=results, kept=replayed(flow.kept), flow=flow)

    @property
    def one_by_one(self) -> bool:
        return self.flow is not None and self.flow.one_by_one

    @property
    def within(self) -> frozenset[int]:
        return frozenset() if self.flow is None else self.flow.within

    @property
    def beyond(self) -> frozenset[tuple[int, int]]:
        return frozenset() if self.flow is None else self.flow.beyond

    def with_beyond(self, more: frozenset[tuple[int, int]]) -> Record:
        """The same where another branch has cuts beyond the batch too."""
        assert self.flow is not None
        return replace(self, flow=replace(self.flow, beyond=self.flow.beyond | more)) if more else self

    @property
    def lead(self) -> tuple[int, ...]:
        """The input's dimensions before the last."""
        return self.shape[:-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The input's shape."""
        assert self.flow is not None
        return next(op.shape for op in self.flow.ops if op.name == "input")

    @property
    def first(self) -> TokenRead:
        """A token that meets an expert."""
        return next(token for token in self.tokens if not token.silent)

    @property
    def inner(self) -> int:
        """The size of what the routed experts are given, and return."""
        assert self.flow is not None
        entering = None if self.cut is None else self.cut.entering
        start = next(op for op in self.flow.ops if op.name == "input") if entering is None else self.flow.ops[entering]
        return int(start.shape[-1])

    @property
    def says(self) -> tuple[object, ...]:
        return self.tokens, self.results, self.kept


def parse_record(flow: Flow, dtype: torch.dtype, run: Interpreter | None = None) -> Record:
    """What a record says of every token. ``run`` is what its operations mean, where that is known."""
    try:
        return _parsed(flow, dtype, run)
    except Silent:
        raise
    except Unreadable as error:
        if flow.outside:
            raise Outside(str(error)) from error
        raise


def _parsed(flow: Flow, dtype: torch.dtype, run: Interpreter | None) -> Record:
    run = run or Interpreter(flow, Terms())
    terms = run.terms
    if not flow.choices:
        raise Unreadable(COMPARES if _compares(flow) else MIXES if _mixes(flow, run) else NO_TOP_K)
    output = vectors(run.rows(flow.output), terms)
    size = next(op.shape[-1] for op in flow.ops if op.name == "input" and op.args[0] == "hidden_states")
    native = str(dtype).removeprefix("torch.")
    count = output.lead.size
    rankings = [_rankings(number, choice, run, terms, count) for number, choice in enumerate(flow.choices)]
    rankings, choices = joined(rankings, flow.choices, terms, Rounding(native, terms).bare)
    weights = next((op for op in flow.ops if op.name == "input" and op.args[0] == "weights"), None)
    given, ones = (0, False) if weights is None else (weights.shape[-1], "ones" in weights.kwargs)
    parsing = [
        partial(TokenParser, terms.token(n, size), native, terms, [seen[n] for seen in rankings], given, ones)
        for n in range(count)
    ]
    try:
        parsers, tokens = _tokens(list(output.lead.reshape(-1)), parsing)
    except Unreadable as error:
        if (reason := _not_of_tokens(flow, count, error)) is not None:
            raise Unreadable(reason) from error
        raise
    check_above_zero(flow, run)
    if all(token.silent for token in tokens):
        raise Silent("no routed experts (weights of a top-k times an MLP) in its output")
    choice = choices[tokens[0].router.choice]
    ids = choice.ids.reshape(count, -1)
    if not given:
        ids = ids[:, : tokens[0].router.top_k]
    lead = next(op.shape[:-1] for op in flow.ops if op.name == "input" and op.args[0] == "hidden_states")
    results = parse_results(replace(flow, choices=choices), run, native, tokens[0].router, parsers, lead)
    return Record(tokens, ids, choice.k, results, replayed(flow.kept), flow.lone, flow.used, flow)


def _tokens(
    terms: list[Term], parsing: Sequence[Callable[[bool], TokenParser]]
) -> tuple[list[TokenParser], tuple[TokenRead, ...]]:
    """Every token's output read, each by a parser of its own."""
    parsers: list[TokenParser] = []
    tokens: list[TokenRead] = []
    first = False  # whether the first of several that are chosen computes alone, without a weight
    for number, term in enumerate(terms):
        try:
            parser = parsing[number](first)
            token = parser.parse(term)
        except Unweighted:
            if number:
                raise
            parser, first = parsing[number](True), True
            token = parser.parse(term)
        parsers.append(parser)
        tokens.append(token)
    return parsers, tuple(tokens)


def _not_of_tokens(flow: Flow, count: int, error: Unreadable) -> str | None:
    """How a record that can't be read chooses for something else than each of its ``count`` tokens, if it does."""
    rows = {choice.ids.numel() // choice.k for choice in flow.choices}
    if isinstance(error, Unweighted) and max(rows) < count:
        return "it chooses experts for several tokens at once, and not for each of them"
    [each, *others] = rows
    if not others and each > count and each % count == 0:
        return f"it chooses experts {each // count} times for every token, as for parts of it"
    return None


def _mixes(flow: Flow, run: Interpreter) -> bool:
    """Whether a record without a choice is a weighted sum of several MLPs, with weights that come of the input."""
    with suppress(Unreadable):
        token = Rounding("", run.terms).bare(vectors(run.rows(flow.output), run.terms).lead.reshape(-1)[0])
        return sum(map(_weighted_mlp, token.args if token.op == "add" else ())) > 1
    return False


def _compares(flow: Flow) -> bool:
    """Whether a record takes one or the other of two results, of which each is made by matrices of its own."""
    for op in flow.ops:
        if op.name == "where" and len(op.args) == 3 and all(isinstance(arg, Ref) for arg in op.args):
            told, *ways = (_weights_behind(flow, arg.index) for arg in op.args)
            if told and all(len(one - other) > 1 for one, other in (ways, ways[::-1])):
                return True
    return False


def _weights_behind(flow: Flow, index: int) -> frozenset[str]:
    """The weights that the result of an operation comes of."""
    found, waiting = set[int](), [index]
    while waiting:
        place = waiting.pop()
        waiting += flow.ops[place].operands - found
        found.add(place)
    return frozenset(flow.ops[place].args[0] for place in found if flow.ops[place].name == "param")


def _weighted_mlp(term: Term) -> bool:
    """Whether a term is a number made by a linear map times a vector made by two, one after another."""
    parts, known = term.args if term.op == "mul" else (), dict[int, int]()
    weights = any(_maps(part, known) > 0 for part in parts if part.size == 1)
    return weights and any(_maps(part, known) > 1 for part in parts if part.size > 1)


def _maps(term: Term, known: dict[int, int]) -> int:
    """How many linear maps a term is made by, one after another; ``known`` are those of other terms."""
    if term.uid not in known:
        inner = [leaf for leaf in tree_leaves(term.args) if isinstance(leaf, Term)]
        known[term.uid] = (term.op == "lin") + max((_maps(part, known) for part in inner), default=0)
    return known[term.uid]


def replayed(kept: Attributes) -> Attributes:
    """Attributes, with what came of the input named."""

    def named(path: str, value: Any) -> Any:
        if not isinstance(value, Given):
            return value
        where = attribute(path, value.where)
        return Updated(where) if value.state else Replayed(where, value.number)

    return {key: mapped_leaves(value, partial(named, key[0])) for key, value in kept.items()}


def attribute(path: str, name: str) -> str:
    """What an attribute of a module in the block is called."""
    return f"self.{path}.{name}" if path else f"self.{name}"


def _rankings(number: int, choice: Choice, run: Interpreter, terms: Terms, count: int) -> list[Ranking]:
    """A choice as each of ``count`` tokens met it; one that isn't made once per token has no ids."""
    scores = vectors(run.rows(choice.scores), terms).lead.reshape(-1)
    if not len(scores):
        raise Unreadable("it doesn't rank once per token")
    if len(scores) != count:
        return [Ranking(number, scores[0], choice.k, (), choice.largest)] * count
    ids = choice.ids.reshape(count, -1).tolist()
    return [Ranking(number, scores[row], choice.k, tuple(ids[row]), choice.largest) for row in range(count)]
