"""Model surgery for mixture-of-experts models: read, plan, operate, prove, report.

Six verbs. Importing this package is cheap; what a verb needs is imported when it is called.

    scan(model_or_dir)        what every MoE-looking site is
    plan(model_or_dir)        what would be done with each, and why
    apply(model)              do it: in place, all or nothing, every block proven
    verify(model_or_dir)      the proof alone
    undo(report)              put the old blocks back
    install()                 operate on models as they are loaded
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_surgery.engine.launch.hook import Handle as Handle
    from moe_surgery.engine.launch.hook import install as install
    from moe_surgery.errors import DeviceError as DeviceError
    from moe_surgery.errors import ExpectationError as ExpectationError
    from moe_surgery.errors import GradientError as GradientError
    from moe_surgery.errors import LedgerError as LedgerError
    from moe_surgery.errors import ModelError as ModelError
    from moe_surgery.errors import PackError as PackError
    from moe_surgery.errors import PlanError as PlanError
    from moe_surgery.errors import ProofError as ProofError
    from moe_surgery.errors import ReceiptError as ReceiptError
    from moe_surgery.errors import SurgeryError as SurgeryError
    from moe_surgery.errors import UnsupportedError as UnsupportedError
    from moe_surgery.errors import UsageError as UsageError
    from moe_surgery.planning.plan import Plan as Plan
    from moe_surgery.report.report import Report as Report
    from moe_surgery.verbs import apply as apply
    from moe_surgery.verbs import explain as explain
    from moe_surgery.verbs import plan as plan
    from moe_surgery.verbs import scan as scan
    from moe_surgery.verbs import undo as undo
    from moe_surgery.verbs import verify as verify

__version__ = "0.1.0"

_ERRORS = (
    "DeviceError",
    "ExpectationError",
    "GradientError",
    "LedgerError",
    "ModelError",
    "PackError",
    "PlanError",
    "ProofError",
    "ReceiptError",
    "SurgeryError",
    "UnsupportedError",
    "UsageError",
)
_PLACES = {
    "scan": "verbs",
    "plan": "verbs",
    "apply": "verbs",
    "verify": "verbs",
    "undo": "verbs",
    "explain": "verbs",
    "install": "engine.launch.hook",
    "Handle": "engine.launch.hook",
    "Plan": "planning.plan",
    "Report": "report.report",
    **dict.fromkeys(_ERRORS, "errors"),
}
__all__ = ["__version__", *_PLACES]  # noqa: PLE0604
_MODULES = ("testing",)


def __getattr__(name: str) -> Any:
    if name not in _PLACES and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import random
    import sys
    from importlib import import_module

    place = f"{__name__}.{_PLACES.get(name, name)}"
    if place not in sys.modules:
        drawn = random.getstate()  # rich draws one of Python's random numbers when it is imported
        try:
            import_module(place)
        finally:
            random.setstate(drawn)
    module = import_module(place)
    return module if name in _MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
