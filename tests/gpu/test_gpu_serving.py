"""Servers on a GPU, compiled and with CUDA graphs: what clients get is what they got before surgery."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_examples import distance
from served import complete, prompt_logprobs, server

from moe_surgery.engine.receipts import check, read_all

PROMPTS = [[3, 17, 90, 41, 5], [100, 2, 2, 64], [7]]
LONG = [(17 * at * at + 5 * at) % 128 for at in range(200)]
Served = tuple[list[list[int]], list[float]]
EXACT = {"TRITON_F32_DEFAULT": "ieee"}


def served(folder: Path, tmp: Path, cache: Path, dtype: str, surgery: bool) -> Served:
    """Greedy tokens of :data:`PROMPTS`, and the log-probabilities of :data:`LONG`."""
    env = {**EXACT, "VLLM_CACHE_ROOT": str(cache)}
    options = ("--dtype", dtype, "--max-num-seqs", "4")  # few sizes of a batch are few graphs
    with server(folder, tmp, *options, surgery=surgery, **env) as (_, address):
        tokens = [complete(folder, address, prompt) for prompt in PROMPTS]
        logprobs = prompt_logprobs(folder, address, LONG)
    if surgery:
        receipts = read_all(tmp / "run")
        check(receipts)
        [report] = [receipt.report for receipt in receipts]
        assert report is not None
        assert {(site["outcome"], site["target"]) for site in report["sites"]} == {("replaced", "folded")}
    return tokens, logprobs


def chain(folder: Path, tmp: Path, dtype: str, order: tuple[bool, ...]) -> list[Served]:
    """What is served with surgery and without, one after the other, from one folder of compiled graphs."""
    tmp.mkdir()
    return [served(folder, tmp / str(at), tmp / "cache", dtype, surgery) for at, surgery in enumerate(order)]


@pytest.mark.slow
def test_tokens_are_those_without_surgery_with_caches_of_either(folders: dict[str, Path], tmp_path: Path) -> None:
    """In float32 the same tokens. In bfloat16 as near to float32's as without surgery, which is the dtype's noise."""
    orders = {"float32": (False, True, False), "bfloat16": (False, True, True)}
    with ThreadPoolExecutor(len(orders)) as pool:  # a server takes the better part of a minute to start
        started = [
            pool.submit(chain, folders["naive_talker"], tmp_path / dtype, dtype, order)
            for dtype, order in orders.items()
        ]
    (plain, swapped, again), (coarse, folded, warm) = (each.result() for each in started)
    assert swapped[0] == plain[0] == again[0]
    assert max(abs(a - b) for a, b in zip(swapped[1], plain[1], strict=True)) < 1e-4
    noise = distance(coarse[1], plain[1])
    assert 0 < distance(folded[1], plain[1]) < 1.5 * noise
    assert warm == folded
