"""Blocks that can't be proven folded are left to vLLM's layer once they are loaded; a plan fits before and after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_surgery.errors import PlanError
from moe_surgery.planning.plan import Plan
from moe_surgery.report.outcomes import Step

pytest.importorskip("vllm")
from moe_surgery.engine.model.planning import _check_same, fallen_back
from moe_surgery.engine.model.served import obstacle

ROUTED = Step("layers.0.mlp", "Deep", "replaced", "4 of 64 experts", "rule", "folded")
OTHER = replace(ROUTED, path="layers.2.mlp", reason="4 of 32 experts")
PLAN = Plan(
    "engine:Deep",
    "auto",
    (ROUTED, replace(ROUTED, path="layers.1.mlp"), OTHER, replace(ROUTED, path="layers.3.mlp", target="vllm")),
)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"data_parallel_size": 2, "tensor_parallel_size": 2},
            "data parallelism: experts are shared out over 4 ranks, a shared expert over 2; each of 2 groups of "
            "ranks has tokens of its own",
        ),
        (
            {"data_parallel_size": 2, "tensor_parallel_size": 2, "enable_expert_parallel": True},
            "sequence parallelism of MoE layers: each rank takes n / 2 of n tokens to its experts",
        ),
        (
            {
                "enable_eplb": True,
                "enable_expert_parallel": True,
                "tensor_parallel_size": 2,
                "eplb_config": {"num_redundant_experts": 8},
            },
            "expert load balancing: each of 2 ranks has its part of the experts and of 8 more, which move every 3000 "
            "steps from where they were proven",
        ),
    ],
)
def test_it_is_said_why_nothing_is_swapped(
    options: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import ParallelConfig, VllmConfig

    monkeypatch.setattr("vllm.config.parallel.current_platform.is_cuda_alike", lambda: True)  # EPLB is for GPUs
    config = VllmConfig()
    config.parallel_config = ParallelConfig(**options)  # type: ignore[arg-type]
    assert f"the swap is not supported under {said}" in str(obstacle(config))


def test_all_blocks_of_a_kind_go_together() -> None:
    plan = fallen_back(PLAN, {"layers.1.mlp": "no probe is surely routed to expert 5"})
    assert [step.target for step in plan.steps] == ["vllm", "vllm", "folded", "vllm"]
    for step in plan.steps[:2]:
        said = "4 of 64 experts · not folded, as it can't be proven: no probe is surely routed to expert 5"
        assert step.reason == said and step.outcome == "replaced"
    assert plan.steps[2:] == PLAN.steps[2:]
    assert plan.fingerprint != PLAN.fingerprint  # or graphs of the folded blocks would be loaded for these
    assert fallen_back(PLAN, {}) == PLAN


def test_a_plan_that_says_what_became_of_blocks_fits_the_same_engine(tmp_path: Path) -> None:
    told = fallen_back(PLAN, {"layers.0.mlp": "no probe is surely routed to expert 5"})
    told.save(tmp_path / "plan.json")
    _check_same(Plan.load(tmp_path / "plan.json"), PLAN, "plan.json", whole=True)
    layer = replace(PLAN, steps=(replace(ROUTED, target="vllm"), *PLAN.steps[1:]))
    with pytest.raises(PlanError, match=r"at layers\.0\.mlp it says"):
        _check_same(layer, PLAN, "plan.json", whole=True)
