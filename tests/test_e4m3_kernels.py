"""The kernels over weights in e4m3 compute their spec: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folded_blocks import DEEPSEEK, but, clear_tokens
from spec_weights import tolerance, worst
from stored_blocks import BLOCKS, GATED, ROWS, held, stored_weights, wide
from test_folded_kernels import APART, DEVICE, INTERPRETED, ON_GPU, runs

from moe_surgery.kernels.arguments import Routed
from moe_surgery.spec import MoESpec
from moe_surgery.targets import reference
from moe_surgery.targets.folded.fold import terms_of

SPECS = {
    "two slices, gated": GATED,
    "no shared expert": replace(GATED, shared=None),
    "three tiles, scaled": but(
        GATED, experts={"width": 384}, shared={"width": 384, "gate": None, "scale": 0.5}, scoring="sigmoid", scale=2.5
    ),
}
DTYPES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run as they are")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(APART), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter loses the carry where a number is rounded up to a power of two in e4m3; here torch rounds."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(data, source, target, mode)
        return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def near(spec: MoESpec, dtype: torch.dtype) -> float:
    """As :func:`tolerance`, with what becomes of a last bit on its way to e4m3.

    A number that is off by a relative d is rounded to another one of e4m3, at most 1/8 away, in d of 1/8 of all cases:
    the mean square of that is d / 8. Tensor cores add e4m3 with 13 bits; of what that makes of gate and up projection
    d is the mean.
    """
    return tolerance(spec, dtype) + math.sqrt(2 * 2**-13 / 8 if dtype.itemsize == 2 else torch.finfo(dtype).eps / 4)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("form", "path", "tokens"),
    [(BLOCKS, "pairs", 1), (BLOCKS, "grouped", 1), (BLOCKS, "grouped", 7), (ROWS, "pairs", 1), (ROWS, "pairs", 3)],
)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_computes_its_spec(spec: MoESpec, form: str, path: str, tokens: int, dtype: torch.dtype) -> None:
    from moe_surgery.kernels.choice import rows_for
    from moe_surgery.kernels.launch import run

    tensors = stored_weights(spec, dtype, DEVICE, form)
    x = clear_tokens(spec, tensors, tokens)
    terms = replace(terms_of(spec), scaled=True, by_row=form == ROWS)
    choice = next(row for row in rows_for(terms, dtype) if row.path == path)
    got = run(x, held(tensors), terms, choice)
    assert got.dtype == dtype
    error = worst(got, reference.forward(spec, tensors, x, torch.float64))
    assert error < near(spec, dtype)
    # What meets them isn't rounded there; in bfloat16 that is too near to tell.
    if dtype == torch.float32:
        assert worst(got, reference.forward(spec, wide(tensors), x, torch.float64)) > 10 * near(spec, dtype)


@runs
def test_tiles_may_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds its own scales, whatever the order is that tiles are computed in."""
    from moe_surgery.kernels import launch
    from moe_surgery.kernels.choice import rows_for

    dtype, spec = DTYPES[0], SPECS["three tiles, scaled"]
    tensors = stored_weights(spec, dtype, DEVICE, BLOCKS)
    x, terms = clear_tokens(spec, tensors, 20), replace(terms_of(spec), scaled=True)
    grouped, outputs = next(row for row in rows_for(terms, dtype) if row.path == "grouped"), []
    for many in (0, 1000):
        monkeypatch.setattr(launch, "_MANY_TILES", many)
        outputs.append(launch.run(x, held(tensors), terms, replace(grouped)))
    assert torch.equal(*outputs)
    assert worst(outputs[0], reference.forward(spec, tensors, x, torch.float64)) < near(spec, dtype)


