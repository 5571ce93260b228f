"""A hosted block leaves the process as it was: environment, logging, distributed groups, vLLM's own globals, memory."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import weakref
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.distributed
from hanging import HANG
from spec_weights import tolerance, weights, worst
from torch import nn
from vllm_blocks import SPEC, TARGET, build, tokens

from moe_surgery.targets import reference
from moe_surgery.weights.tensors import BlockTensors

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

TOLERANCE = tolerance(SPEC, torch.float32)


def check(block: nn.Module, tensors: BlockTensors) -> None:
    x = tokens(SPEC, 7)
    with torch.no_grad():
        assert worst(block(x), reference.forward(SPEC, tensors, x, torch.float64)) < TOLERANCE


def vllm_globals() -> dict[str, object]:
    """The module globals in which vLLM keeps its groups, its config and its forward context."""
    from vllm import forward_context
    from vllm.config import vllm as config
    from vllm.distributed import parallel_state

    groups = {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}
    assert {"_WORLD", "_TP", "_PP", "_DP", "_EP", "_PCP"} <= groups.keys()
    return {
        **groups,
        "groups": dict(parallel_state._groups),
        "config": config._current_vllm_config,
        "prefix": config._current_prefix,
        "context": forward_context._forward_context,
    }


IN_A_FRESH_PROCESS = """
import json, logging, os, random, sys
import torch

def state():
    return {
        "environ": dict(os.environ),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "defaults": [str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled()],
        "random": [hash(random.getstate()), torch.random.initial_seed(), torch.get_rng_state().sum().item()],
        "root": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        "vllm": [logging.getLogger("vllm").level, len(logging.getLogger("vllm").handlers)],
        "distributed": torch.distributed.is_initialized(),
    }

before = state()
import moe_surgery.targets.vllm
lazy = not any(name.split(".")[0] == "vllm" for name in sys.modules)
import test_target_vllm_host as host
block = host.build()
host.check(block, host.weights(host.SPEC))
import torch._inductor.config
print(json.dumps({"lazy": lazy, "before": before, "after": state(), "compile": torch._inductor.config.compile_threads}))
"""


@pytest.mark.slow
def test_a_process_is_left_as_it_was() -> None:
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_COMPILE_THREADS": "3"}
    command = [sys.executable, "-W", "ignore", "-c", IN_A_FRESH_PROCESS]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["lazy"]
    assert found["after"] == found["before"]
    assert found["compile"] == 3


def test_without_vllm_it_is_unsupported() -> None:
    code = """
import sys
sys.modules["vllm"] = None
from moe_surgery.targets.vllm import VllmTarget
try:
    VllmTarget().label
except Exception as error:
    print(type(error).__name__, error.exit_code, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    wanted = "UnsupportedError 14 vLLM is not installed; pip install 'moe-surgery[cpu]' brings it (scan, "
    assert done.stdout.startswith(wanted)


def test_vllm_globals_are_as_before() -> None:
    build()
    before = vllm_globals()
    block = build()
    assert vllm_globals() == before
    check(block, weights(SPEC))
    assert vllm_globals() == before
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        block(torch.zeros(3, 32))
    assert vllm_globals() == before
    assert not torch.distributed.is_initialized()


def test_a_config_and_a_forward_context_of_the_user_stay() -> None:
    from vllm.config import DeviceConfig, VllmConfig, get_current_vllm_config, set_current_vllm_config
    from vllm.forward_context import get_forward_context, set_forward_context

    mine = VllmConfig(device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(mine), set_forward_context(None, mine):
        context = get_forward_context()
        block = build()
        check(block, weights(SPEC))
        assert get_current_vllm_config() is mine and get_forward_context() is context
    compilation = mine.compilation_config
    assert not compilation.static_forward_context and not compilation.static_all_moe_layers


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_distributed_group_of_the_user_works(when: str) -> None:
    def start() -> None:
        store = torch.distributed.FileStore(os.path.join(folder, "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    with tempfile.TemporaryDirectory() as folder:
        try:
            if when == "before":
                start()
                group = torch.distributed.group.WORLD
            block = build()
            if when == "after":
                start()
                group = torch.distributed.group.WORLD
            check(block, weights(SPEC))
            assert torch.distributed.group.WORLD is group
            total = torch.ones(3)
            torch.distributed.all_reduce(total)
            assert torch.equal(total, torch.ones(3))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def test_random_states_and_logging_are_as_before() -> None:
    build()
    logger = logging.getLogger("vllm")
    before = random.getstate(), torch.get_rng_state(), logger.level
    environ = dict(os.environ)
    build()
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert logger.level == before[2] and dict(os.environ) == environ


def test_blocks_of_one_name_do_not_meet() -> None:
    """Two models have the same paths; and a third block's death takes nothing from the others."""
    ours = [weights(SPEC, seed=seed) for seed in range(3)]
    first, second, third = (TARGET.build(SPEC, tensors, prefix="model.layers.0.mlp") for tensors in ours)
    for block, tensors in ((first, ours[0]), (second, ours[1]), (third, ours[2]), (first, ours[0])):
        check(block, tensors)
    del third, block
    gc.collect()
    check(second, ours[1])


def test_a_block_dies_with_its_model() -> None:
    model = nn.Sequential(build())
    with torch.no_grad():
        model(tokens(SPEC, 2))
    layer = model[0].fused.runner
    parts = [weakref.ref(part) for part in (model[0], layer, layer.routed_experts.w13_weight)]
    gc.collect()
    gc.disable()
    try:
        del model, layer
        assert [part() is not None for part in parts] == [False, True, False], "weights must not wait for a collection"
    finally:
        gc.enable()
    gc.collect()
    assert all(part() is None for part in parts)


@pytest.mark.parametrize("shared", [True, False])
def test_compiles_in_one_graph(shared: bool) -> None:
    torch._dynamo.reset()
    block = build(SPEC if shared else replace(SPEC, shared=None))
    model = nn.Sequential(nn.LayerNorm(64), block).eval().requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = vllm_globals()
    with torch.no_grad():
        for shape in ((2, 3), (2, 5), (1, 1)):
            x = tokens(SPEC, *shape)
            assert torch.allclose(compiled(x), model(x), rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    assert vllm_globals() == before
    torch._dynamo.reset()
