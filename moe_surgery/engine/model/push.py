"""New weights for an operated model, taken up as the first were: in a model built beside it, which gives its parts.

The model's own ``load_weights`` fills the tree that it was written for, the ledger watches, and the blocks are
exchanged and proven anew. Nothing of the serving model is touched until all of that is done, and what follows is
copying and assigning alone. A part of a checkpoint may come: of a layer all that is laid out for kernels, of a block
all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config

from moe_surgery.engine.model.adopting import adoption, carry_over, registered, touched
from moe_surgery.engine.model.agreement import Ranks
from moe_surgery.engine.model.layer_book import LayerBook, Snapshot
from moe_surgery.engine.model.laying_out import lay_out
from moe_surgery.engine.model.ledger import Ledger
from moe_surgery.engine.model.surgery import Surgery
from moe_surgery.engine.orders import Orders
from moe_surgery.errors import SurgeryError


@dataclass(frozen=True, eq=False)
class Origin:
    """What an operated model came from: how one is built, by which orders, and the names of all tensors it got."""

    build: Callable[[], nn.Module]
    config: VllmConfig
    orders: Orders
    names: frozenset[str]
    fingerprint: str


def not_taken(model: nn.Module, config: VllmConfig) -> str | None:
    """Why an operated model takes no weights once it serves; None if it does."""
    reasons = {
        "that is done on CPUs only": config.device_config.device_type != "cpu",
        "its weights are quantised": config.quant_config is not None,
        "it is shared out over several processes": config.parallel_config.world_size > 1,
        "its compiled graphs hold the old ones (enforce_eager has none)": config.compilation_config.mode
        != CompilationMode.NONE,
        "adapters are around its layers": config.lora_config is not None,
        "a draft model may share them": config.speculative_config is not None,
        "it lays them out by a hook of its own": hasattr(model, "process_weights_after_loading"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class Push:
    """Weights on their way into ``model``, which serves. :meth:`load` as often as they come, then :meth:`finish`.

    The serving model is as it was unless :meth:`finish` returns. A push that raised can't be gone on with.
    """

    def __init__(self, model: nn.Module, origin: Origin) -> None:
        self.model, self.origin = model, origin
        self._book, self._entries = LayerBook(origin.config), Snapshot({}, [])
        with self._beside():
            self._surgery = Surgery(origin.build(), origin.config, origin.orders, Snapshot({}, []), Ranks())
        if self._surgery.plan.fingerprint != origin.fingerprint:
            raise SurgeryError("the model would not be operated on as it was")
        self._ledger = Ledger({"": self._surgery.model}, known=origin.names)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """While this lasts, vLLM's registers have the layers of the model beside, which is built and asked."""
        serving = self._book.snapshot()
        self._book.restore(self._entries)
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                yield
        finally:
            self._entries = self._book.snapshot()
            self._book.restore(serving)

    def load(self, place: str, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        """Have ``weights`` loaded by the ``load_weights`` of the module at ``place``, as checkpoints' names say."""
        module: Any = self._surgery.model.get_submodule(place)
        with torch.inference_mode(False), torch.no_grad():
            return module.load_weights(self._ledger.stream(weights, f"{place}." if place else ""), *args, **kwargs)

    def finish(self) -> dict[str, nn.Module]:
        """Exchange what came whole, after its proof; the blocks that are new, by path.

        Raises :class:`SurgeryError` for what didn't, and for a proof that failed.
        """
        surgery, model, book = self._surgery, self._surgery.model, self._book
        self._ledger.close()
        with self._beside(), set_current_vllm_config(self.origin.config):
            parts = touched(model, self._ledger.written, surgery.items)
            carry_over(self.model, model, parts)
            surgery.items = dict(parts.sites)
            surgery.exchange()
            model.eval()
            new = surgery.exchanged
            derived = lay_out(model, parts.layers, new, self.origin.config.model_config.dtype)
            surgery.judge()
            steps = adoption(self.model, model, parts, derived, new)
        steps.append(partial(book.restore, registered(book, new.values())))
        with torch.inference_mode(False), torch.no_grad():
            for step in steps:
                step()
        return new
