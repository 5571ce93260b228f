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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_surgery.engine import receipts
from moe_surgery.engine.model import elsewhere
from moe_surgery.engine.model.load import UNBUILT, Load, name_of
from moe_surgery.engine.orders import Orders
from moe_surgery.errors import DeviceError, SurgeryError, UnsupportedError
from moe_surgery.report.receipt import Receipt

if TYPE_CHECKING:
    from moe_surgery.targets.vllm.eras import Installed


class _Seam:
    """What was put in place of what, and the load that is going on."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.load: Load | None = None
        self._changed: list[tuple[Any, str, Any]] = []
        from vllm.model_executor.model_loader import base_loader, utils

        self._everywhere(utils.initialize_model, self._initialize_model)
        self._everywhere(utils.process_weights_after_loading, self._process_weights)
        self._put(base_loader.BaseModelLoader, "load_model", self._load_model)
        if (pipelines := elsewhere.registry()) is not None:
            self._everywhere(pipelines.initialize_model, self._built_elsewhere)

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
                load = self.load = Load(self.orders, book.snapshot(), Ranks(), off=True)
                try:
                    model = original(loader, vllm_config, *args, **kwargs)
                    return _audited(load, model, vllm_config, kwargs.get("model_config", *args[:1]))
                finally:
                    self.load = None
            load = self.load = Load(self.orders, book.snapshot(), Ranks())
            try:
                try:
                    model = original(loader, vllm_config, *args, **kwargs)
                    report = load.operation.finish()
                    load.ranks.meet("at the end")
                    _guard(load)
                except Exception as error:
                    if not _goes_on(load, error):
                        raise
                    _say(f"surgery failed, and the engine starts with the model as it was: {error}")
                else:
                    load.write("operated" if report.replaced else "kept", report=report)
                    return model
                # Out of the handler: its traceback would keep the model that failed in memory beside the new one.
                _call_off(load, book, vllm_config)
                return _again(load, lambda: original(loader, vllm_config, *args, **kwargs))
            finally:
                self.load = None
                if load.compilers is not None:
                    load.compilers.end()

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
            from moe_surgery.engine.model.compiled import compilers
            from moe_surgery.engine.model.surgery import Surgery

            load.compilers = compilers(load.orders)
            load.depth += 1
            try:
                model = original(*args, **kwargs)
            finally:
                load.depth -= 1

            config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
            load.built = name_of(model, config.model_config)
            with torch.device("cpu"):
                load.surgery = Surgery(model, config, load.orders, load.before, load.ranks, load.compilers)
                load.surgery.watch()
            load.again = self._builder(original, args, kwargs)
            load.ranks.meet(f"where the plan is {load.surgery.plan.fingerprint}")
            return model

        return initialize_model

    def _built_elsewhere(self, original: Any) -> Any:
        @functools.wraps(original)
        def initialize_model(*args: Any, **kwargs: Any) -> Any:
            model = original(*args, **kwargs)
            elsewhere.tell(model, self.orders)
            return model

        return initialize_model

    def _builder(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], nn.Module]:
        """What builds a model as it is built now, later, and without surgery."""
        from vllm.utils.torch_utils import set_default_torch_dtype

        from moe_surgery.engine.model.agreement import Ranks
        from moe_surgery.engine.model.layer_book import Snapshot

        dtype, device, orders = torch.get_default_dtype(), torch.get_default_device(), self.orders

        def build() -> nn.Module:
            before, self.load = self.load, Load(orders, Snapshot({}, []), Ranks(), off=True)
            try:
                with set_default_torch_dtype(dtype), device:
                    model: nn.Module = original(*args, **kwargs)
                    return model
            finally:
                self.load = before

        return build

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
    if not installed.era.engines:
        raise UnsupportedError(
            f"vLLM {installed.version}: engines are operated on in releases 0.24 to 0.33; "
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


def _audited(load: Load, model: Any, config: Any, model_config: Any) -> Any:
    """The ``model`` as it was loaded, after its audit; raises what was found wrong, unless the orders are to go on."""
    from moe_surgery.engine.model.audit import audit, fault_of, told

    load.built = name_of(model, config.model_config)
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
    load.write("audited", report=report, error=fault)
    print(f"moe-surgery: {told(report)}", file=sys.stderr, flush=True)
    return model


def _goes_on(load: Load, error: Exception) -> bool:
    """Tell the other ranks and a receipt of the failure. Whether the orders are to start the engine all the same."""
    load.ranks.fail(error)
    kept = load.orders.on_failure == "keep" and not isinstance(error, DeviceError)
    try:
        load.write("unpatched" if kept else "failed", error=error)
    finally:
        load.ranks.part()
    return kept


def _guard(load: Load) -> None:
    """Let later weights into the operated model by ways that reach its blocks, and by no other."""
    from moe_surgery.engine.model.push import Origin, Push, not_taken
    from moe_surgery.engine.model.pushes import guard

    surgery = load.operation
    if surgery.exchanged:
        assert load.again is not None
        origin = Origin(load.again, surgery.config, surgery.orders, surgery.names, surgery.plan.fingerprint)
        reason = not_taken(surgery.model, surgery.config)
        guard(surgery.model, surgery.exchanged, reason, partial(Push, origin=origin))


def _again(load: Load, original: Callable[[], Any]) -> Any:
    """Build and load the model once more, untouched."""
    gc.collect()
    try:
        return original()
    except Exception as error:
        load.write("failed", error=error)
        raise


def _call_off(load: Load, book: Any, config: Any) -> None:
    """Put vLLM's registers and config back to what they were before the model was built, and let the next one be."""
    from moe_surgery.engine.model.surgery import KEY

    load.off, load.surgery = True, None
    book.restore(load.before)
    if isinstance(config.additional_config, dict):
        config.additional_config.pop(KEY, None)


def _say(text: str) -> None:
    print(f"moe-surgery: WARNING: {text}", file=sys.stderr, flush=True)
