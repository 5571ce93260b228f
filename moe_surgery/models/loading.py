"""While transformers loads a model: its bars kept out of logs, and how many bytes have been read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moe_surgery.models.checkpoint import Header, tensor_bytes

Read = Callable[[int, int, str], None]
"""Is told the bytes read so far, those there are, and the name of the parameter that comes next."""
_BAR = "Loading weights"


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Keep transformers' bars out of logs; its own setting is put back."""
    from transformers.utils import logging

    silence = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


@contextmanager
def told(headers: Header, read: Read | None) -> Iterator[None]:
    """Tell ``read`` what is loaded in place of transformers' bar over the tensors in ``headers``."""
    from transformers.utils import logging

    if read is None:
        yield
        return

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        return _read(args[0], headers, read) if args and given.get("desc") == _BAR else factory(*args, **given)

    before = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _read(items: Iterable[tuple[str, Any]], headers: Header, read: Read) -> Iterator[tuple[str, Any]]:
    """The parameters that transformers fills one by one, each with what it is made of."""
    parts = [(name, item, _bytes(item, headers)) for name, item in items]
    total, done = sum(count for _, _, count in parts), 0
    while parts:
        name, item, count = parts.pop(0)
        read(done, total, name)
        yield name, item
        done += count
    read(total, total, "")


def _bytes(item: Any, headers: Header) -> int:
    names = {name for sources in item.layer_targets.values() for name in sources}
    return sum(tensor_bytes(*headers[name]) for name in names if name in headers)
