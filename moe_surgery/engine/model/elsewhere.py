"""Models that vllm-omni's diffusion stages build, past vLLM's loader: they stay as they are, and that is told."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import torch
from torch import nn

from moe_surgery.engine import receipts
from moe_surgery.engine.model.sites import engine_sites
from moe_surgery.engine.orders import Orders
from moe_surgery.models.tree import find_sites
from moe_surgery.report.receipt import Receipt


def registry() -> ModuleType | None:
    """vllm-omni's registry of diffusion pipelines, in a process that has imported it: those that build some have."""
    return sys.modules.get("vllm_omni.diffusion.registry")


def tell(model: nn.Module, orders: Orders) -> None:
    """Leave a receipt, and one line on stderr, for a built pipeline in which something looks like an MoE block.

    Layers of which an argument says which MLP computes have no router, and are passed over.
    """
    chosen = {site.path for site in find_sites(model) if site.told is not None}
    sites = [site for site in engine_sites(model) if site.path not in chosen]
    if not sites:
        return
    name, first = type(model).__name__, sites[0]
    more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    done = "audited" if orders.audit else "operated on"
    reason = (
        f"{first.path} ({first.kind}){more} can't be {done}: vllm-omni's own loader built the model, not vLLM's; "
        "moe_surgery.apply(model) reads it once it is loaded"
    )
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    receipts.write(
        orders.run,
        Receipt(
            pid=os.getpid(),
            rank=torch.distributed.get_rank() if ranks else 0,
            world=torch.distributed.get_world_size() if ranks else 1,
            model=name,
            outcome="unpatched",
            fingerprint=None,
            ledger=None,
            report=None,
            error=reason,
        ),
    )
    print(f"moe-surgery: WARNING: {name}: {reason}", file=sys.stderr, flush=True)
