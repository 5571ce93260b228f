"""compute-sanitizer finds no access out of bounds and no race in any kernel of either path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hanging import HANG

SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.slow
@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_kernel_is_accused(tool: str) -> None:
    assert SANITIZER is not None
    script = str(Path(__file__).with_name("launch_paths.py"))
    # Each tensor has memory of its own, or what lies behind one would be somebody else's.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "blocks, of [1, 3, 150] tokens" in done.stdout and "0 errors" in done.stdout.replace("0 hazards", "0 errors")
