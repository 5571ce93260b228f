"""From formulas to meaning: one token's output as routed experts plus a shared expert, or the reason why not.

Every factor of every summand must find its place. What is left over is named in the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from moe_surgery.read.meaning.normal_form import Terms
from moe_surgery.read.meaning.term import Term
from moe_surgery.read.meaning.wholes import gathered
from moe_surgery.read.parse.mlp import IDENTITY, MLPParser, MLPRead, short
from moe_surgery.read.parse.router import ALONE, OWN, SCORED, Precisions, RouterParser, RouterRead, Weight
from moe_surgery.read.parse.top_k import Ranking
from moe_surgery.read.reading import Unreadable
from moe_surgery.weights.layout import Piece

_UNWEIGHTED = "no routed experts (weights of a top-k times an MLP) in its output"
_NOTHING = "as where some experts return nothing or tokens are left out"


@dataclass(frozen=True)
class SharedRead:
    """The shared expert, with the matrix of its sigmoid gate if it has one."""

    mlp: MLPRead
    gate: Piece | None
    scale: float


@dataclass(frozen=True)
class TokenRead:
    """What one token's output is. ``slots[j]`` is the expert met with the j-th routing weight; None for none.

    A ``silent`` one meets none, so that its experts' part of the output tells nothing of how experts are weighted.
    """

    router: RouterRead
    precisions: Precisions
    slots: tuple[MLPRead | None, ...]
    shared: SharedRead | None
    output_bias: Piece | None = None
    on_input: bool = False

    @property
    def silent(self) -> bool:
        return not any(self.slots)


class Unweighted(Unreadable):
    """A token's output has no summand with a routing weight."""


