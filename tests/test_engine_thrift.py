"""What surgery doesn't do in an engine's process, since it would only make the start longer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

UNUSED = (
    "moe_surgery.targets.vllm.experts_in_turn",
    "moe_surgery.cli",
    "typer",
    "moe_surgery.timing.steps",
    "moe_surgery.verbs",
)


def test_nothing_is_imported_that_an_engine_has_no_use_for() -> None:
    code = (
        "import sys, moe_surgery, moe_surgery.engine.launch.hook, moe_surgery.engine.model.seam, vllm;"
        "before = set(sys.modules); import moe_surgery.engine.model.surgery;"
        f"print([name for name in {UNUSED} if name in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_proof_compiles_nothing_that_the_engines_graphs_will_hold() -> None:
    from vllm.forward_context import get_forward_context

    from moe_surgery.engine.model.proving import asker
    from moe_surgery.targets.vllm.host import hosting

    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.compiled = torch.compile(lambda x: 2 * x, backend=backend)

        def forward(self, x: Tensor) -> Tensor:
            assert get_forward_context() is not None
            return self.compiled(x)  # type: ignore[no-any-return]

    block, x = Block(), torch.ones(3, 2)
    alone: Any = SimpleNamespace(summing=lambda what: nullcontext(), meet=lambda place: None)
    with hosting("cpu") as config:
        ask = asker("mlp", block, SimpleNamespace(shared_experts=None), config, alone)
        assert ask(x).equal(2 * x) and graphs == []
        assert block.compiled(x).equal(2 * x) and len(graphs) == 1  # afterwards, what is compiled is compiled
