"""Whether this installation can operate, and what to do if it can't."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module, metadata, util
from typing import TYPE_CHECKING, Any

from moe_surgery.errors import UnsupportedError
from moe_surgery.installed.versions import versions
from moe_surgery.report.words import plural, writable

if TYPE_CHECKING:
    from rich.console import Console

_TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}
"""Relative L2 error of a small block's worst token. Rounding to float32's 2^-24 or bfloat16's 2^-8 some ten times over
stays below; a kernel that is missing a term does not."""

_BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""What transformers and vLLM import where it is there, and what fails where its build is for another torch."""


@dataclass(frozen=True)
class Check:
    """One thing looked at: ``found`` is what is there; ``hint`` says what to do, where ``ok`` is false.

    What isn't ``blocking`` leaves the installation ready to operate all the same.
    """

    name: str
    ok: bool
    found: str
    hint: str = ""
    blocking: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """All checks, in the order in which one builds on another."""

    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        return 0 if self._bad() == 0 else UnsupportedError.exit_code

    def _bad(self) -> int:
        return sum(check.blocking and not check.ok for check in self.checks)

    def sentence(self) -> str:
        """The finding in one line."""
        bad = self._bad()
        return "ready to operate" if bad == 0 else f"not ready: {plural(bad, 'problem')}"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data of the versioned schema ``moe-surgery/doctor/1``."""
        checks = [asdict(check) for check in self.checks]
        return {"schema": "moe-surgery/doctor/1", "versions": versions(), "checks": checks, "exit": self.exit_code}

    def render(self, console: Console) -> None:
        """Print one line per check, a problem's hint below it, and the sentence last."""
        from moe_surgery.report.terminal import indented

        width = max(len(check.name) for check in self.checks)
        for check in self.checks:
            mark, style = ("✓", "") if check.ok else ("✗", "red") if check.blocking else ("!", "yellow")
            head = writable(f"{mark} {check.name}", console)
            indented(console, check.found, width + 4, style, hanging=head)
            if not check.ok:
                indented(console, check.hint, width + 4, "")
        indented(console, self.sentence(), 0, "bold")


def diagnose() -> Diagnosis:
    """Look at everything an operation needs. Nothing found is raised: it is a check that isn't ok."""
    looks = {
        "python": _python,
        "torch": _torch,
        "transformers": _transformers,
        "engine": _engine,
        "kernels": _kernels,
        "packs": _packs,
        "plugin": _plugin,
        "launcher": _launcher,
    }
    return Diagnosis(tuple(_look(name, look) for name, look in looks.items()))


