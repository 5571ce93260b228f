"""The command line that a result file is of."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command() -> str:
    """This process's own, as it was given, but for the folders of the interpreter and of what it writes."""
    interpreter, *rest = sys.orig_argv
    if "--out" in rest:
        place = rest.index("--out")
        rest = rest[:place] + rest[place + 2 :]
    return shlex.join([Path(interpreter).name, *rest])
