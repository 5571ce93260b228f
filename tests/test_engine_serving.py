"""A server started under ``moe-surgery run`` answers a real client, and ends clearly when one of its processes dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from engine.make_checkpoint import make
from engine_examples import environment
from engine_reference import reference
from hanging import HANG

from moe_surgery.engine.receipts import check, read_all

PROMPT = [3, 17, 90, 41, 5]
TOKENS = 12


@contextmanager
def server(folder: Path, tmp: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The running command, which shares out the model over two workers, and the server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-c", "from moe_surgery.cli import main; main()", "run"]
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    serve += ["--kv-cache-memory-bytes", str(1 << 26), "--enforce-eager", "--tensor-parallel-size", "2"]
    process = subprocess.Popen(
        [*run, "--pack", "qwen3-omni", "--run", str(tmp / "run"), "--", *serve],
        env=environment(tmp),
        stdout=(tmp / "out.txt").open("wb"),
        stderr=(tmp / "err.txt").open("wb"),
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(HANG)


def wait_until_healthy(process: subprocess.Popen[bytes], address: str, seconds: float = HANG) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended before it was up"
        try:
            with urlopen(f"{address}/health", timeout=HANG):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("the server was not up in time")


def complete(folder: Path, address: str) -> list[int]:
    """Greedy tokens for :data:`PROMPT`, as the server tells them in words."""
    body = {
        "model": str(folder),
        "prompt": " ".join(f"w{token:03}" for token in PROMPT),
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = Request(f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=HANG) as answer:
        text = json.load(answer)["choices"][0]["text"]
    return [int(word.removeprefix("w")) for word in text.split()]


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
    with server(folder, tmp_path) as (process, address):
        wait_until_healthy(process, address)
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
