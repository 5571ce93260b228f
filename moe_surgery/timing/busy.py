"""Whether other processes had the cores while something was timed: a comparison made then says nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
_WORKING = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal


class Watch:
    """Looks at the cores that this process may run on, from its making to :meth:`others`."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)
        self._busy, self._own, self._start = busy_seconds(_read(), self._cores), time.process_time(), time.monotonic()

    def others(self) -> float | None:
        """The share of the cores' time that other processes had, from 0 to 1; None where that can't be told."""
        busy, own = busy_seconds(_read(), self._cores), time.process_time() - self._own
        wall = (time.monotonic() - self._start) * len(self._cores)
        if busy is None or self._busy is None or wall <= 0:
            return None
        return min(max((busy - self._busy - own) / wall, 0.0), 1.0)


def busy_seconds(stat: str, cores: set[int]) -> float | None:
    """Seconds that ``cores`` worked since the machine started, by the text of /proc/stat; None if it lacks one."""
    ticks, seen = 0, 0
    for line in stat.splitlines():
        name, *fields = line.split() or [""]
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores and len(fields) > max(_WORKING):
            ticks += sum(int(fields[at]) for at in _WORKING)
            seen += 1
    return ticks / os.sysconf("SC_CLK_TCK") if seen == len(cores) else None


def _read() -> str:
    try:
        return _STAT.read_text(encoding="ascii")
    except OSError:
        return ""
