"""One load of a model, from before it is built to its receipt."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from moe_surgery.engine import receipts
from moe_surgery.engine.orders import Orders
from moe_surgery.errors import SurgeryError
from moe_surgery.report.receipt import Outcome, Receipt

if TYPE_CHECKING:
    from moe_surgery.engine.model.agreement import Ranks
    from moe_surgery.engine.model.layer_book import Snapshot
    from moe_surgery.engine.model.surgery import Surgery
    from moe_surgery.kernels.ahead import Compilers
    from moe_surgery.report.outcomes import Outcomes

UNBUILT = "model"


def name_of(model: nn.Module, model_config: object) -> str:
    """What a receipt calls a model: its class, and which stage of one that is served in several, as vllm-omni does."""
    stage = getattr(model_config, "model_stage", None)
    return f"{type(model).__name__}.{stage}" if stage else type(model).__name__


_loads: Counter[tuple[str, str]] = Counter()


@dataclass(eq=False)
class Load:
    """A ``load_model`` that is going on. ``off`` lets it pass untouched; ``depth`` counts models inside models.

    ``again`` builds one more such model, untouched. ``built`` is the architecture, where no surgery tells it.
    ``number`` is that of its receipts: among this process's loads of the same class, under the same run.
    """

    orders: Orders
    before: Snapshot
    ranks: Ranks
    number: int = 0
    surgery: Surgery | None = None
    compilers: Compilers | None = None
    again: Callable[[], nn.Module] | None = None
    depth: int = 0
    off: bool = False
    built: str = UNBUILT

    @property
    def operation(self) -> Surgery:
        """The surgery of the model that was built; raises :class:`SurgeryError` if none was seen to be."""
        if self.surgery is None:
            raise SurgeryError("the model was built in a way that bypassed the surgery")
        return self.surgery

    def write(self, outcome: Outcome, *, report: Outcomes | None = None, error: Exception | None = None) -> None:
        """Leave this process's receipt, and, where it knows of all sites, the plan."""
        from vllm.distributed import get_pp_group, get_world_group

        surgery, world, pipeline = self.surgery, get_world_group(), get_pp_group()
        model = surgery.architecture if surgery else self.built
        if not self.number:
            _loads[self.orders.run, model] += 1
            self.number = _loads[self.orders.run, model]
        if report is None and isinstance(error, SurgeryError):
            report = error.report
        receipts.write(
            self.orders.run,
            Receipt(
                pid=os.getpid(),
                rank=world.rank,
                world=world.world_size,
                model=model,
                outcome=outcome,
                fingerprint=surgery.plan.fingerprint if surgery else None,
                ledger=surgery.ledger if surgery else None,
                report=report.to_json() if report else None,
                error=None if error is None else _message(error),
                exit_code=0 if error is None or outcome == "unpatched" else getattr(error, "exit_code", 1),
                stage=pipeline.rank_in_group,
                load=self.number,
            ),
        )
        # In a pipeline no process knows of all sites.
        if surgery is not None and world.rank == 0 and outcome in ("operated", "kept") and pipeline.world_size == 1:
            which = model if self.number == 1 else f"{model}-{self.number}"
            surgery.plan.save(Path(self.orders.run) / f"{which}-plan.json")


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