class TokenParser:
    """Parses the output term of one token, whose input row is ``x``, in a record made at dtype ``native``.

    ``given`` is how many routing weights the record starts with, of tokens that may meet no expert; zero if it chooses.
    With ``ones`` it is one weight of 1, which no output says.
    """

    def __init__(
        self,
        x: Term,
        native: str,
        terms: Terms,
        rankings: Sequence[Ranking],
        given: int = 0,
        ones: bool = False,
        first: bool = False,
    ) -> None:
        self.x, self.terms, self.given, self.ones, self.first = x, terms, given, ones, first
        self.mlps = MLPParser(x, native)
        self.routers = RouterParser(x, native, terms, rankings)
        self.bare = self.mlps.bare
        self._routing: dict[int, bool] = {}

    def parse(self, output: Term) -> TokenRead:
        slots: dict[int, MLPRead] = {}
        biases: dict[int, Piece] = {}
        weights: set[Weight] = set()
        shared: list[SharedRead] = []
        output_bias: list[Piece] = []
        on_input: set[bool] = set()
        products = [self._by_choice(product) for product in self._products(gathered(self.terms, self.bare(output)))]
        without = None
        unchosen = self.ones or not self.given
        if products and unchosen and not any(map(self._routed, chain.from_iterable(products))):
            without = Weight(ALONE, Precisions(), 0) if self.ones else self.routers.without(self.first)
            if without is None:
                raise Unweighted(_UNWEIGHTED)
        for factors in products:
            routing = [factor for factor in factors if self._routed(factor)]
            if not routing and without is None:
                alone = self.bare(factors[0])
                if len(factors) == 1 and alone.op == "param":
                    output_bias.append(alone.args[0])
                else:
                    shared.append(self._shared(factors))
                continue
            weight, mlp, applied = self._expert(routing, [f for f in factors if f not in routing], without)
            if isinstance(mlp, Piece):
                if weight.slot in biases:
                    raise Unreadable(f"routing weight {weight.slot} is used more than once")
                biases[weight.slot] = mlp
            else:
                if weight.slot in slots:
                    if without is not None:
                        raise Unweighted(_UNWEIGHTED)
                    mlp = self._with_its_input(slots[weight.slot], mlp, weight.slot)
                slots[weight.slot] = mlp
                on_input.add(applied)
            weights.add(replace(weight, slot=0))
        silent = self.given > 0 and not (slots or biases)
        if not (slots or shared or output_bias or silent):
            raise Unreadable(f"a token that it sends to experts comes to nothing, {_NOTHING}")
        if not (slots or silent):
            raise Unweighted(_UNWEIGHTED)
        if len(shared) > 1:
            raise Unreadable("it adds a second shared expert")
        if len(output_bias) > 1:
            raise Unreadable("it adds two biases to its output")
        beside = (shared[0] if shared else None, output_bias[0] if output_bias else None)
        if silent:
            return TokenRead(ALONE if self.ones else OWN, Precisions(), (None,) * self.given, *beside)
        if len(weights) != 1 or len(on_input) != 1:
            raise Unreadable("its experts are weighted in different ways")
        weight = weights.pop()
        for slot, bias in biases.items():
            if slot not in slots or slots[slot].identity:
                raise Unreadable(f"it adds {bias} times a routing weight")
            slots[slot] = replace(slots[slot], pieces=replace(slots[slot].pieces, down_bias=bias))
        order = self._order(slots, weight.read)
        return TokenRead(weight.read, weight.precisions, order, *beside, on_input.pop())

    def _with_its_input(self, one: MLPRead, other: MLPRead, slot: int) -> MLPRead:
        """What an expert is of which a token's output has two summands of one weight: what it makes, and its input."""
        made = other if one.identity else one
        if not self.given or one.identity == other.identity or made.residual:
            raise Unreadable(f"routing weight {slot} is used more than once")
        return replace(made, residual=True)

    def _by_choice(self, product: list[Term]) -> list[Term]:
        return [self.routers.by_choice(factor) if factor.size == 1 else factor for factor in product]

    def _order(self, slots: dict[int, MLPRead], router: RouterRead) -> tuple[MLPRead | None, ...]:
        if router.scoring == "own":
            return tuple(slots.get(slot) for slot in range(self.given))
        if sorted(slots) != list(range(router.top_k)):
            raise Unreadable(f"it uses {len(slots)} of its top-{router.top_k} routing weights for a token, {_NOTHING}")
        return tuple(slots[slot] for slot in range(len(slots)))

    def _routed(self, term: Term) -> bool:
        """Whether a term depends on the chosen scores."""
        known = self._routing.get(term.uid)
        if known is None:
            known = term.op in ("chosen", "given") or any(map(self._routed, self.terms.inner(term)))
            self._routing[term.uid] = known
        return known

    def _products(self, term: Term) -> Iterator[list[Term]]:
        """The summands of a term as lists of factors, products of sums multiplied out."""
        term = self.bare(term)
        if term.op == "add":
            for arg in term.args:
                yield from self._products(arg)
        elif term.op == "mul":
            sums = [arg for arg in term.args if self.bare(arg).op in ("add", "mul") and arg.size > 1]
            if len(sums) != 1:
                yield list(term.args)
                return
            others = [arg for arg in term.args if arg is not sums[0]]
            for factors in self._products(sums[0]):
                yield [*others, *factors]
        elif not (term.op == "const" and term.args[0] == 0.0):
            yield [term]

    def _expert(
        self, routing: list[Term], others: list[Term], without: Weight | None
    ) -> tuple[Weight, MLPRead | Piece, bool]:
        """A summand as a routed expert, or what it adds, and its weight: the one that it has ``without`` a factor."""
        inside = [factor for factor in routing if self.bare(factor).op == "lin"]
        outside = [factor for factor in routing if factor not in inside]
        scale, others = _constants(others)
        if len(inside) == 1 and len(outside) == 1 and not others and outside[0].size == 1 and scale == 1.0:
            mlp = self.mlps.parse(inside[0], "a routed expert", self.bare(outside[0]))
            return self.routers.parse(outside[0], 1.0), mlp, True
        if inside:
            raise Unreadable("routing weights meet the input of a linear map, not the experts' output")
        through = [factor for factor in routing if factor.size > 1]
        if through:
            raise Unreadable(f"its experts' output goes through {short(through[0])}")
        if len(routing) > 1:
            strange = [factor for factor in routing if self.bare(factor).op not in SCORED] or routing
            raise Unreadable(f"a routed expert's output is multiplied by {short(strange[-1])}")
        if without is not None and scale != 1.0:
            raise Unweighted(_UNWEIGHTED)
        weight = without or self.routers.parse(routing[0], scale)
        if len(others) == 1 and self.bare(others[0]).op == "param":
            return weight, self.bare(others[0]).args[0], False
        if len(others) == 1 and self.bare(others[0]) is self.x:
            return weight, IDENTITY, False
        maps = [factor for factor in others if self.bare(factor).op == "lin"]
        if not maps:
            raise Unreadable(f"it adds {_product(others, scale)} times a routing weight")
        extra = [factor for factor in others if factor not in maps]
        if extra or len(maps) > 1:
            raise Unreadable(f"a routed expert's output is multiplied by {short([*extra, *maps][0])}")
        return weight, self.mlps.parse(maps[0], "a routed expert"), False

    def _shared(self, factors: list[Term]) -> SharedRead:
        scale, factors = _constants(factors)
        maps = [factor for factor in factors if self.bare(factor).op == "lin" and factor.size > 1]
        others = [factor for factor in factors if factor not in maps]
        if not maps:
            raise Unreadable(f"it adds {_product(factors, scale)} to its experts' output")
        if len(maps) > 1:
            raise Unreadable("it multiplies two MLPs")
        gate = None
        for factor in others:
            value = self.bare(factor)
            inner = self.bare(value.args[0]) if value.op == "sigmoid" else value
            if gate is not None or value.op != "sigmoid" or inner.op != "lin" or inner.size != 1:
                raise Unreadable(f"the shared expert is multiplied by {short(value)}")
            if self.bare(inner.args[0]) is not self.x:
                raise Unreadable(f"the shared expert's gate reads {short(inner.args[0])}, not the block's input")
            gate = inner.args[1]
        mlp = self.mlps.parse(maps[0], "the shared expert")
        if any(bias is not None for bias in mlp.pieces.biases()):
            raise Unreadable("the shared expert has biases")
        return SharedRead(mlp, gate, scale)


def _constants(factors: list[Term]) -> tuple[float, list[Term]]:
    scale = 1.0
    for factor in factors:
        if factor.op == "const":
            scale *= factor.args[0]
    return scale, [factor for factor in factors if factor.op != "const"]


def _product(factors: list[Term], scale: float) -> str:
    return " * ".join(map(short, factors)) if factors else f"{scale:g}"
