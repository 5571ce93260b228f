"""Audits vLLM's models of transformers' families: tiny checkpoints, loaded by vLLM's loader under an audit's orders.

python tests/audit_families.py [--ranks N] [--dtype D] [FAMILY…]    # prints the table that docs/audit.md has

An engine would add nothing but time: the audit is over before it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine_examples import environment
from hanging import HANG
from own_models import ARIA, write

FAMILIES = (
    *("afmoe", ARIA, "axk1", "axk2", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe"),
    *("exaone_moe", "flex_olmo", "gemma4", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoe_swa"),
    *("granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba", "jetmoe", "laguna", "lfm2_moe"),
    *("llama4", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "mistral4", "mixtral", "olmoe"),
    *("openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "solar_open", "zaya"),
)
"""Those that vLLM 0.32 takes, on a CPU without packages for pictures and sounds."""


@dataclass(frozen=True)
class Case:
    """A family's checkpoint in a folder, to be loaded and audited. ``fault`` names what is broken once it is loaded."""

    family: str
    folder: str
    fault: str | None = None
    on_failure: str = "keep"
    dtype: str = "float32"


@dataclass(frozen=True)
class Audited:
    """The receipt of a case, or why vLLM didn't load it; and the model's class."""

    receipt: dict[str, Any] | None
    architecture: str = ""
    error: str | None = None

    @property
    def sites(self) -> list[dict[str, Any]]:
        assert self.receipt is not None, self.error
        found: list[dict[str, Any]] = (self.receipt["report"] or {"sites": []})["sites"]
        return found


Fault = Callable[[Any], None]
"""What breaks the runner of a fused layer, whose weights are loaded and not laid out yet."""


def _correction_bias(runner: Any) -> None:
    runner.routed_experts.e_score_correction_bias.data.zero_()


def _shared_doubled(runner: Any) -> None:
    runner.shared_experts._layer.down_proj.weight.data.mul_(2)


def _shared_dropped(runner: Any) -> None:
    runner.shared_experts._layer.down_proj.weight.data.zero_()


def _scale(runner: Any) -> None:
    experts = runner.routed_experts
    experts.w2_weight.data.div_(1.5)


