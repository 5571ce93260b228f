"""The entry point that vLLM calls once in every process it starts."""

from __future__ import annotations

from moe_surgery.engine.orders import Orders

NAME = "moe_surgery"
"""The entry point's name, as ``VLLM_PLUGINS`` knows it."""
GROUP = "vllm.general_plugins"


def activate() -> None:
    """Operate on every model that vLLM builds in this process from now on, if there are orders to; else do nothing.

    May be called again: orders that changed since take the place of the earlier ones. Raises :class:`UsageError` for
    orders that can't be read, which ends the process, as vLLM lets it through.
    """
    orders = Orders.from_env()
    if orders is None or not orders.for_engines:
        return
    from moe_surgery.engine.cores import watch
    from moe_surgery.engine.model.seam import engage

    engage(orders)
    watch()
