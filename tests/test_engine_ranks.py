"""What fails on one rank of tensor parallelism ends or keeps all of them, in bounded time: none waits for another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from engine.make_checkpoint import make
from engine_examples import Run, run_all
from engine_reference import check, reference


@dataclass(frozen=True)
class Case:
    """What goes wrong on which rank, what both must say of it, the exit code of both, and how the other begins."""

    fault: str
    rank: int
    words: str
    exit_code: int
    elsewhere: str = "tensor-parallel rank {rank} failed: "

    @property
    def name(self) -> str:
        return f"{self.fault}@{self.rank}"


STOPPED = [
    Case("planning", 1, "RuntimeError: planning broke", 1),
    Case("truncated", 1, "model.layers.1.mlp.experts.routed_experts.w2_weight: 1024 of 16384 elements missing", 13),
    Case("proof", 0, "model.layers.1.mlp: the proof failed", 12),
]
KEPT = [
    Case("building", 1, "RuntimeError: building broke", 1),
    # While the other waits for its part of the answer.
    Case("asking", 1, "asking broke", 1, "the tensor-parallel ranks went different ways: "),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "naive_talker"
    make("naive_talker", folder)
    return folder


def runs(cases: list[Case], folder: Path, tmp: Path, on_failure: str) -> list[Run]:
    surgery = {"prove": "all", "on_failure": on_failure}
    options = {"tensor_parallel_size": 2}
    return [Run(str(folder), options, {**surgery, "run": str(tmp / case.name)}, case.name) for case in cases]


def check_told(case: Case, receipts: list[dict[str, object]], outcome: str, exit_code: int) -> None:
    """Each rank tells of the failure: the one that failed what it was, the other also where."""
    assert [receipt["rank"] for receipt in receipts] == [0, 1], case
    assert [receipt["outcome"] for receipt in receipts] == [outcome] * 2, case
    assert [receipt["exit_code"] for receipt in receipts] == [exit_code] * 2, case
    mine, other = str(receipts[case.rank]["error"]), str(receipts[1 - case.rank]["error"])
    assert case.words in mine and case.words in other, (case, mine, other)
    assert other.startswith(case.elsewhere.format(rank=case.rank)), (case, other)


@pytest.mark.slow
@pytest.mark.parametrize("case", STOPPED, ids=lambda case: case.name)
def test_a_failure_on_one_rank_stops_both(case: Case, folder: Path, tmp_path: Path) -> None:
    [result] = run_all(runs([case], folder, tmp_path, "stop"), tmp_path, forked=True)
    assert result.error is not None and result.outputs == [], case
    check_told(case, result.receipts, "failed", case.exit_code)


@pytest.mark.slow
def test_a_failure_on_one_rank_that_is_kept_leaves_both_as_they_were(folder: Path, tmp_path: Path) -> None:
    asked = runs(KEPT, folder, tmp_path, "keep")
    logits = reference("naive_talker", folder)
    results = run_all(asked, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    for case, result in zip(KEPT, results, strict=True):
        assert result.error is None, case
        check_told(case, result.receipts, "unpatched", 0)
        check(result.outputs, logits)
