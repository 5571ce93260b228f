"""A server of vLLM's on an example model, with or without ``moe-surgery run`` before it, and what it is asked."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from engine_examples import environment
from hanging import HANG

PROMPT = [3, 17, 90, 41, 5]
TOKENS = 12


@contextmanager
def server(
    folder: Path, tmp: Path, *options: str, surgery: bool = True, **env: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The running command and its address. Receipts go to ``tmp``/run, what it says to out.txt and err.txt there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-c", "from moe_surgery.cli import main; main()", "run", "--pack", "qwen3-omni"]
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"]
    serve += ["--kv-cache-memory-bytes", str(1 << 26), *options]
    if torch.cuda.is_available():  # else most of the GPU must be free, and other tests run beside
        serve += ["--gpu-memory-utilization", "0.05"]
    tmp.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [*run, "--run", str(tmp / "run"), "--", *serve] if surgery else serve,
        env=environment(tmp, **env),
        stdout=(tmp / "out.txt").open("wb"),
        stderr=(tmp / "err.txt").open("wb"),
    )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}")
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


def ask(folder: Path, address: str, prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    """The server's answer to a prompt that is continued greedily."""
    body = {
        "model": str(folder),
        "prompt": " ".join(f"w{token:03}" for token in prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }
    request = Request(f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=HANG) as answer:
        choice: dict[str, Any] = json.load(answer)["choices"][0]
    return choice


def complete(folder: Path, address: str, prompt: list[int] = PROMPT) -> list[int]:
    """Greedy tokens, as the server tells them in words."""
    return [int(word.removeprefix("w")) for word in ask(folder, address, prompt, TOKENS)["text"].split()]


def prompt_logprobs(folder: Path, address: str, prompt: list[int]) -> list[float]:
    """The log-probabilities of a prompt's tokens but the first."""
    told = ask(folder, address, prompt, 1, prompt_logprobs=0)["prompt_logprobs"]
    return [at[str(token)]["logprob"] for token, at in zip(prompt[1:], told[1:], strict=True)]
