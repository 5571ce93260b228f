"""What testing a pack needs: tiny real models of every family, and a test case for packs of one's own.

PackTest                      a test case to inherit from
build(family, setting, seed)  a tiny model of a family and its inputs; families() has the names
outputs(model, inputs)        what a model computes, as one tensor
attempt(model, inputs, ...)   operate, compare, undo, compare
"""

from __future__ import annotations

from moe_surgery.testing.families import build as build
from moe_surgery.testing.families import families as families
from moe_surgery.testing.families import outputs as outputs
from moe_surgery.testing.packtest import PackTest as PackTest
from moe_surgery.testing.trial import attempt as attempt

__all__ = ["PackTest", "attempt", "build", "families", "outputs"]
