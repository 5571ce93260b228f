"""The plan: what is to be done with every site, decided before anything is touched."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moe_surgery import checks
from moe_surgery.errors import PlanError
from moe_surgery.installed.versions import versions
from moe_surgery.models.checkpoint import Digest
from moe_surgery.planning.costs import Costs
from moe_surgery.report.files import write_whole
from moe_surgery.report.outcomes import Outcome, Step
from moe_surgery.report.report import Report
from moe_surgery.spec import MoESpec

if TYPE_CHECKING:
    pass

SCHEMA = "moe-surgery/plan/1"
logger = logging.getLogger("moe_surgery")


@dataclass(frozen=True, repr=False)
class Plan:
    """What is to be done with every site. It can be saved, reviewed, and applied unchanged later.

    It prints as on a terminal, and shows as a table in notebooks.

    Applying it to a model that no longer fits is an error.

    Attributes:
        model: The directory, hub id or class planned for.
        target: What blocks are to be replaced with.
        steps: One for each site, in the order of the module tree.
        checkpoint: Tells the checkpoint it was made for from others; None where that isn't known.
        device: The type of device that was asked for, None where none was.
        dtype: The dtype that was asked for, None where none was.
        versions: Name → version of what it was made with.
        seconds: How long it took to make.
        costs: What carrying it out takes, in bytes and seconds; None in a plan that was read from a file.

    Examples:
        >>> model, inputs = moe_surgery.testing.build("qwen2_moe")
        >>> moe_surgery.plan(model, target="reference").save("plan.json")
        >>> len(moe_surgery.apply(model, moe_surgery.Plan.load("plan.json")).replaced)
        2
    """

    model: str
    target: str
    steps: tuple[Step, ...]
    checkpoint: Digest | None = None
    device: str | None = None
    dtype: str | None = None
    versions: dict[str, str] = field(default_factory=versions, compare=False)
    seconds: float = field(default=0.0, compare=False)
    costs: Costs | None = field(default=None, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of what the plan does and to what: not of the model's name or today's versions."""
        bare = [replace(step, trail=(), weights=()) for step in self.steps]
        data: list[Any] = [{**step.to_json(), "reason": None} for step in bare]
        bound: list[Any] = [] if self.checkpoint is None else [asdict(self.checkpoint)]
        bound += [] if self.device is None and self.dtype is None else [[self.device, self.dtype]]
        text = json.dumps([SCHEMA, self.target, data, *bound], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        """One short line; printing it shows all."""
        return repr(self.report()).replace("<Report of ", "<Plan for ", 1)

    def __str__(self) -> str:
        return str(self.report())

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def report(self) -> Report:
        return Report(self.model, "planned", self.steps, self.fingerprint, self.versions, self.seconds)

    def to_json(self) -> dict[str, Any]:
        sites = [{key: value for key, value in step.to_json().items() if key != "proof"} for step in self.steps]
        return {
            "schema": SCHEMA,
            "model": self.model,
            "target": self.target,
            "fingerprint": self.fingerprint,
            "checkpoint": None if self.checkpoint is None else asdict(self.checkpoint),
            "device": self.device,
            "dtype": self.dtype,
            "versions": self.versions,
            "sites": sites,
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Raises ``PlanError`` if ``data`` isn't a plan, or was changed after it was made."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"not a plan of schema {SCHEMA} (found {found})")
        try:
            steps = tuple(_step(site) for site in data["sites"])
            checkpoint = None if data.get("checkpoint") is None else Digest(**data["checkpoint"])
            device, dtype = (None if data.get(key) is None else _text(data[key]) for key in ("device", "dtype"))
            model, target, made_with = _text(data["model"]), _text(data["target"]), dict(data["versions"])
            plan = cls(model, target, steps, checkpoint, device, dtype, made_with)
        except KeyError as error:
            raise PlanError(f"the plan is incomplete: it has no {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"the plan can't be read: {error}") from error
        if plan.fingerprint != data.get("fingerprint"):
            raise PlanError(
                f"the plan was changed: its fingerprint is {plan.fingerprint}, it says {data.get('fingerprint')}"
            )
        return plan

    def to_text(self) -> str:
        """The plan as its file says it."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all.

        Args:
            path: The file, which may be there already.

        Raises:
            UsageError: It can't be written.
        """
        write_whole(path, self.to_text())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan.

        Args:
            path: The file.

        Raises:
            PlanError: It isn't a plan, or was changed after it was made; the message names the file.
        """
        try:
            return cls.from_json(json.loads(checks.path(path, "a plan").read_text(encoding="utf-8")))
        except OSError as error:
            raise PlanError(f"{path}: not a plan: {error.strerror or error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise PlanError(f"{path}: not a plan: {error}") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def check_origin(self, found: Digest | None, where: str) -> None:
        """Raise ``PlanError`` if ``found``, the checkpoint at ``where``, is another than the plan was made for."""
        differs = None if self.checkpoint is None or found is None else self.checkpoint.differs_in(found)
        if differs is not None:
            raise PlanError(f"the plan was made for another checkpoint than {where}: it differs in {differs}")

    def check_place(self, device: str, dtype: str | None) -> None:
        """Raise ``PlanError`` if it was asked for on another device type or in another dtype (None: not known)."""
        wanted = (self.device or device, self.dtype or dtype)
        if wanted != (device, self.dtype if dtype is None else dtype):
            was, now = (kind + ("" if kept is None else f" in {kept}") for kind, kept in (wanted, (device, dtype)))
            raise PlanError(f"the plan was made for a model on {was}, this one is on {now}: load it so, or plan again")

    def warn_of_versions(self) -> None:
        """Warn if other versions are installed than the plan was made with: they may read or build otherwise."""
        now = versions()
        packages = sorted({**self.versions, **now})
        changed = [
            f"{package} {self.versions.get(package, 'absent')}, now {now.get(package, 'absent')}"
            for package in packages
            if self.versions.get(package) != now.get(package)
        ]
        if changed:
            logger.warning("the plan was made with other versions: %s", "; ".join(changed))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string is wanted, not {value!r}")
    return value


def _step(site: dict[str, Any]) -> Step:
    if site["outcome"] not in get_args(Outcome):
        raise ValueError(f"no outcome is called {site['outcome']!r}")
    for name in ("path", "kind", "reason"):
        _text(site[name])
    spec = None if site["spec"] is None else MoESpec.from_json(site["spec"])
    return Step.from_json(site, spec)
