"""The seam: three calls of vLLM's between which a model is built, loaded, and made ready for its kernels.

``BaseModelLoader.load_model`` frames them, ``initialize_model`` returns the model before a weight is read, and
``process_weights_after_loading`` follows when all are. Their signatures are the same in every release studied (0.12 to
0.33). Modules that imported the two functions by name are found among those loaded, and get the wrapped ones.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_surgery.engine import receipts
from moe_surgery.engine.orders import Orders
from moe_surgery.errors import DeviceError, SurgeryError, UnsupportedError
from moe_surgery.report.receipt import Outcome, Receipt

if TYPE_CHECKING:
    from moe_surgery.engine.model.agreement import Ranks
    from moe_surgery.engine.model.layer_book import Snapshot
    from moe_surgery.engine.model.surgery import Surgery
    from moe_surgery.report.outcomes import Outcomes
    from moe_surgery.targets.vllm.eras import Installed

UNBUILT = "model"


@dataclass(eq=False)
class _Load:
    """A ``load_model`` that is going on. ``off`` lets it pass untouched; ``depth`` counts models inside models.

    ``built`` is the architecture, where there is no surgery to tell it. ``number`` is that of its receipts: among this
    process's loads of the same class, under the same run.
    """

    orders: Orders
    before: Snapshot
    ranks: Ranks
    number: int = 0
    surgery: Surgery | None = None
    depth: int = 0
    off: bool = False
    built: str = UNBUILT


class _Seam:
    """What was put in place of what, and the load that is going on."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.load: _Load | None = None
        self._changed: list[tuple[Any, str, Any]] = []
        from vllm.model_executor.model_loader import base_loader, utils

        self._everywhere(utils.initialize_model, self._initialize_model)
        self._everywhere(utils.process_weights_after_loading, self._process_weights)
        self._put(base_loader.BaseModelLoader, "load_model", self._load_model)

    def _everywhere(self, function: Any, wrapper: Callable[[Any], Any]) -> None:
        """Replace a function in every loaded module that has it, under whatever name."""
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").split(".")[0] in ("vllm", "vllm_omni"):
                for name in [name for name, value in vars(module).items() if value is function]:
                    self._put(module, name, wrapper)

    def _put(self, holder: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
        original = vars(holder)[name]
        self._changed.append((holder, name, original))
        setattr(holder, name, wrapper(original))

    def close(self) -> None:
        for holder, name, original in reversed(self._changed):
            setattr(holder, name, original)

    def _load_model(self, original: Any) -> Any:
        @functools.wraps(original)
        def load_model(loader: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
            if self.load is not None:
                return original(loader, vllm_config, *args, **kwargs)
            from moe_surgery.engine.model.agreement import Ranks
            from moe_surgery.engine.model.layer_book import LayerBook

            book = LayerBook(vllm_config)
            if self.orders.audit:
                load = self.load = _Load(self.orders, book.snapshot(), Ranks(), off=True)
                try:
                    model = original(loader, vllm_config, *args, **kwargs)
                    return _audited(load, model, vllm_config, kwargs.get("model_config", *args[:1]))
                finally:
                    self.load = None
            load = self.load = _Load(self.orders, book.snapshot(), Ranks())
            try:
                try:
                    model = original(loader, vllm_config, *args, **kwargs)
                    report = _surgery(load).finish()
                    load.ranks.meet("at the end")
                except Exception as error:
                    if not _goes_on(load, error):
                        raise
                    _say(f"surgery failed, and the engine starts with the model as it was: {error}")
                else:
                    _write(load, "operated" if report.replaced else "kept", report=report)
                    return model
                # Out of the handler: its traceback would keep the model that failed in memory beside the new one.
                _call_off(load, book, vllm_config)
                return _again(load, lambda: original(loader, vllm_config, *args, **kwargs))
            finally:
                self.load = None

        return load_model

    def _initialize_model(self, original: Any) -> Any:
        @functools.wraps(original)
        def initialize_model(*args: Any, **kwargs: Any) -> Any:
            load = self.load
            if load is not None and (load.off or load.depth):
                return original(*args, **kwargs)
            if load is None:
                raise UnsupportedError(
                    "a model is built by a loader that is not known here, so nothing would be done with it"
                )
            load.depth += 1
            try:
                model = original(*args, **kwargs)
            finally:
                load.depth -= 1
            from moe_surgery.engine.model.surgery import Surgery

            config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
            with torch.device("cpu"):
                load.surgery = Surgery(model, config, load.orders, load.before, load.ranks)
            load.ranks.meet(f"where the plan is {load.surgery.plan.fingerprint}")
            return model

        return initialize_model

    def _process_weights(self, original: Any) -> Any:
        @functools.wraps(original)
        def process_weights_after_loading(model: Any, *args: Any, **kwargs: Any) -> Any:
            load = self.load
            if load is not None and not load.off and load.surgery is not None and load.surgery.model is model:
                load.surgery.operate()
                load.ranks.meet("where the model is operated on")
            return original(model, *args, **kwargs)

        return process_weights_after_loading


_seam: _Seam | None = None
_loads: Counter[tuple[str, str]] = Counter()


def engage(orders: Orders) -> None:
    """Operate on every model that vLLM loads in this process from now on. Engaging again only changes the orders.

    Raises :class:`UnsupportedError` if the installed vLLM is of an era that engines aren't operated on in.
    """
    global _seam
    if _seam is not None:
        _seam.orders = orders
        return
    from moe_surgery.targets.vllm.eras import detect

    with _told(orders):
        check_era(detect())
    _seam = _Seam(orders)


def check_era(installed: Installed) -> None:
    """Raise :class:`UnsupportedError` unless engines of the installed vLLM can be operated on."""
    if installed.era.name != "D":
        raise UnsupportedError(
            f"vLLM {installed.version}: engines are operated on in releases 0.27 to 0.33; "
            f"this one's layers are of era {installed.era.name} ({installed.era.releases})"
        )


def disengage() -> None:
    """Put vLLM's own functions back. Models already operated on stay as they are."""
    global _seam
    if _seam is not None:
        _seam.close()
        _seam = None


@contextmanager
def _told(orders: Orders) -> Iterator[None]:
    """Leave a receipt of a failure that comes before any model."""
    try:
        yield
    except SurgeryError as error:
        receipts.write(
            orders.run,
            Receipt(os.getpid(), 0, 1, UNBUILT, "failed", None, None, None, str(error), error.exit_code),
        )
        raise


def _audited(load: _Load, model: Any, config: Any, model_config: Any) -> Any:
    """The ``model`` as it was loaded, after its audit; raises what was found wrong, unless the orders are to go on."""
    from moe_surgery.engine.model.audit import audit, fault_of, told

    load.built = type(model).__name__
    try:
        report = audit(model, config, model_config, load.ranks)
        fault = fault_of(report)
        if fault is not None and load.orders.on_failure == "stop":
            raise fault
        load.ranks.meet("at the end")
    except Exception as error:
        if not _goes_on(load, error):
            raise
        _say(f"the audit failed, and the engine starts all the same: {error}")
        return model
    _write(load, "audited", report=report, error=fault)
    print(f"moe-surgery: {told(report)}", file=sys.stderr, flush=True)
    return model


def _goes_on(load: _Load, error: Exception) -> bool:
    """Tell the other ranks and a receipt of the failure. Whether the orders are to start the engine all the same."""
    load.ranks.fail(error)
    kept = load.orders.on_failure == "keep" and not isinstance(error, DeviceError)
    try:
        _write(load, "unpatched" if kept else "failed", error=error)
    finally:
        load.ranks.part()
    return kept


def _surgery(load: _Load) -> Surgery:
    if load.surgery is None:
        raise SurgeryError("the model was built in a way that passed the surgery by")
    return load.surgery


def _again(load: _Load, original: Callable[[], Any]) -> Any:
    """Build and load the model once more, untouched."""
    gc.collect()
    try:
        return original()
    except Exception as error:
        _write(load, "failed", error=error)
        raise


def _call_off(load: _Load, book: Any, config: Any) -> None:
    """Put vLLM's registers and config back to what they were before the model was built, and let the next one be."""
    from moe_surgery.engine.model.surgery import KEY

    load.off, load.surgery = True, None
    book.restore(load.before)
    if isinstance(config.additional_config, dict):
        config.additional_config.pop(KEY, None)


def _write(load: _Load, outcome: Outcome, *, report: Outcomes | None = None, error: Exception | None = None) -> None:
    from vllm.distributed import get_pp_group, get_world_group

    surgery, world, pipeline = load.surgery, get_world_group(), get_pp_group()
    model = surgery.architecture if surgery else load.built
    if not load.number:
        _loads[load.orders.run, model] += 1
        load.number = _loads[load.orders.run, model]
    if report is None and isinstance(error, SurgeryError):
        report = error.report
    message = (
        None if error is None else str(error) if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
    )
    receipts.write(
        load.orders.run,
        Receipt(
            pid=os.getpid(),
            rank=world.rank,
            world=world.world_size,
            model=model,
            outcome=outcome,
            fingerprint=surgery.plan.fingerprint if surgery else None,
            ledger=surgery.ledger if surgery else None,
            report=report.to_json() if report else None,
            error=message,
            exit_code=0 if error is None or outcome == "unpatched" else getattr(error, "exit_code", 1),
            stage=pipeline.rank_in_group,
            load=load.number,
        ),
    )
    # In a pipeline no process knows of all sites.
    if surgery is not None and world.rank == 0 and outcome in ("operated", "kept") and pipeline.world_size == 1:
        which = model if load.number == 1 else f"{model}-{load.number}"
        surgery.plan.save(Path(load.orders.run) / f"{which}-plan.json")


def _say(text: str) -> None:
    print(f"moe-surgery: WARNING: {text}", file=sys.stderr, flush=True)
