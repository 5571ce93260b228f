"""How long a test waits for another process before it says that it hangs."""

from __future__ import annotations

HANG = 600
"""Seconds. A guard, no measurement: a busy machine takes many times as long, and is right all the same."""
