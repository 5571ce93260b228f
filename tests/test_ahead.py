"""Probes made on another thread, ahead of the block that is asked."""

from __future__ import annotations

import threading

import pytest
import torch

from moe_surgery.operate.ahead import ProbesAhead
from moe_surgery.prove.probe import Probes


def test_each_block_gets_its_own_while_the_next_are_begun() -> None:
    made: list[tuple[str, bool]] = []
    begun = threading.Event()

    def make(path: str) -> Probes | None:
        made.append((path, threading.current_thread() is not threading.main_thread() and not torch.is_grad_enabled()))
        if path == "b":
            begun.set()
        return Probes(torch.tensor([[float(ord(path))]]), torch.zeros(1))

    with ProbesAhead(("a", "b", "c"), make) as ahead:
        first = ahead.of("a")
        assert begun.wait(60), "the second was not begun when the first had been asked for"
        rest = [ahead.of(path) for path in ("b", "c")]
    assert [float(each.x) for each in (first, *rest) if each is not None] == [97.0, 98.0, 99.0]
    assert made == [("a", True), ("b", True), ("c", True)]


def test_an_error_is_that_of_its_block() -> None:
    def make(path: str) -> Probes | None:
        if path == "b":
            raise ValueError("no probes")
        return None

    with ProbesAhead(("a", "b"), make) as ahead:
        assert ahead.of("a") is None
        with pytest.raises(ValueError, match="no probes"):
            ahead.of("b")
