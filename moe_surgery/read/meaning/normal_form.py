"""Making terms, in one form: two equal formulas are the same object, so that ``is`` compares meanings.

Constructors on :class:`Terms` bring formulas into that form (sums and products flattened, neutral elements dropped,
``x * sigmoid(x)`` written as silu), so that a block reads the same however its code is spelled. Rewrites are exact in
real arithmetic; rounding is the proof's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from moe_surgery.read.meaning import sums, wholes
from moe_surgery.read.meaning.spelled_out import twice
from moe_surgery.read.meaning.term import WHOLE, Term
from moe_surgery.weights.layout import Piece

_FOLDED: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0,
    "silu": lambda x: x / (1 + math.exp(-x)) if x > -700 else 0.0,
    "tanh": math.tanh,
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "square": lambda x: x * x,
    "pow 2": lambda x: x * x,
}


class Terms:
    """Makes and interns terms. One instance serves one reading."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Term] = {}
        self.exploded: dict[int, tuple[Any, Any]] = {}  # arrays of vectors, with their elements

    def make(self, op: str, args: tuple[Any, ...], size: int) -> Term:
        key = (op, size, args)
        term = self._known.get(key)
        if term is None:
            term = self._known[key] = Term(op, args, size, len(self._known))
        return term

    def token(self, number: int, size: int) -> Term:
        """Row ``number`` of the block's input."""
        return self.make("x", (number,), size)

    def given(self, number: int, count: int) -> Term:
        """Row ``number`` of the routing weights that experts are called with."""
        return self.make("given", (number,), count)

    def outer(self, number: int, size: int) -> Term:
        """Row ``number`` of the input of a block whose experts are given something else."""
        return self.make("outer", (number,), size)

    def const(self, value: float) -> Term:
        return self.make("const", (float(value),), 1)

    def param(self, piece: Piece, size: int) -> Term:
        """A one-dimensional parameter or buffer of the block, or a row of a larger one."""
        return self.make("param", (piece,), size)

    def add(self, *args: Term) -> Term:
        """A sum; scalars broadcast. Constants are folded and zeros dropped."""
        if any(arg.op == "vec" for arg in args):
            return self._element_by_element(self.add, args)
        size = max(arg.size for arg in args)
        flat, constants = _flat("add", args)
        flat = sums.cancelled(self, flat)
        if any(term.op == "lin" and term.args[1].cols for term in flat):
            flat = sums.joined(self, flat)
        if any(term.op == "elem" and term.args[0].op == "chosen" for term in flat):
            flat = sums.summed(self, flat)
        constant = sum(constants)
        if constant == -math.inf:
            return self.const(constant)
        if constant != 0.0 or not flat:
            flat.append(self.const(constant))
        if len(flat) == 1:
            return flat[0]
        return self.make("add", tuple(sorted(flat, key=lambda term: term.uid)), size)

    def mul(self, *args: Term) -> Term:
        """A product of elements; scalars broadcast. Constants are folded; ``x * sigmoid(x)`` becomes ``silu(x)``,
        and a GELU that is spelled out one by name."""
        if any(arg.op == "vec" for arg in args):
            return self._element_by_element(self.mul, args)
        size = max(arg.size for arg in args)
        flat, constants = _flat("mul", args)
        constant = math.prod(constants)
        if constant == 0.0:
            return self.const(0.0)
        for part in [term for term in flat if term.op == "sigmoid"]:
            if part.args[0] in flat and part.size == size:
                flat.remove(part)
                flat.remove(part.args[0])
                flat.append(self.make("silu", part.args, part.size))
        for part in [term for term in flat if term.op == "add"]:
            for argument in [term for term in flat if term is not part]:
                if part in flat and argument in flat and (name := twice(argument, part, _FOLDED)) is not None:
                    flat.remove(part)
                    flat.remove(argument)
                    flat.append(self.make(name, (argument,), argument.size))
                    constant *= 2.0
        if constant != 1.0 or not flat:
            flat.append(self.const(constant))
        if len(flat) == 1:
            return flat[0]
        return self.make("mul", tuple(sorted(flat, key=lambda term: term.uid)), size)

    def div(self, over: Term, under: Term) -> Term:
        """A quotient; ``x / (1 + exp(-y))`` becomes ``x * sigmoid(y)``."""
        if under.op == "vec" or over.op == "vec":
            return self._element_by_element(self.div, (over, under))
        if over.op == "const" and over.args[0] == 0.0:
            return over
        if under.op == "const" and under.args[0] != 0.0:
            return self.mul(over, self.const(1.0 / under.args[0]))
        if under.op == "add" and len(under.args) == 2:
            power = next((part for part in under.args if part.op == "exp"), None)
            if power is not None and any(part.op == "const" and part.args[0] == 1.0 for part in under.args):
                return self.mul(over, self.fn("sigmoid", self.mul(self.const(-1.0), power.args[0])))
        return self.make("div", (over, under), max(over.size, under.size))

    def pick(self, mask: Term, yes: Term, no: Term) -> Term:
        """``yes`` where a known mask is not zero, else ``no``."""
        if mask.op == "const":
            return yes if mask.args[0] != 0.0 else no
        return self._element_by_element(self.pick, (mask, yes, no))

    def _element_by_element(self, function: Callable[..., Term], args: tuple[Term, ...]) -> Term:
        size = max(arg.size for arg in args)
        return self.vec([function(*(self.elem(arg, place) for arg in args)) for place in range(size)])

    def fn(self, name: str, arg: Term) -> Term:
        """An element-wise function of one argument, such as ``silu`` or ``sigmoid``."""
        if arg.op == "const" and name in _FOLDED:
            return self.const(_FOLDED[name](arg.args[0]))
        if arg.op == "vec":
            return self._element_by_element(lambda element: self.fn(name, element), (arg,))
        if arg.op == "cast" and arg.args[0].op == "vec":
            return self.vec([self.fn(name, self.cast(element, arg.args[1])) for element in arg.args[0].args])
        return self.make(name, (arg,), arg.size)

    def clamp(self, arg: Term, low: float, high: float) -> Term:
        """The term between two bounds, either of which may be infinite."""
        if (low, high) == (-math.inf, math.inf):
            return arg
        if arg.op == "vec":
            return self._element_by_element(lambda element: self.clamp(element, low, high), (arg,))
        return self.make("clamp", (arg, low, high), arg.size)

    def cast(self, arg: Term, dtype: str) -> Term:
        """The term rounded to ``dtype``. Rounding of known numbers is left out, as all rounding of weights is."""
        if arg.op == "const":
            return arg
        if arg.op == "cast":
            return (
                self.cast(arg.args[0], dtype) if arg.args[1] == "float32" else self.make("cast", (arg, dtype), arg.size)
            )
        return self.make("cast", (arg, dtype), arg.size)

    def lin(self, arg: Term, matrix: Piece, rows: int, dtype: str) -> Term:
        """A linear map, computed in ``dtype``. Scalar factors of the input are taken out: W(s·v) = s·(W v)."""
        if arg.op == "const" and arg.args[0] == 0.0:
            return arg
        product = arg.args[0] if arg.op == "cast" else arg
        if product.op == "mul":
            scalars = [part for part in product.args if part.size == 1]
            vectors = [part for part in product.args if part.size != 1]
            if scalars and vectors and arg.size != 1:
                rest = self.mul(*vectors) if product is arg else self.cast(self.mul(*vectors), arg.args[1])
                return self.mul(*scalars, self.lin(rest, matrix, rows, dtype))
        if arg.op == "cat" and any(part.op == "const" for part in arg.args[1:]):  # of parts that only some make
            width, *parts = arg.args
            pieces = [matrix.inputs(n * width, (n + 1) * width, arg.size) for n in range(len(parts))]
            maps = [self.lin(part, piece, rows, dtype) for part, piece in zip(parts, pieces, strict=True)]
            return self.add(*maps)
        return self.make("lin", (arg, matrix, dtype), rows)

    def part(self, arg: Term, start: int, stop: int, step: int = 1) -> Term:
        """Elements ``start:stop:step`` of a vector; rows of a linear map become rows of its matrix."""
        count = len(range(start, stop, step))
        if arg.size == 1 or (start, count, step) == (0, arg.size, 1):
            return arg
        if arg.op == "lin":
            inner, piece, dtype = arg.args
            return self.lin(inner, piece.outputs(start, stop, step), count, dtype)
        if arg.op == "param":
            return self.param(arg.args[0].outputs(start, stop, step), count)
        if arg.op == "cast":
            return self.cast(self.part(arg.args[0], start, stop, step), arg.args[1])
        if arg.op == "vec":
            return self.vec(list(arg.args[start:stop:step]))
        if step != 1 and arg.op in WHOLE:
            return self.vec([self.elem(arg, place) for place in range(start, stop, step)])
        if arg.op == "cat":
            width, *terms = arg.args
            if start // width == (stop - 1) // width:
                return self.part(terms[start // width], start % width, (stop - 1) % width + 1)
            if start % width == stop % width == 0:
                return self.cat(terms[start // width : stop // width], width)
        if arg.op == "chosen" and start == 0 and step == 1 and count > 1:  # the first of more
            return self.chosen(arg.args[0], arg.args[1], arg.args[2], count)
        if arg.op in ("part", "elem"):
            return self.part(arg.args[0], arg.args[1] + start, arg.args[1] + stop)
        if stop - start == 1:
            return self.make("elem", (arg, start), 1)
        if arg.op not in WHOLE:
            return self.rebuilt(arg, [self.part(inner, start, stop, step) for inner in self.inner(arg)])
        return self.make("part", (arg, start, stop), stop - start)

    def of_elements(self, element: Term) -> Term:
        """An element of an element-wise term as that term of its arguments' elements."""
        whole, place = element.args
        return self.rebuilt(whole, [self.elem(inner, place) for inner in self.inner(whole)])

    def inner(self, term: Term) -> list[Term]:
        """The terms among a term's arguments."""
        return [arg for arg in term.args if isinstance(arg, Term)]

    def rebuilt(self, term: Term, args: list[Term]) -> Term:
        """An element-wise term with other arguments."""
        makers: dict[str, Callable[..., Term]] = {"add": self.add, "mul": self.mul, "div": self.div}
        if term.op == "clamp":
            return self.clamp(args[0], *term.args[1:])
        if term.op == "cast":
            return self.cast(args[0], term.args[1])
        return makers[term.op](*args) if term.op in makers else self.fn(term.op, *args)

    def elem(self, arg: Term, index: int) -> Term:
        """One element of a vector, as a scalar."""
        return self.part(arg, index, index + 1)

    def cat(self, parts: list[Term], width: int) -> Term:
        """Vectors of one width joined end to end; neighbouring parts of one vector become one part of it."""
        first = parts[0]
        if len(parts) == 1 or (first.op == "const" and all(part is first for part in parts)):
            return first
        if width == 1:
            return self.vec(parts)
        return wholes.neighbours(self, parts, width) or self.make("cat", (width, *parts), width * len(parts))

    def vec(self, scalars: list[Term]) -> Term:
        """A vector of scalars; the elements of one vector in their order are that vector."""
        first = scalars[0]
        if all(term is first for term in scalars):
            return first
        if all(term.op == "cast" and term.args[1] == first.args[1] for term in scalars):
            return self.cast(self.vec([term.args[0] for term in scalars]), first.args[1])
        if all(term.op == "elem" and term.args[0] is first.args[0] for term in scalars):
            start = first.args[1]
            if [term.args[1] for term in scalars] == list(range(start, start + len(scalars))):
                return self.part(first.args[0], start, start + len(scalars))
        return self.make("vec", tuple(scalars), len(scalars))

    def softmax(self, arg: Term) -> Term:
        """A softmax; of one vector's elements among minus infinities it is that vector's, among zeros."""
        inner = arg.args[0] if arg.op == "cast" and arg.args[0].op == "vec" else arg
        if inner.op == "vec":
            known = [element for element in inner.args if element.op == "const"]
            others = [element for element in inner.args if element.op != "const"]
            vector = others[0].args[0] if others and others[0].op == "elem" else None
            places = [element.args[1] for element in others if element.op == "elem" and element.args[0] is vector]
            if [element.op for element in others] == ["chosen"]:  # a vector of one
                vector, places = others[0], [0]
            infinite = all(element.args[0] == -math.inf for element in known)
            alone = vector is not None and len(places) == len(others) == vector.size == len(set(places))
            if known and infinite and alone and vector is not None:
                made = self.softmax(self.cast(vector, arg.args[1]) if arg.op == "cast" else vector)
                zero = self.const(0.0)
                slots = iter(places)
                return self.vec([zero if e.op == "const" else self.elem(made, next(slots)) for e in inner.args])
            whole = wholes.among(self, inner) if known and infinite else None
            if whole is not None:  # of some of a vector it is that of all, divided by their sum
                made = self.softmax(self.cast(whole, arg.args[1]) if arg.op == "cast" else whole)
                each = [None if e.op == "const" else self.elem(made, place) for place, e in enumerate(inner.args)]
                total = self.add(*(element for element in each if element is not None))
                return self.vec([self.const(0.0) if element is None else self.div(element, total) for element in each])
        return self.make("softmax", (arg,), arg.size)

    def total(self, arg: Term) -> Term:
        """The sum of a vector's elements, a scalar."""
        if arg.op == "vec":
            return self.add(*arg.args)
        if arg.op == "cast" and arg.args[0].op == "vec":
            return self.cast(self.total(arg.args[0]), arg.args[1])
        return arg if arg.size == 1 else self.make("sum", (arg,), 1)

    def largest(self, arg: Term) -> Term:
        """The largest element of a vector, a scalar."""
        return arg if arg.size == 1 else self.make("largest", (arg,), 1)

    def norm(self, arg: Term, power: float) -> Term:
        """The p-norm of a vector, a scalar."""
        return self.make("norm", (arg, power), 1)

    def chosen(self, values: Term, scores: Term, number: int, count: int) -> Term:
        """``values`` at the places of the ``count`` highest ``scores``, found by choice ``number`` of the record."""
        return self.make("chosen", (values, scores, number), count)


def _flat(op: str, args: tuple[Term, ...]) -> tuple[list[Term], list[float]]:
    """The operands of a sum of sums, or a product of products: those that vary, and the values of those that don't."""
    parts = [part for arg in args for part in (arg.args if arg.op == op else (arg,))]
    return [part for part in parts if part.op != "const"], [part.args[0] for part in parts if part.op == "const"]
