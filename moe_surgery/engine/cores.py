"""The engine's front end asks, once its cores are ready, whether they know of the orders: no receipt is no surgery."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from moe_surgery.engine import receipts
from moe_surgery.engine.orders import Orders
from moe_surgery.errors import ReceiptError

_watched: set[type] = set()


def watch() -> None:
    """Have every client of engine cores that this process makes from now on ask for their receipts."""
    from vllm.v1.engine.core_client import MPClient

    if MPClient in _watched:
        return
    _watched.add(MPClient)
    original = MPClient.__init__

    @functools.wraps(original)
    def start(client: Any, *args: Any, **kwargs: Any) -> None:
        orders = Orders.from_env()
        if orders is None or not orders.for_engines:
            original(client, *args, **kwargs)
            return
        # One of several front ends finds its cores started, and maybe loaded, by another process.
        found = inspect.signature(original).bind(client, *args, **kwargs).arguments.get("client_addresses") is not None
        before = frozenset() if found else _living(orders.run)  # of engines that were started earlier
        original(client, *args, **kwargs)
        try:
            check_cores(orders.run, len(client.core_engines), before, orders.asked)
        except ReceiptError:
            client.shutdown()
            raise

    MPClient.__init__ = start


def check_cores(
    run: str | Path, cores: int, before: frozenset[int] = frozenset(), asked: str = receipts.SURGERY
) -> None:
    """Raise :class:`ReceiptError` if fewer living processes than ``cores`` left a receipt in ``run``.

    Those of the processes ``before`` don't count; ``asked`` is what was asked for.
    """
    told = _living(run) - before
    if len(told) < cores:
        raise ReceiptError(
            f"{asked} was asked for, but {cores - len(told)} of {cores} engine cores started without it: they don't "
            "see the plugin moe_surgery (see moe-surgery doctor)"
        )


def _living(run: str | Path) -> frozenset[int]:
    """The living processes that left a receipt in ``run``."""
    return frozenset(receipt.pid for receipt in receipts.read_all(run) if receipts.lives(receipt.pid))