@runs
@pytest.mark.parametrize(("form", "path"), [(BLOCKS, "pairs"), (BLOCKS, "grouped"), (ROWS, "pairs")])
def test_experts_that_are_given_and_a_merged_shared_one(form: str, path: str) -> None:
    from moe_surgery.kernels.choice import rows_for
    from moe_surgery.kernels.launch import run

    dtype = DTYPES[0]
    tensors = stored_weights(GATED, dtype, DEVICE, form)
    weights, x = held(tensors), clear_tokens(GATED, tensors, 2)
    terms = replace(terms_of(GATED, given=True), scaled=True, by_row=form == ROWS)
    choice = next(row for row in rows_for(terms, dtype) if row.path == path)
    ids = reference.chosen(GATED, tensors, x)
    _, scores = reference.router_scores(GATED, tensors.router, x, torch.float64)
    shared = (x.double() @ tensors.shared_gate.double().T).sigmoid().expand(-1, 2)  # type: ignore[union-attr]
    given = torch.cat([reference.routing_weights(GATED, scores, ids), shared], dim=1).float().contiguous()
    s = weights.scales
    assert s is not None and weights.shared_gate is not None and weights.shared_up is not None
    assert s.shared_gate is not None and s.shared_up is not None
    merged = replace(
        weights,
        shared_gate=torch.cat([weights.shared_gate.view(torch.uint8), weights.shared_up.view(torch.uint8)]).view(
            torch.float8_e4m3fn
        ),
        shared_up=None,
        scales=s._replace(shared_gate=torch.cat([s.shared_gate, s.shared_up]), shared_up=None),
    )
    got = run(x, merged, terms, choice, Routed(ids.to(torch.int32), given))
    assert worst(got, reference.forward(GATED, tensors, x, torch.float64, ids)) < near(GATED, dtype)


@runs
def test_experts_that_a_router_of_vllms_chooses() -> None:
    grouped = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.grouped_topk_router")
    from moe_surgery.engine.model.stored_op import routed_by
    from moe_surgery.kernels.op import compute

    dtype = DTYPES[0]
    spec = replace(GATED, router=replace(DEEPSEEK.router, epsilon=0.0))
    tensors = stored_weights(spec, dtype, DEVICE)
    router = grouped.GroupedTopKRouter(
        top_k=2,
        global_num_experts=8,
        num_expert_group=4,
        topk_group=2,
        scoring_func="sigmoid",
        e_score_correction_bias=tensors.correction_bias,
    )
    terms = replace(terms_of(spec, given=True), scaled=True, scale=spec.router.scale, gated=True)
    x = torch.randn(3, spec.hidden, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    logits = (x.float() @ tensors.router.float().T).to(dtype)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        routed = routed_by(router, x, logits, held(tensors), terms)
        got = compute(x, held(tensors), terms, routed)
    truth = reference.forward(spec, tensors, x, torch.float64, routed.ids.long())
    assert worst(got, truth) < near(spec, dtype)


@runs
@pytest.mark.parametrize("form", [BLOCKS, ROWS])
def test_the_operator_takes_a_block_apart_and_puts_it_together(form: str) -> None:
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    from moe_surgery.engine.model import stored_op
    from moe_surgery.kernels.op import spread

    tensors = stored_weights(GATED, DTYPES[0], DEVICE, form)
    weights, x = held(tensors), clear_tokens(GATED, tensors, 1)
    terms = replace(terms_of(GATED), scaled=True, by_row=form == ROWS)
    config = VllmConfig()
    config.compilation_config.static_forward_context["mlp.experts"] = None  # the layer, which one token doesn't need
    with torch.no_grad(), set_forward_context(None, config, num_tokens=1):
        wanted = stored_op.compute_stored(x, None, weights, terms, None)
        got = stored_op._impl(x, None, "mlp.experts", *spread(weights, terms))
    assert torch.equal(got, wanted)
    faked = torch.ops.moe_surgery.engine_stored_moe(
        x.to("meta"),
        None,
        "mlp.experts",
        *(part.to("meta") if isinstance(part, torch.Tensor) else part for part in spread(weights, terms)),
    )
    assert faked.shape == x.shape