def _look(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as fault:
        hint = "install moe-surgery again, with the extra that suits this machine"
        return Check(name, False, f"{type(fault).__name__}: {fault}", hint)


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", sys.version_info >= (3, 11), found, "Python 3.11 or later is needed")


def _torch() -> Check:
    import torch

    devices = [f"cpu ({plural(torch.get_num_threads(), 'thread')})"]
    devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    found, broken = f"{torch.__version__} on {', '.join(devices)}", {}
    for name in filter(util.find_spec, _BESIDE_TORCH):
        try:
            import_module(name)
        except Exception as fault:  # of many kinds, from as deep as the loader
            broken[name] = str(fault).strip().partition("\n")[0]
    found += "".join(f"; {name} can't be imported: {why}" for name, why in broken.items())
    return Check("torch", not broken, found, f"pip uninstall {' '.join(broken)}: nothing here needs it")


def _transformers() -> Check:
    import transformers

    version = metadata.version("transformers")
    assert transformers.PreTrainedModel  # an import that can fail
    new = int(version.split(".")[0]) >= 5
    return Check("transformers", new, version, "transformers 5 or later is needed to load models")


def _engine() -> Check:
    from moe_surgery.targets import installed_engine

    try:
        return Check("engine", True, installed_engine())
    except UnsupportedError as fault:
        hint = "install a supported release: pip install 'moe-surgery[cpu]'"
        # Models on a GPU are operated on with this library's own kernels.
        return Check("engine", False, str(fault), hint, blocking=_device() == "cpu")


def _device() -> str:
    """Where the kernels are tried: on the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _kernels() -> Check:
    """Build a small block in every dtype that matters and compare it with the reference."""
    device = _device()
    parts = [_try_kernels(device, dtype, tolerance) for dtype, tolerance in _TOLERANCES.items()]
    hint = "the engine's CPU kernels don't work on this machine; a release built for its instruction set may"
    if device == "cuda":
        hint = "the folded kernels don't work on this GPU with the installed torch and Triton"
    found = ", ".join(text for _, text in parts)
    return Check("kernels", all(ok for ok, _ in parts), found if device == "cpu" else f"{device}: {found}", hint)


def _try_kernels(device: str, dtype: str, tolerance: float) -> tuple[bool, str]:
    import torch

    from moe_surgery.prove.settling import settle
    from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec
    from moe_surgery.targets import get_target
    from moe_surgery.targets.base import Context
    from moe_surgery.targets.reference import forward
    from moe_surgery.weights.tensors import BlockTensors

    hidden, width, shared, experts = 64, 32, 64, 8
    spec = MoESpec(
        hidden,
        RouterSpec(experts, 2, "softmax", True),
        ExpertsSpec(experts, width, "silu"),
        SharedSpec(shared, "silu", "sigmoid"),
    )
    target = get_target("auto")
    refusal = target.accepts(spec, Context(device, dtype))
    if refusal is not None:
        return False, f"{dtype} refused: {refusal.reason}"
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, count: int = 1) -> torch.Tensor:
        values = torch.randn(count, rows, columns, generator=generator) * columns**-0.5
        matrices: torch.Tensor = values.to(device, getattr(torch, dtype))
        return matrices if count > 1 else matrices[0]

    tensors = BlockTensors(
        router=matrix(experts, hidden),
        w13=matrix(2 * width, hidden, experts),
        w2=matrix(hidden, width, experts),
        shared_gate_proj=matrix(shared, hidden),
        shared_up_proj=matrix(shared, hidden),
        shared_down_proj=matrix(hidden, shared),
        shared_gate=matrix(1, hidden),
        copied=False,
    )
    # Every token leans on two experts of its own, so that rounding can't change which are chosen.
    ids = torch.arange(experts)
    x = (3 * tensors.router[ids] + 2 * tensors.router[ids.roll(1)]).contiguous()
    with torch.no_grad():
        wanted = forward(spec, tensors, x, torch.float64)
        got = target.build(spec, tensors, prefix="doctor")(x).double()
        settle(x.device)
    error = float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    return error < tolerance, f"{dtype} error {error:.1e}" + ("" if error < tolerance else f", above {tolerance:g}")


def _packs() -> Check:
    from moe_surgery.packs.registry import installed_packs

    installed = installed_packs()
    found = ", ".join(f"{pack.name} {pack.version} ({plural(len(pack.rules), 'rule')})" for pack in installed.packs)
    found += "".join(f"; passed over: {problem}" for problem in installed.problems)
    return Check("packs", not installed.problems, found, "mend or remove the package of that pack", blocking=False)


def _plugin() -> Check:
    """Whether the processes of an engine would find this library."""
    from moe_surgery.engine.launch.visibility import hidden, look

    problem = look(sys.executable, os.environ).plugin_problem() or hidden(os.environ)
    if problem is not None:
        return Check("plugin", False, problem.found, problem.hint)
    return Check("plugin", True, "the processes of an engine see moe-surgery")


def _launcher() -> Check:
    """Whether the engine's own command can start; it is only one way to start an engine."""
    from moe_surgery.engine.launch.visibility import look

    problem = look(sys.executable, os.environ).script_problem()
    if problem is not None:
        return Check("launcher", False, problem.found, problem.hint, blocking=False)
    return Check("launcher", True, "the engine's own command can start")
