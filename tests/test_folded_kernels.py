"""The kernels compute their spec: on a GPU if there is one, else in Triton's interpreter if Triton is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from folded_blocks import ROUTED, SPEC, SPECS, but, clear_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_weights import tolerance, weights, worst

from moe_surgery.kernels.choice import Choice, table
from moe_surgery.spec import Activation, MoESpec
from moe_surgery.targets import reference
from moe_surgery.targets.folded.fold import fold, terms_of
from moe_surgery.targets.formula import ACTIVATIONS
from moe_surgery.targets.reference_target import ReferenceExperts

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
APART = Path(sys.prefix) / "interpreter"
"""Where the set-up puts Triton on a machine without a GPU."""
runs = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU, or runs in test_in_the_interpreter")
DEVICE = "cuda" if ON_GPU and not INTERPRETED else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)


def tiles(path: str, dtype: torch.dtype) -> Choice:
    """The first default of a path; of the grouped one there are two more, which have other kernels at an end.

    The sum of "summed" computes the shared expert, and where logits are computed in "chosen" they are chosen from.
    """
    rows = table(f"default-{8 * dtype.itemsize}")
    found = next(row for row in rows if row.path == ("pairs" if path == "pairs" else "grouped"))
    if path == "summed":
        return replace(found, add={"BM": 16, "BH": 32, "BK": 32, "num_warps": 4, "num_stages": 2})
    if path == "chosen":  # with blocks of another size for each product
        logits = {"BT": 16, "BK": 32, "num_warps": 4, "num_stages": 2}
        return replace(found, logits=logits, down={**found.down, "BM": 2 * found.gate_up["BM"]})
    return found


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run as they are")
def test_in_the_interpreter() -> None:
    """The kernels are interpreted only where that was asked for before Triton is imported, so in another process."""
    if find_spec("triton") is None and not APART.is_dir():
        pytest.fail(f"neither Triton nor {APART} is there: run `make setup`")
    command = [sys.executable, "-m", "pytest", "-x", __file__]
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(APART), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("path", ["pairs", "grouped", "summed", "chosen"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_computes_its_spec(spec: MoESpec, path: str, tokens: int, dtype: torch.dtype) -> None:
    from moe_surgery.kernels.launch import run

    if path == "pairs" and tokens == 20 and spec is not SPEC and INTERPRETED:
        pytest.skip("each token is by itself in this path, and the interpreter takes as long for each")
    tensors, terms = weights(spec, dtype, device=DEVICE), terms_of(spec)
    x = clear_tokens(spec, tensors, tokens)
    choice = tiles(path, dtype)
    got = run(x, fold(tensors), terms, choice)
    assert got.dtype == dtype
    assert worst(got, reference.forward(spec, tensors, x, torch.float64)) < tolerance(spec, dtype)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_between_the_products_of_a_shared_expert(activation: Activation, dtype: torch.dtype) -> None:
    from moe_surgery.kernels.between import run_between

    draw = torch.Generator().manual_seed(0)
    h, x, gate = (torch.randn(shape, generator=draw).to(DEVICE, dtype) for shape in ((3, 600), (3, 72), (1, 72)))
    act, share = run_between(h, x, gate / 8, 0.5, activation)
    left, right = h.double().chunk(2, dim=-1)
    wanted = ACTIVATIONS[activation](left) * right, 0.5 * torch.sigmoid(x.double() @ (gate / 8).double().T)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(act.double(), wanted[0], rtol=2 * eps, atol=4 * eps)  # rounded twice
    # A logit of some units is rounded, which moves its sigmoid by a quarter of that at most; then both are rounded.
    assert share.dtype == dtype and share.shape == (3, 1)
    torch.testing.assert_close(share.double(), wanted[1], rtol=0, atol=2 * eps)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["pairs", "grouped", "chosen"])
def test_of_equal_logits_the_lower_expert_s_is_more(path: str, dtype: torch.dtype) -> None:
    """Keys that experts are ranked by are of another size in dtypes of two bytes."""
    from moe_surgery.kernels.launch import run

    if path != "pairs" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter can't multiply matrices in bfloat16")
    spec = but(top_k=3)
    tensors = weights(spec, dtype, device=DEVICE)
    tensors.router[4:] = tensors.router[:4]
    tensors.router[2:4] = -tensors.router[:2]  # so there are as many below zero
    tensors.router[6:] = tensors.router[2:4]
    x = torch.randn(80, spec.hidden, generator=torch.Generator().manual_seed(2)).to(tensors.w13)
    ranked, order = (x.double() @ tensors.router[:4].double().T).sort(-1, descending=True)
    x, order = (each[(ranked[:, :2] - ranked[:, 1:3]).amin(-1) > 0.2][:4] for each in (x, order))
    assert len(x) == 4
    ids = torch.stack([order[:, 0], order[:, 0] + 4, order[:, 1]], -1)
    got = run(x, fold(tensors), terms_of(spec), tiles(path, dtype))
    assert worst(got, reference.forward(spec, tensors, x, torch.float64, ids)) < tolerance(spec, dtype)


@runs
def test_tiles_may_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """More row blocks than come together, the last of them fewer: every tile is computed, whatever the order."""
    from moe_surgery.kernels import launch

    spec = but(num_experts=2, experts={"num_experts": 2, "width": 32}, shared={"width": 64})
    tensors, terms = weights(spec, torch.float32, device=DEVICE), terms_of(spec)
    tile = {"BM": 16, "BK": 32, "num_warps": 1, "num_stages": 1}
    x, outputs = clear_tokens(spec, tensors, 270), []
    for many in (1, 1000):
        monkeypatch.setattr(launch, "_MANY_TILES", many)
        choice = replace(tiles("grouped", torch.float32), gate_up={**tile, "BI": 16}, down={**tile, "BH": 32})
        outputs.append(launch.run(x, fold(tensors), terms, choice))
    assert torch.equal(*outputs)
    assert worst(outputs[0], reference.forward(spec, tensors, x, torch.float64)) < tolerance(spec, torch.float32)


@runs
def test_an_expert_may_have_many_blocks_of_either_size() -> None:
    """More than are listed at a time, by a program that had other tokens before it."""
    from moe_surgery.kernels.launch import run

    spec = but(num_experts=2, top_k=1, experts={"num_experts": 2, "width": 32}, shared={"width": 32})
    tensors, terms = weights(spec, torch.float32, device=DEVICE), terms_of(spec)
    tile = {"BK": 32, "num_warps": 1, "num_stages": 1}
    x = clear_tokens(spec, tensors, 330)
    choice = replace(
        tiles("chosen", torch.float32), gate_up={"BM": 16, "BI": 32, **tile}, down={"BM": 32, "BH": 64, **tile}
    )
    got = run(x, fold(tensors), terms, choice)
    assert worst(got, reference.forward(spec, tensors, x, torch.float64)) < tolerance(spec, torch.float32)


@runs
def test_weights_may_be_fetched_any_number_of_tiles_ahead() -> None:
    from moe_surgery.kernels.launch import run

    spec = SPECS["sizes that fit no tile"]
    tensors, choice = weights(spec, torch.float32, device=DEVICE), tiles("pairs", torch.float32)
    x = clear_tokens(spec, tensors, 2)
    down = {"BH": 8, "BK": 8, "num_warps": 1, "num_stages": 1}
    wanted = run(x, fold(tensors), terms_of(spec), replace(choice, down=down))
    for ahead in (2, 4):
        got = run(x, fold(tensors), terms_of(spec), replace(choice, down={**down, "AHEAD": ahead}))
        assert torch.equal(got, wanted)


@runs
@pytest.mark.parametrize("path", ["pairs", "grouped"])
def test_a_shared_expert_may_lie_in_one_matrix_or_two(path: str) -> None:
    from moe_surgery.kernels.launch import run

    tensors, terms = weights(SPEC, torch.float32, device=DEVICE), terms_of(SPEC)
    x = clear_tokens(SPEC, tensors, 3)
    choice = tiles(path, torch.float32)
    apart = fold(tensors)
    assert apart.shared_gate is not None and apart.shared_up is not None
    merged = replace(apart, shared_gate=torch.cat([apart.shared_gate, apart.shared_up]), shared_up=None)
    assert torch.equal(run(x, apart, terms, choice), run(x, merged, terms, choice))


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["pairs", "grouped", "summed"])
@pytest.mark.parametrize("spec", ROUTED.values(), ids=ROUTED.keys())
def test_computes_what_is_routed_outside(
    spec: MoESpec, path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_surgery.kernels import op
    from moe_surgery.targets.folded.routed import RoutedMoEBlock

    tensors = weights(spec, dtype, device=DEVICE)
    choice = tiles(path, dtype)
    monkeypatch.setattr(op, "choose", lambda *_: choice)
    tokens = 6 if path == "pairs" else 20  # a group of rows is of several tokens, a pair of one
    x = torch.randn(tokens, spec.hidden, generator=torch.Generator().manual_seed(1)).to(tensors.w13)
    with torch.no_grad():
        got = RoutedMoEBlock(spec, tensors)(x)
    # Held against the experts that its own arithmetic chooses: near ties are the proof's business.
    ids = reference.chosen(spec, tensors, x)
    assert worst(got, reference.forward(spec, tensors, x, torch.float64, ids)) < 2 * tolerance(spec, dtype)


@runs
@pytest.mark.parametrize(("path", "tokens"), [("pairs", 10), ("grouped", 40)])
def test_experts_alone_take_any_ids(path: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert may have all of a token's slots, and ids beyond the experts stand for none."""
    from moe_surgery.kernels import op
    from moe_surgery.targets.folded.routed import RoutedExperts

    spec = replace(SPEC, at="experts", shared=None, router=replace(SPEC.router, scoring="own", renormalize=False))
    tensors = weights(spec, torch.float32, device=DEVICE)
    choice = tiles(path, torch.float32)
    monkeypatch.setattr(op, "choose", lambda *_: choice)
    x = torch.randn(tokens, spec.hidden, device=DEVICE)
    ids = torch.randint(0, 9, (tokens, 3), device=DEVICE)
    ids[: 3 * tokens // 4] = 3
    ids[-1] = 8
    given = torch.rand(tokens, 3, device=DEVICE)
    with torch.no_grad():
        got = RoutedExperts(spec, tensors)(x, ids, given)
        truth = ReferenceExperts(spec, tensors)(x, ids, given)
    assert got[-1].abs().max() == 0
    there = (ids < 8).any(-1)
    assert worst(got[there], truth[there].double()) < tolerance(spec, torch.float32)


@runs
def test_a_nan_stays_with_its_token() -> None:
    from moe_surgery.kernels.launch import run

    tensors, terms = weights(SPEC, torch.float32, device=DEVICE), terms_of(SPEC)
    x = clear_tokens(SPEC, tensors, 4)
    wanted = reference.forward(SPEC, tensors, x, torch.float64)
    x[1, 5] = torch.nan
    for path in ("pairs", "grouped"):
        choice = tiles(path, torch.float32)
        got = run(x, fold(tensors), terms, choice)
        assert got[1].isnan().all()
        assert worst(got[[0, 2, 3]], wanted[[0, 2, 3]]) < tolerance(SPEC, torch.float32)


@runs
@given(st.integers(1, 3000), st.sampled_from([16, 32, 64, 128]), st.data())
@settings(max_examples=50, deadline=None)
def test_the_grid_holds_every_block_of_rows(tokens: int, size: int, data: st.DataObject) -> None:
    from moe_surgery.kernels.launch import row_blocks

    terms = replace(terms_of(SPEC), experts=5, top_k=2, slices=3)
    first = data.draw(st.integers(0, tokens))
    counts = [tokens, first, tokens - first, 0, 0]  # any routing: no expert is visited twice by one token
    needed = sum(-(-count // size) for count in counts) + terms.slices * -(-tokens // size)
    assert row_blocks(terms, tokens, size) >= needed
