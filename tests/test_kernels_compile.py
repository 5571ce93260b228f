"""Every kernel of every table compiles for the GPUs it is meant for; Triton needs none for that."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from typing import Any

import pytest
from folded_blocks import SPECS

from moe_surgery.kernels.arguments import Terms
from moe_surgery.kernels.choice import FOLDER, Choice, table
from moe_surgery.targets.folded.fold import terms_of

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter"),
]
POINTERS = {"logits": "fp32", "counts": "i32", "lists": "i32", "weights": "fp32", "rows_out": "fp32"}
NUMBERS = {"tokens": "i32", "scale": "fp32", "shared_scale": "fp32"}
OFFSETS = ("gate", "shared", "shared_up")


def compile_all(terms: Terms, choice: Choice, dtype: str) -> None:
    from dataclasses import fields

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe_surgery.kernels.launch import Kernel, kernels_of

    kernels = kernels_of(terms, choice, dependent=True)
    for field in fields(kernels):
        kernel: Kernel | None = getattr(kernels, field.name)
        if kernel is None:
            continue
        names: list[str] = kernel.function.arg_names
        signature: dict[str, str] = {}
        attributes: dict[Any, Any] = {}
        for place, name in enumerate(names):
            if name in kernel.constants:
                signature[name] = "constexpr"
                continue
            signature[name] = (
                NUMBERS[name] if name in NUMBERS else "i64" if name in OFFSETS else f"*{POINTERS.get(name, dtype)}"
            )
            if name not in NUMBERS:
                attributes[(place,)] = [["tt.divisibility", 16]]
        constants = {(names.index(name),): value for name, value in kernel.constants.items()}
        source = ASTSource(kernel.function, signature, constants, attributes)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernel.options)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_of_every_spec(spec: Any, dtype: str) -> None:
    rows = table("default-16" if dtype == "bf16" else "default-32")
    for path in ("pairs", "grouped"):
        compile_all(terms_of(spec), next(row for row in rows if row.path == path), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("H*.json")])
def test_of_every_table(name: str) -> None:
    found = re.fullmatch(r"H(\d+)-E(\d+)-I(\d+)-K(\d+)-M(\d+)", name)
    assert found is not None
    hidden, experts, width, top_k, slices = map(int, found.groups())
    terms = Terms(experts, top_k, slices, hidden, width, "silu", False, True, 1.0, 1.0, slices > 0, True)
    for row in table(name):
        compile_all(terms, row, "bf16")
