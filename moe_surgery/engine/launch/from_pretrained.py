"""Hugging Face models, operated on as ``from_pretrained`` loads them.

Importing this module is cheap: it is imported while transformers still is.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moe_surgery.engine.orders import OnFailure, Orders
from moe_surgery.engine.receipts import write
from moe_surgery.errors import SurgeryError
from moe_surgery.report.receipt import Outcome, Receipt
from moe_surgery.report.words import visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moe_surgery.report.report import Report

Act = Callable[["PreTrainedModel"], None]
_depth = threading.local()
_built: Counter[tuple[str, str]] = Counter()
_ordered: Hook | None = None


class Hook:
    """``from_pretrained`` of every model, calling ``act`` on what it loaded. What ``act`` raises it raises."""

    def __init__(self, act: Act) -> None:
        from transformers.modeling_utils import PreTrainedModel

        before = PreTrainedModel.__dict__["from_pretrained"]

        @functools.wraps(before.__func__)
        def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
            _depth.value = getattr(_depth, "value", 0) + 1
            try:
                loaded = before.__func__(cls, *args, **kwargs)
            finally:
                _depth.value -= 1
            # A composite model loads its parts through here too, and one hook may lie below another: the outermost
            # call, which has the whole, acts.
            if _depth.value == 0:
                act(loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded

        self._kind, self._before, self._ours = PreTrainedModel, before, classmethod(from_pretrained)
        PreTrainedModel.from_pretrained = self._ours

    @property
    def removable(self) -> bool:
        """Whether nobody has patched ``from_pretrained`` since."""
        return self._kind.__dict__["from_pretrained"] is self._ours

    def remove(self) -> None:
        self._kind.from_pretrained = self._before


def hook_as_ordered() -> None:
    """Hook ``from_pretrained`` in this process, once, to do what the orders say whenever a model is loaded."""
    global _ordered
    if _ordered is None:
        _ordered = Hook(_act_as_ordered)


def _act_as_ordered(model: PreTrainedModel) -> None:
    orders = Orders.from_env()
    if orders is None or not orders.for_loading:
        return
    # Nobody gets the report to undo with, so originals are only held on to where a failure must leave the model whole.
    arguments: dict[str, Any] = {"undoable": orders.on_failure == "keep"}
    if orders.plan is not None:
        from moe_surgery.planning.plan import Plan

        arguments["plan"] = Plan.load(orders.plan)
    else:
        arguments |= {"packs": orders.packs, "target": orders.target}
    operate(model, orders.run, arguments, orders.on_failure)


def operate(model: PreTrainedModel, run: str, arguments: Mapping[str, Any], on_failure: OnFailure) -> Report | None:
    """Apply to a loaded model, with ``arguments`` of :func:`moe_surgery.apply`, and leave a receipt in ``run``.

    What became of it is one line on stderr. What fails is raised, or under "keep" that line; the model is as it was
    then, and None is returned.
    """
    from moe_surgery.report.terminal import in_short
    from moe_surgery.verbs import apply

    kind = type(model).__name__
    _built[run, kind] += 1
    number = _built[run, kind]
    name = kind if number == 1 else f"{kind}#{number}"
    try:
        report = apply(model, **arguments)
    except Exception as error:
        kept = on_failure == "keep"
        _leave(run, name, "unpatched" if kept else "failed", getattr(error, "report", None), error)
        if not kept:
            raise
        _say(f"warning: {name} is NOT operated on, it stays as it was: {error}")
        return None
    _leave(run, name, "operated" if report.replaced else "kept", report)
    _say(f"{name}: {in_short(report)}")
    return report


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(f"moe-surgery: {visible(text)}", file=sys.stderr)


def _leave(run: str, model: str, outcome: Outcome, report: Report | None, error: Exception | None = None) -> None:
    known = error if isinstance(error, SurgeryError) else None
    write(
        run,
        Receipt(
            pid=os.getpid(),
            rank=0,
            world=1,
            model=model,
            outcome=outcome,
            fingerprint=report.fingerprint if report else None,
            ledger=None,
            report=report.to_json() if report else None,
            error=str(known) if known else f"{type(error).__name__}: {error}" if error else None,
            exit_code=known.exit_code if known else int(error is not None),
        ),
    )
