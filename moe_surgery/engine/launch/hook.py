"""The hook: models are operated on as others build or load them, in this process and in those it starts."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

from moe_surgery import checks
from moe_surgery.engine import plugin, receipts
from moe_surgery.engine.launch.from_pretrained import Hook, operate
from moe_surgery.engine.launch.visibility import hidden
from moe_surgery.engine.orders import ENGINE_PLAN, VARIABLE, OnFailure, Orders, Prove
from moe_surgery.errors import SurgeryError, UsageError
from moe_surgery.packs.pack import Pack
from moe_surgery.packs.registry import load_packs
from moe_surgery.planning.plan import Plan
from moe_surgery.report.files import write_whole
from moe_surgery.report.receipt import Receipt
from moe_surgery.report.report import Report
from moe_surgery.targets import check_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Handle:
    """An installed hook, which ``install`` returns. As a context manager it lasts as long as the block.

    Attributes:
        run: The folder that receipts go to.
        reports: One for each Hugging Face model that was loaded in this process.

    Examples:
        >>> with moe_surgery.install(target="reference") as handle:
        ...     again = type(model).from_pretrained(saved)
        >>> handle.reports[0].replaced[0].path
        'model.layers.0.mlp'
    """

    def __init__(self, orders: Orders) -> None:
        self.reports: list[Report] = []
        self.run = Path(orders.run)
        self._orders = orders
        self._hook: Hook | None = None
        self._before: str | None = None
        self._ours: str | None = None

    def receipts(self) -> tuple[Receipt, ...]:
        """What each process did with each model so far: the newest receipt of every rank.

        Returns:
            A receipt for each load of a model in each process; for engines, and with ``install`` in scripts.
        """
        return receipts.read_all(self.run)

    def check(self) -> None:
        """See that every rank of every model tells of the same operation.

        Raises:
            ReceiptError: Ranks disagree, or one of them, or all, told nothing.
            SurgeryError: What a process failed with, an audited layer that is wrong among them.
        """
        receipts.check(self.receipts(), self._orders.asked)

    def _hook_loading(self, arguments: dict[str, Any]) -> None:
        def act(model: PreTrainedModel) -> None:
            report = operate(model, self._orders.run, arguments, self._orders.on_failure)
            if report is not None:
                self.reports.append(report)

        self._hook = Hook(act)

    def _order(self) -> None:
        self._before, self._ours = os.environ.get(VARIABLE), self._orders.to_env()
        os.environ[VARIABLE] = self._ours
        _activate()

    def remove(self) -> None:
        """Take the hook out. Models already operated on stay as they are; removing twice does nothing.

        Raises:
            SurgeryError: ``from_pretrained`` or the orders were changed by somebody else since.
        """
        if self._hook is not None and not self._hook.removable:
            raise SurgeryError("can't remove the hook: from_pretrained was patched by somebody else since")
        if self._ours is not None and os.environ.get(VARIABLE) != self._ours:
            raise SurgeryError(f"can't remove the hook: {VARIABLE} was set by somebody else since")
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._ours is not None:
            self._ours = None
            if self._before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = self._before
            if "moe_surgery.engine.model.seam" in sys.modules:
                from moe_surgery.engine.model.seam import disengage

                disengage()
                _activate()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def install(
    plan_or_packs: Plan | Sequence[str | Path | Pack] | None = None,
    *,
    prove: Prove = "sample",
    on_failure: OnFailure = "stop",
    target: str = "auto",
    run: str | Path | None = None,
    audit: bool = False,
) -> Handle:
    """From now on, operate on every model that ``from_pretrained`` loads in this process, or an engine builds.

    Engines started from here are reached in all their processes. A failure raises from ``from_pretrained`` and ends an
    engine's process, so that no half-operated model is handed out.

    Args:
        plan_or_packs: Packs, as for ``plan``, or a plan, which every model must fit: one made in an
            engine holds for engines alone, any other for ``from_pretrained`` alone.
        prove: How much of an engine's model is proven: the first and last block of each kind ("sample"), or "all".
            ``from_pretrained`` proves every block.
        on_failure: "stop", or "keep": the model stays as it was, which is said on stderr and in the receipt.
        target: What is built, as for ``plan``; a plan says so itself.
        run: The folder that receipts go to. By default it is that of the orders this process was started with, else a
            temporary one that is deleted when this process ends.
        audit: Operate on nothing; hold every MoE block that an engine builds against its checkpoint, and count a wrong
            one as a failure. Nothing else but ``on_failure`` and ``run`` can then be given.

    Returns:
        A handle, which is a context manager too.

    Raises:
        UsageError: Receipts are in the folder already, there is no such target, a plan is to get another, or
            ``VLLM_PLUGINS`` hides the plugin from engines.

    Examples:
        >>> with moe_surgery.install(target="reference") as handle:
        ...     again = type(model).from_pretrained(saved)
        >>> len(handle.reports)
        1
    """
    check_name(target)
    checks.one_of(prove, "prove", get_args(Prove))
    checks.one_of(on_failure, "on_failure", get_args(OnFailure))
    if run is not None:
        checks.path(run, "run")
    if audit and (plan_or_packs is not None or target != "auto" or prove != "sample"):
        raise UsageError("an audit replaces nothing, so it takes no plan, packs, target or extent of proof")
    if target != "auto" and isinstance(plan_or_packs, Plan):
        raise UsageError(f"a plan says what is built; it can't be {target}")
    engines = not isinstance(plan_or_packs, Plan) or plan_or_packs.model.startswith(ENGINE_PLAN)
    if engines and (problem := hidden(os.environ)) is not None:
        raise UsageError(str(problem))
    folder = _folder(run)
    if isinstance(plan_or_packs, Plan):
        path = folder / "plan.json"
        if path.exists() and Plan.load(path) != plan_or_packs:
            raise UsageError(f"{path} is another plan already; give this one another folder, as run")
        plan_or_packs.save(path)
        loading: dict[str, Any] | None = None if engines else {"plan": plan_or_packs}
        orders = Orders(str(folder), None, str(path), prove, on_failure)
    elif audit:
        loading, orders = None, Orders(str(folder), on_failure=on_failure, audit=True)
    else:
        packs = None if plan_or_packs is None else load_packs(plan_or_packs)
        loading = {"packs": packs, "target": target}
        orders = Orders(str(folder), _named(plan_or_packs, folder), None, prove, on_failure, target)
    handle = Handle(orders)
    try:
        if loading is not None:
            handle._hook_loading(loading)
        if engines:
            handle._order()
    except BaseException:
        handle.remove()
        raise
    return handle


def _activate() -> None:
    """vLLM asks for plugins once per process: where it has done so, nobody else would."""
    if "vllm" in sys.modules:
        plugin.activate()


def _folder(run: str | Path | None) -> Path:
    if run is not None:
        return receipts.new_run(run)
    orders = Orders.from_env()
    return Path(_temporary() if orders is None else orders.run)


def _temporary() -> str:
    """A folder that lasts as long as this process: not as the handle, as the hook outlasts that."""
    folder, owner = tempfile.mkdtemp(prefix="moe-surgery-run-"), os.getpid()

    def discard() -> None:
        if os.getpid() == owner:  # a fork runs this too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(discard)
    return folder


def _named(packs: Sequence[str | Path | Pack] | None, folder: Path) -> tuple[str, ...] | None:
    """Packs as orders carry them; those that exist in this process only are written to the run's folder."""
    if packs is None:
        return None
    names: list[str] = []
    for pack in packs:
        if isinstance(pack, Pack):
            path = folder / f"{pack.name}.toml"
            write_whole(path, pack.to_toml())
            names.append(str(path))
        else:
            file = isinstance(pack, Path) or pack.endswith(".toml")
            names.append(str(Path(pack).absolute()) if file else str(pack))
    return tuple(names)
