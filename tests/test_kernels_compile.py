"""The kernels compile for a GPU, which Triton needs none for. Its interpreter takes what its compiler refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from folded_blocks import ROUTED, ROUTERS, SPEC, SPECS, but

from moe_surgery.kernels.arguments import Terms
from moe_surgery.kernels.choice import FOLDER, router_tiles, rows_for, table
from moe_surgery.spec import MoESpec
from moe_surgery.targets.folded.fold import router_terms_of, terms_of
from moe_surgery.targets.shared_as_experts import unfoldable

APART = Path(sys.prefix) / "interpreter"
"""Where the set-up puts Triton on a machine without a GPU."""
HERE = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1"
compiles = pytest.mark.skipif(not HERE, reason="runs in test_with_triton_from_apart")

INTEGERS = "counts", "lists", "ids", "places"
FLOATS = "logits", "given", "weights", "rows_out", "scales", "factors", "act_factors"
IN_E4M3 = "w13", "w2", "parts"
NUMBERS = dict.fromkeys(("tokens", "slices", "most_up", "most_down"), "i32")
NUMBERS |= dict.fromkeys(("scale", "factor", "shared_scale"), "fp32")
OFFSETS = ("gate", "shared", "shared_up", "shared_scales", "shared_up_scales")


@pytest.mark.slow
@pytest.mark.skipif(HERE, reason="the tests below run as they are")
def test_with_triton_from_apart() -> None:
    if not APART.is_dir():
        pytest.fail(f"neither Triton nor {APART} is there: run `make setup`")
    root = Path(__file__).resolve().parents[1]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(APART), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", __file__]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def compile_all(terms: Terms, row: Any, dtype: str) -> list[Any]:
    """Every kernel of a row, for compute capability 9.0, with arguments as aligned as weights are."""
    from moe_surgery.kernels.launch import kernels_of

    kernels = kernels_of(terms, row, dependent=True)
    # What lies between the products is in e4m3 too, but for the pairs path, whose second product rounds it.
    other = {**dict.fromkeys(IN_E4M3, "*fp8e4nv"), "act": "*fp32" if row.path == "pairs" else "*fp8e4nv"}
    return compile_each(
        [getattr(kernels, field.name) for field in fields(kernels)],
        dtype,
        ids_for_logits=terms.given,
        other=other if terms.scaled else {},
    )


def compile_each(
    kernels: Sequence[Any], dtype: str, *, ids_for_logits: bool = False, other: Mapping[str, str] | None = None
) -> list[Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in OFFSETS or name == "blocks":
            return "*i64" if name == "blocks" else "i64"
        if other and name in other:
            return other[name]
        integer = name in INTEGERS or (ids_for_logits and name == "logits")  # ids stand in their place
        return "*i32" if integer else "*fp32" if name in FLOATS else f"*{dtype}"

    compiled = []
    for kernel in kernels:
        if kernel is None:
            continue
        names: list[str] = kernel.function.arg_names
        signature = {
            name: "constexpr" if name in kernel.constants else NUMBERS.get(name) or kind(name) for name in names
        }
        constants = {(names.index(name),): value for name, value in kernel.constants.items()}
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name not in kernel.constants and name not in NUMBERS
        }
        source = ASTSource(kernel.function, signature, constants, aligned)
        compiled.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernel.options))
    return compiled


def stack(compiled: Any, tmp_path: Path) -> int:
    """Bytes that each of a kernel's threads keeps in memory, since there are too few registers for them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code = tmp_path / "kernel.cubin"
    code.write_bytes(compiled.asm["cubin"])
    told = subprocess.run([tool, "-res-usage", code], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1])


def compile_both_paths(terms: Terms, dtype: str) -> None:
    rows = rows_for(terms, torch.bfloat16) if terms.scaled else table("default-16" if dtype == "bf16" else "default-32")
    for path in ("pairs",) if terms.by_row else ("pairs", "grouped"):
        compile_all(terms, next(row for row in rows if row.path == path), dtype)
    if not terms.given and not terms.by_row:
        chosen = {"BT": 16, "BK": 32, "num_warps": 4, "num_stages": 2}
        compile_all(terms, replace(next(row for row in rows if row.path == "grouped"), logits=chosen), dtype)


