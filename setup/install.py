"""Set up a virtual environment from the pinned lists: ``python setup/install.py .venv``.

Standard library only: this runs before anything is installed. It can be run again at any time; what is there stays.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "requirements"
# Where PyTorch publishes the builds for CPUs; asked only if the configured package sources don't have them.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# -qq: errors only. --no-deps: the lists are complete, and some declared dependencies must stay out (see
# requirements/cpu.txt).
# --no-compile: bytecode is written when a module is first imported, for the few of the many that ever are.
PIP = ("-m", "pip", "install", "-qq", "--no-deps", "--no-compile", "--disable-pip-version-check")

CHECKS = {
    "torch": "import torch; print(torch.__version__)",
    "transformers": "import transformers; transformers.Qwen3OmniMoeForConditionalGeneration; "
    "print(transformers.__version__)",
    "vLLM": "import vllm.model_executor.layers.fused_moe; print(vllm.__version__)",
    "moe-surgery": "import moe_surgery, moe_surgery.rules; print(moe_surgery.__version__)",
}


class SetupError(Exception):
    """A step that failed; the message says which one and what to do."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python setup/install.py DIRECTORY", file=sys.stderr)
        return 2
    started = time.perf_counter()
    try:
        check_machine()
        python = make_venv(Path(arguments[0]))
        install_torch(python)
        say("the rest of the pinned lists (some 400 MB and a few minutes, if it isn't there)")
        pip(python, "-r", str(LISTS / "cpu.txt"), "-r", str(LISTS / "dev.txt"))
        pip(python, "--no-build-isolation", "--editable", str(ROOT))
        install_apart(python)
        check_imports(python)
    except SetupError as error:
        print(f"setup failed: {error}", file=sys.stderr)
        return 1
    say(f"ready after {time.perf_counter() - started:.0f} s")
    return 0


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def check_machine(version: tuple[int, ...] = sys.version_info[:2], platform: str = sys.platform) -> None:
    if version < (3, 11):
        raise SetupError(f"Python 3.11 or newer is needed, this is {version[0]}.{version[1]}")
    if platform != "linux":
        raise SetupError(f"vLLM's CPU builds are for Linux, this is {platform}")


def make_venv(directory: Path) -> Path:
    """The environment's interpreter; an environment of another Python version, or a broken one, is made anew."""
    python = directory.absolute() / "bin" / "python"
    wanted = "{}.{}".format(*sys.version_info[:2])
    ask = "import pip, sys; print('{}.{}'.format(*sys.version_info[:2]))"
    if python.exists():
        answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
        if answer.stdout.strip() == wanted:
            return python
    say(f"making {directory} with Python {wanted}")
    try:
        venv.create(directory, clear=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"no virtual environment could be made in {directory}: {error}") from error
    return python


def install_torch(python: Path) -> None:
    say("PyTorch for CPUs (some 200 MB, if it isn't there)")
    wanted = ("-r", str(LISTS / "torch-cpu.txt"))
    first = subprocess.run([python, *PIP, *wanted], capture_output=True, text=True, check=False)
    if first.returncode == 0:
        return
    say("the configured package sources don't have it, asking PyTorch's own")
    second = subprocess.run(
        [python, *PIP, "--index-url", TORCH_INDEX, *wanted], capture_output=True, text=True, check=False
    )
    if second.returncode != 0:
        raise SetupError(
            f"PyTorch (requirements/torch-cpu.txt) could not be installed.\n"
            f"From the configured package sources:\n{first.stderr}\nFrom {TORCH_INDEX}:\n{second.stderr}"
        )


def pip(python: Path, *arguments: str) -> None:
    if subprocess.run([python, *PIP, *arguments], check=False).returncode != 0:
        raise SetupError(f"pip install {' '.join(arguments)}: see above")


def install_apart(python: Path) -> None:
    """Triton into a folder ``interpreter`` of its own, for the kernels' tests, out of everyone else's way."""
    listed = LISTS / "apart" / "triton.txt"
    folder = python.parent.parent / "interpreter"
    name, version = next(line for line in listed.read_text().splitlines() if not line.startswith("#")).split("==")
    if not (folder / f"{name}-{version}.dist-info").is_dir():
        say("Triton's interpreter for the kernels' tests (some 200 MB)")
        shutil.rmtree(folder, ignore_errors=True)
        pip(python, "--target", str(folder), "-r", str(listed))


def check_imports(python: Path) -> None:
    """Import what everything rests on, in one process, and say what failed; this also writes the bytecode."""
    say("checking the imports")
    steps = "\n".join(f"print({name!r}, end=' ', flush=True); {code}" for name, code in CHECKS.items())
    result = subprocess.run([python, "-c", steps], cwd=ROOT, capture_output=True, text=True, check=False)
    reached = [line for line in result.stdout.splitlines() if line.split()[0] in CHECKS]
    if result.returncode != 0:
        failed = reached[-1].split()[0] if reached else "Python"
        how = f"signal {-result.returncode}" if result.returncode < 0 else f"exit code {result.returncode}"
        raise SetupError(f"importing {failed} ended with {how}:\n{result.stderr}")
    say(", ".join(reached))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