def _halves(runner: Any) -> None:
    w13 = runner.routed_experts.w13_weight.data
    w13.copy_(w13.roll(w13.shape[1] // 2, 1))


def _zeroed(runner: Any) -> None:
    runner.routed_experts.w2_weight.data[3].zero_()


def _rows(runner: Any) -> None:
    experts = runner.routed_experts
    experts.w13_weight.data.copy_(experts.w13_weight.data.roll(-1, 0))
    experts.w2_weight.data.copy_(experts.w2_weight.data.roll(-1, 0))


def _renormalised(runner: Any) -> None:
    runner.router.renormalize = False


FAULTS: dict[str, Fault] = {
    "correction bias left out": _correction_bias,
    "shared expert doubled": _shared_doubled,
    "shared expert dropped": _shared_dropped,
    "routed scale dropped": _scale,
    "gate and up swapped": _halves,
    "expert 3 zeroed": _zeroed,
    "router rows shifted by one expert": _rows,
    "not renormalised": _renormalised,
}
"""By the name of the mutant that each makes of a DeepSeek-V3 layer."""


def _register(fault: str) -> str:
    """An architecture whose layers are broken once they are loaded. vLLM never forgets one, so each has its name."""
    from vllm import ModelRegistry
    from vllm.model_executor.layers.fused_moe import MoERunner
    from vllm.model_executor.models.deepseek_v2 import DeepseekV3ForCausalLM

    class Variant(DeepseekV3ForCausalLM):
        def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
            names = super().load_weights(weights)
            for module in self.modules():
                if isinstance(module, MoERunner):
                    FAULTS[fault](module)
            return names

    name = f"Broken{list(FAULTS).index(fault)}ForCausalLM"
    Variant.__name__ = Variant.__qualname__ = name
    ModelRegistry.register_model(name, Variant)
    return name


def _audit(case: Case, run: Path, world: int) -> Audited:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    from moe_surgery.engine.model.seam import disengage, engage
    from moe_surgery.engine.orders import Orders

    overrides = {} if case.fault is None else {"architectures": [_register(case.fault)]}
    run.mkdir(exist_ok=True)
    model = None
    engage(Orders(str(run), on_failure=case.on_failure, audit=True))  # type: ignore[arg-type]
    try:
        config = EngineArgs(
            model=case.folder,
            skip_tokenizer_init=True,
            dtype=case.dtype,
            max_model_len=64,
            enforce_eager=True,
            hf_overrides=overrides,
            limit_mm_per_prompt={"image": 0},
        ).create_engine_config()
        config.parallel_config.tensor_parallel_size = world
        with set_current_vllm_config(config):
            model = get_model_loader(config.load_config).load_model(config, config.model_config)
        error = None
    except Exception as failure:
        error = " ".join(f"{type(failure).__name__}: {failure}".split())
    finally:
        disengage()
    return Audited(_receipt(run), type(model).__name__, error)


def _receipt(run: Path) -> dict[str, Any] | None:
    pid = os.getpid()
    return next((json.loads(file.read_text()) for file in run.glob(f"*-{pid}*.json")), None)


def audits(cases: Sequence[Case], tmp: Path, world: int = 1) -> list[list[Audited]]:
    """What became of each case, on each of ``world`` ranks."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    given = json.dumps([asdict(case) for case in cases])
    logs = [(tmp / f"log{world}-{rank}.txt").open("w+") for rank in range(world)]
    outs = [tmp / f"out{world}-{rank}.json" for rank in range(world)]
    more = {"VLLM_DIST_IDENT": f"audit{port}", "VLLM_LOGGING_LEVEL": "ERROR"}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", *map(str, (rank, world, port, outs[rank]))],
            env=environment(tmp / f"rank{rank}", **more),
            stdin=subprocess.PIPE,
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for child in children:
            assert child.stdin is not None
            child.stdin.write(given)
            child.stdin.close()
        for child, log in zip(children, logs, strict=True):
            code = child.wait(timeout=HANG * max(1, len(cases) // 4))
            log.seek(0)
            assert code == 0, log.read()
    finally:
        for child in children:
            child.kill()
        for log in logs:
            log.close()
    by_rank = [[Audited(**entry) for entry in json.loads(out.read_text(encoding="utf-8"))] for out in outs]
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def _child(rank: int, world: int, port: int, out: Path) -> None:
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
    torch.set_num_threads(1)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(world)
    cases = [Case(**case) for case in json.loads(sys.stdin.read())]
    found = [asdict(_audit(case, out.parent / f"run{world}-{number}", world)) for number, case in enumerate(cases)]
    out.write_text(json.dumps(found), encoding="utf-8")


def lines(family: str, audited: Audited) -> Iterable[str]:
    """The rows of the table for one family."""
    if audited.receipt is None or audited.receipt["report"] is None:
        error = audited.error or (audited.receipt or {}).get("error") or ""
        yield f"| {family} | | not started by vLLM | {error[:120]} |"
        return
    told: dict[tuple[str, str, str], None] = {}
    for site in audited.sites:
        reason = "" if site["outcome"] == "right" else site["reason"].partition("it is ")[0].rstrip(": ")
        told[site["kind"], site["outcome"], reason] = None
    for kind, outcome, reason in told:
        yield f"| {family} | {audited.architecture} | `{kind}` | {outcome} | {reason} |"


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank, world, port, out = sys.argv[2:]
        _child(int(rank), int(world), int(port), Path(out))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    given = parser.parse_args()
    names = given.families or FAMILIES
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            write(name, Path(folder) / name)
        cases = [Case(name, str(Path(folder) / name), dtype=given.dtype) for name in names]
        found = audits(cases, Path(folder), given.ranks)
    for name, ranks in zip(names, found, strict=True):
        for line in lines(name, ranks[0]):
            print(line)


if __name__ == "__main__":
    main()