@compiles
@pytest.mark.parametrize("numbers", [None, (1, 2, 300)], ids=["any number of tokens", "some"])
def test_ahead_in_other_processes(
    numbers: tuple[int, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is wanted later is found in the cache: what it is kept under is the same in either process."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from moe_surgery.kernels import ahead, apart, warming
    from moe_surgery.kernels.arguments import WIDE_ROWS, stand_ins

    class Elsewhere(apart._Elsewhere):
        def get_current_stream(self, _: int) -> int:
            return 0

    def few(terms: Terms, dtype: torch.dtype, _: None) -> list[tuple[Any, int]]:
        rows = {row.path: row for row in rows_for(terms, dtype)}
        return [(rows["pairs"], 2), (rows["grouped"], WIDE_ROWS + 1)]

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    for module in (ahead, warming) if numbers is None else ():
        monkeypatch.setattr(module, "variants", few)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", listen)
    # Each has sizes of its own, so that this process has compiled nothing of it.
    terms, cpu = terms_of(SPEC if numbers is None else replace(SPEC, hidden=2 * SPEC.hidden)), torch.device("cpu")
    hits: list[bool] = []
    monkeypatch.setattr(driver, "_active", Elsewhere(GPUTarget("cuda", 90, 32)))
    jobs = ahead.specializations(terms, torch.bfloat16, cpu, numbers)
    assert not hits and len(jobs) > 5 and knobs.runtime.jit_cache_hook is None
    compilers = ahead.Compilers(cpu, 2)
    assert not compilers.underway
    compilers.begin([terms], torch.bfloat16, numbers)()
    assert compilers.underway
    warming.warm(stand_ins(terms, torch.bfloat16, cpu), terms, numbers)
    assert hits == [True] * len(jobs)


@compiles
def test_what_fails_ahead_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_surgery.kernels import ahead

    def fails(*_: Any) -> Any:
        raise RuntimeError("no driver")

    monkeypatch.setattr(ahead, "specializations", fails)
    ahead.Compilers(torch.device("cpu"), 2).begin([terms_of(SPEC)], torch.bfloat16)()


@compiles
@pytest.mark.parametrize(
    "process", [("/bin/false",), ("/bin/cat",), ("/bin/nothing",)], ids=["ends", "echoes", "is not"]
)
def test_processes_that_do_nothing_hold_nothing_up(process: tuple[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from moe_surgery.kernels import ahead, apart

    monkeypatch.setattr(driver, "_active", apart._Elsewhere(GPUTarget("cuda", 90, 32)))
    monkeypatch.setattr(ahead, "specializations", lambda *_: [("module", "name", "data")])
    monkeypatch.setattr(ahead, "_COMMAND", process)
    ahead.Compilers(torch.device("cpu"), 2).begin([terms_of(SPEC)], torch.bfloat16)()
    ahead.Compilers(torch.device("cpu"), 2).end()  # where it turns out that nothing is folded


@compiles
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_that_route(spec: MoESpec) -> None:
    compile_both_paths(terms_of(spec), "bf16")


@compiles
@pytest.mark.parametrize("spec", ROUTED.values(), ids=ROUTED.keys())
def test_behind_a_router(spec: MoESpec) -> None:
    beside = any(True for _ in unfoldable(spec))
    compile_both_paths(terms_of(spec, given=True, beside=beside), "bf16")


@compiles
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_beside_vllms_experts(activation: str) -> None:
    from moe_surgery.kernels.between import between_kernel

    compile_each([between_kernel(2048, 768, activation, torch.device("cpu"), torch.bfloat16)], "bf16")


@compiles
@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name: str) -> None:
    from moe_surgery.kernels.routing import router_kernels

    spec = ROUTED[name]
    beside = any(True for _ in unfoldable(spec))
    for tokens in (1, 4096):
        tiles = router_tiles(tokens, torch.bfloat16)
        compile_each(router_kernels(router_terms_of(spec, beside=beside), tiles, dependent=True), "bf16")


@compiles
@pytest.mark.parametrize("by_row", [False, True], ids=["in blocks", "by row"])
@pytest.mark.parametrize("given", [False, True], ids=["that route", "behind a router"])
def test_in_e4m3(given: bool, by_row: bool) -> None:
    spec = replace(but(experts={"width": 128}, shared={"width": 256}), hidden=384)
    compile_both_paths(replace(terms_of(spec, given=given), scaled=True, by_row=by_row), "bf16")


@compiles
def test_in_float32() -> None:
    compile_both_paths(terms_of(SPEC), "fp32")


@compiles
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("H*.json")))
def test_with_a_table_s_first_and_last_tiles(name: str, tmp_path: Path) -> None:
    """And within the registers that there are."""
    scaled = name.endswith("-e4m3")
    sizes = {part[0]: int(part[1:]) for part in name.removesuffix("-e4m3").split("-")}
    terms = Terms(
        sizes["E"], sizes["K"], sizes["M"], sizes["H"], sizes["I"], "silu", False, True, 1.0, 1.0, True, True, False,
        scaled=scaled,
    )  # fmt: skip
    for row in (table(name)[0], table(name)[-1]):
        compiled = compile_all(terms, row, "bf16")
        assert compiled and not any(stack(each, tmp_path) for each in compiled)
