"""The command line that a result file is of."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command() -> str:
    """This process's own, as it was given, but for the folder of the interpreter."""
    interpreter, *rest = sys.orig_argv
    return shlex.join([Path(interpreter).name, *rest])
