"""Functions that code had compiled, run as they are written: a compiler sees no operation as a record sees it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def eagerly() -> AbstractContextManager[object]:
    """While this lasts, functions that were given to ``torch.compile`` run uncompiled.

    Where they can't be compiled, the compiler remembers that, and a block that needs them whole wouldn't run any more
    after its record. Importing the compiler takes seconds: where nothing was compiled it isn't there.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
