"""A server started under ``moe-surgery run`` answers a real client, and ends clearly when one of its processes dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from engine.make_checkpoint import make
from engine_reference import reference
from hanging import HANG
from served import PROMPT, TOKENS, complete, server

from moe_surgery.engine.receipts import check, read_all

OPTIONS = ("--dtype", "float32", "--enforce-eager", "--tensor-parallel-size", "2")


def expected(folder: Path) -> list[int]:
    """The same from transformers' own model."""
    logits, tokens = reference("naive_talker", folder), list(PROMPT)
    with torch.no_grad():
        for _ in range(TOKENS):
            tokens.append(int(logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.slow
def test_a_server_and_the_death_of_a_worker(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make("naive_talker", folder)
    with server(folder, tmp_path, *OPTIONS) as (process, address):
        assert complete(folder, address) == expected(folder)
        receipts = read_all(tmp_path / "run")
        check(receipts)
        assert [(receipt.rank, receipt.outcome) for receipt in receipts] == [(0, "operated"), (1, "operated")]
        assert len({receipt.fingerprint for receipt in receipts}) == 1
        os.kill(receipts[1].pid, signal.SIGKILL)
        process.wait(HANG)
    lines = (tmp_path / "err.txt").read_text().splitlines()
    told = "\n".join(lines[-40:])
    # vLLM's server takes its engine's end for a reason to shut down in order; its exit code is passed on as it is.
    assert "RuntimeError: Executor failed." in lines, told
    assert any(line.startswith("~ model.layers.{0..2}.mlp") for line in lines), told
    assert "2 of 3 proven" in told
    assert lines[-1] == "1 model in 2 processes: 2 operated, 0 unpatched, 0 failed", told
