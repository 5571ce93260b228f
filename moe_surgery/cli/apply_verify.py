"""The commands that load a model and operate on it: apply, verify."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_surgery import checks
from moe_surgery.cli import exits
from moe_surgery.cli.options import Choice, DType, Loading, Proof, Trust
from moe_surgery.cli.progress import Progress
from moe_surgery.cli.screen import Screen
from moe_surgery.errors import SurgeryError, UsageError
from moe_surgery.report.words import plural, size

if TYPE_CHECKING:
    from torch import nn

    from moe_surgery.models.opening import Opened
    from moe_surgery.models.text import Tokenizer
    from moe_surgery.planning.plan import Plan
    from moe_surgery.report.outcomes import Step
    from moe_surgery.report.report import Report
    from moe_surgery.timing.blocks import Speed


_NEXT = (
    "this was a rehearsal, of which nothing is kept; to use the new blocks: moe_surgery.apply(model) in your program, "
    "moe_surgery.install() before it loads, or moe-surgery run -- COMMAND"
)
_ALONE = "experts behind a router of the model's own are not timed by themselves; moe-surgery bench times whole steps"


@dataclass(frozen=True)
class Job:
    """All that ``apply`` and ``verify`` were asked for."""

    model: str
    choice: Choice
    loading: Loading
    proof: Proof
    trust: Trust
    generate: str | None = None
    prompt: str | None = None
    new_tokens: int = 16
    undoable: bool = True
    model_check: bool = True
    svg: Path | None = None
    html: Path | None = None


@dataclass(frozen=True)
class Tokens:
    """Greedy tokens of every part that generates, before and after; nothing if none were asked for."""

    before: dict[str, list[int | None]]
    after: dict[str, list[int | None]]
    tokenizer: Tokenizer | None = None

    @property
    def equal(self) -> bool:
        return self.finite and self.before == self.after

    @property
    def finite(self) -> bool:
        """Whether every token was chosen among numbers."""
        return not any(None in tokens for run in (self.before, self.after) for tokens in run.values())

    def sentences(self) -> list[str]:
        """One line for each part: that its tokens are equal, or where they part."""
        lines = [_compared(part, before, self.after.get(part, [])) for part, before in self.before.items()]
        if self.tokenizer is not None:
            for part, ids in self.after.items():
                numbers = [token for token in ids if token is not None]
                lines += [f"{part}: {self.tokenizer.text(numbers)!r}"] if len(numbers) == len(ids) else []
        return lines

    def to_json(self) -> dict[str, Any]:
        return {"equal": self.equal, "before": self.before, "after": self.after}


def apply(screen: Screen, job: Job) -> int:
    """Load, operate, prove, compare and report."""
    import moe_surgery
    from moe_surgery.models.text import Tokenizer

    ids = _ids(job)
    plan = begin(screen, job)
    name = plan.model if plan else job.model
    with screen.progress() as progress, named(name):
        started = time.perf_counter()
        opened = load(job, plan, name, progress)
        loaded = time.perf_counter() - started
        tokenizer = None
        if job.prompt is not None:
            tokenizer = Tokenizer(opened.directory, trust_remote_code=job.trust.trust_remote_code)
            ids = tokenizer.ids(job.prompt)
        before = _greedy(opened.module, ids, job.new_tokens, progress)
        progress.phase("operating")
        report = moe_surgery.apply(
            opened.module,
            plan,
            undoable=job.undoable,
            model_check=job.model_check,
            margin=job.proof.margin,
            seed=job.proof.seed,
            on_progress=progress.step,
            **({} if plan else job.choice.as_plan()),
        )
        tokens = Tokens(before, _greedy(opened.module, ids, job.new_tokens, progress), tokenizer)
        speeds = block_speeds(report, progress)
    rounded = _low_precision(opened.module)
    failed = not tokens.finite or (not tokens.equal and rounded is None)
    report = _with_load(report, loaded).but(model=name, exit_code=exits.UNPROVEN if failed else report.exit_code)
    notes = [("speed", speed.sentence()) for speed in speeds]
    if any(step.spec is not None and step.spec.at == "experts" for step in report.replaced):
        notes.append(("speed", _ALONE))
    notes += [("tokens", line) for line in tokens.sentences()]
    if report.replaced:
        notes.append(("next", _NEXT))
    more = {"speed": [speed.to_json() for speed in speeds], "tokens": tokens.to_json()}
    screen.report(report, notes=notes, more=more, speeds=speeds, svg=job.svg)
    if not tokens.finite:
        screen.say("error: logits that aren't finite agree with nothing")
    elif failed:
        screen.say("error: greedy tokens before and after differ")
    elif not tokens.equal:
        screen.say(
            f"warning: greedy tokens before and after differ; every block is proven to the noise of {rounded}, in "
            "which two tokens may be that near to each other: --dtype float32 tells"
        )
    return report.exit_code


def verify(screen: Screen, job: Job) -> int:
    """Load, prove and report; nothing is replaced."""
    import moe_surgery

    plan = begin(screen, job)
    name = plan.model if plan else job.model
    with screen.progress() as progress, named(name):
        started = time.perf_counter()
        opened = load(job, plan, name, progress)
        loaded = time.perf_counter() - started
        progress.phase("proving")
        report = moe_surgery.verify(
            opened.module,
            plan,
            margin=job.proof.margin,
            seed=job.proof.seed,
            on_progress=progress.step,
            **({} if plan else job.choice.as_plan()),
        )
    report = _with_load(report, loaded).but(model=name)
    screen.report(report, svg=job.svg)
    failed = [step for step in report.refused if step.verdict is not None and not step.verdict.powerless]
    if failed:
        screen.say(f"error: the proof failed at {plural(len(failed), 'site')}, first {failed[0].path}")
    return report.exit_code


def begin(screen: Screen, job: Job) -> Plan | None:
    """Check all that can be before a model is loaded, and return the plan if the argument is one."""
    screen.will_write(job.svg, html=job.html)
    screen.will_read(job.model, *(job.choice.pack or ()))
    checks.margin(job.proof.margin)
    checks.seed(job.proof.seed)
    return saved_plan(job)


def saved_plan(job: Job) -> Plan | None:
    """The plan if the argument is a file. A plan is applied as it was reviewed, so flags that choose are refused."""
    path = Path(job.model)
    if not path.is_file() and path.suffix != ".json":
        return None
    from moe_surgery.planning.plan import Plan

    plan = Plan.load(path)
    if job.choice.given():
        raise UsageError(f"{path} is a plan, applied as it is; {', '.join(job.choice.given())} would change it")
    return plan


@contextmanager
def named(model: str) -> Iterator[None]:
    """Let the report of an error call the model what the user calls it, not what its config does."""
    try:
        yield
    except SurgeryError as fault:
        if fault.report is not None:
            fault.report = fault.report.but(model=model)
        raise


def load(job: Job, plan: Plan | None, model: str, progress: Progress) -> Opened:
    from moe_surgery.models.checkpoint import digest
    from moe_surgery.models.dtype_device import device_type
    from moe_surgery.models.opening import load_model

    dtype = None if job.loading.dtype is DType.auto else job.loading.dtype.value
    if plan is not None:  # before minutes go into loading
        dtype = dtype or plan.dtype
        plan.check_place(device_type(job.loading.device), dtype)
        if Path(model).is_dir():
            plan.check_origin(digest(Path(model)), model)
    progress.phase(f"loading {model}{_of_bytes(Path(model))}")
    trusted = job.trust.trust_remote_code
    return load_model(model, dtype=dtype, device=job.loading.device, trust_remote_code=trusted, on_read=progress.read)


def _of_bytes(directory: Path) -> str:
    """How much there is to load, where that lies in a directory."""
    found = sum(file.stat().st_size for file in directory.glob("*.safetensors")) if directory.is_dir() else 0
    return f", {size(found)}" if found else ""


def _with_load(report: Report, seconds: float) -> Report:
    return report.but(seconds=report.seconds + seconds, phases=(("load", seconds), *report.phases))


def _ids(job: Job) -> list[int]:
    """Token ids from the command line, none if it gave none."""
    text = job.generate
    if text is not None and job.prompt is not None:
        raise UsageError("--prompt and --generate both say what to continue; give one")
    if text is None:
        return []
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f'--generate takes token ids such as "1,2,3", not {text!r}') from None
    if any(id_ < 0 for id_ in ids):
        raise UsageError(f"--generate takes token ids, none of which is below 0: {text!r}")
    return ids


def _greedy(module: nn.Module, prompt: list[int], count: int, progress: Progress) -> dict[str, list[int | None]]:
    if not prompt:
        return {}
    from moe_surgery.models.greedy import greedy_tokens

    progress.phase(f"generating {plural(count, 'token')}")
    return greedy_tokens(module, prompt, count)


def block_speeds(report: Report, progress: Progress, tokens: Sequence[int] | None = None) -> list[Speed]:
    """Old against new, for the first replaced block of every kind whose original is still there."""
    from moe_surgery.timing.blocks import TOKENS, measure_blocks

    swaps = {swap.path: swap for swap in report.transaction.swaps} if report.transaction else {}
    first: dict[object, Step] = {}
    for step in report.replaced:
        first.setdefault((step.kind, step.spec), step)
    speeds = []
    for step in first.values():
        old, new = swaps[step.path].old, swaps[step.path].new
        # Experts alone are called with what a router gives them, which isn't made up here.
        if old is not None and step.spec is not None and step.spec.at == "block":
            progress.phase(f"timing {step.path}")
            weight = next(old.parameters())
            dtype, device, sizes = weight.dtype, weight.device, tokens or TOKENS
            hidden = step.spec.hidden
            speeds.append(measure_blocks(old, new, hidden, dtype, name=step.path, device=device, tokens=sizes))
    return speeds


def _low_precision(module: nn.Module) -> str | None:
    """The dtype, if it is one in which rounding alone may decide which of two tokens comes out ahead."""
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
    return next(iter(sorted(dtypes & {"bfloat16", "float16"})), None)


def _compared(part: str, before: list[int | None], after: list[int | None]) -> str:
    for when, tokens in (("before", before), ("after", after)):
        if None in tokens:
            return f"{part}: NOTHING TO COMPARE: {when} its logits aren't finite at token {tokens.index(None) + 1}"
    if before == after:
        return f"{part}: the same {plural(len(before), 'greedy token')}, {_few(before)}"
    at = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"{part}: GREEDY TOKENS DIFFER: {len(before)} before, {len(after)} after"
    return f"{part}: GREEDY TOKENS DIFFER from number {at + 1} on: {_few(before[at:])} became {_few(after[at:])}"


def _few(tokens: Sequence[int | None]) -> str:
    shown = " ".join(map(str, tokens[:8]))
    return f"{shown} …" if len(tokens) > 8 else shown
