"""What was asked for, as one environment variable: the only thing that reaches every process an engine starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moe_surgery.errors import UsageError
from moe_surgery.targets import NAMES

VARIABLE = "MOE_SURGERY_ORDERS"
SCHEMA = "moe-surgery/orders/1"
ENGINE_PLAN = "vllm:"
"""What the ``model`` of a plan starts with if it was made inside an engine; an architecture's name follows."""

Prove = Literal["sample", "all"]
OnFailure = Literal["stop", "keep"]


@dataclass(frozen=True)
class Orders:
    """What the processes of a run are to do.

    ``run`` is the absolute path of the folder that receipts go to. ``packs`` are names of installed packs or absolute
    paths of ``.toml`` files, None for all installed. ``plan`` is the absolute path of a saved plan that must fit.
    ``prove`` says how much of an engine's model is proven. ``on_failure`` is "stop", or "keep" to go on with the model
    as it was, saying so. ``target`` is what is built where packs decide; a plan says so itself. With ``audit``
    nothing is operated on: an engine's blocks are held against their checkpoint.
    """

    run: str
    packs: tuple[str, ...] | None = None
    plan: str | None = None
    prove: Prove = "sample"
    on_failure: OnFailure = "stop"
    target: str = "auto"
    audit: bool = False

    def to_env(self) -> str:
        """The value of the variable ``MOE_SURGERY_ORDERS``."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Orders | None:
        """The orders in ``environ`` (``os.environ`` if None), or None if there are none.

        Raises :class:`UsageError` saying what is wrong with the variable.
        """
        text = (os.environ if environ is None else environ).get(VARIABLE)
        if text is None:
            return None
        try:
            return cls._from_json(json.loads(text))
        except ValueError as error:
            raise UsageError(f"{VARIABLE}: unreadable orders: {error}") from error

    @classmethod
    def _from_json(cls, data: Any) -> Orders:
        """Raises :class:`ValueError` naming the first field that isn't as it must be."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"schema {SCHEMA} wanted, {found} found")
        fields = {key: value for key, value in data.items() if key != "schema"}
        checks = {
            "run": _is_absolute,
            "packs": lambda value: value is None or (isinstance(value, list) and all(map(_is_text, value))),
            "plan": lambda value: value is None or _is_absolute(value),
            "prove": lambda value: value in get_args(Prove),
            "on_failure": lambda value: value in get_args(OnFailure),
            "target": lambda value: value in NAMES,
            "audit": lambda value: isinstance(value, bool),
        }
        if fields.keys() != checks.keys():
            raise ValueError(f"the fields {', '.join(checks)} wanted, {', '.join(fields) or 'none'} found")
        for key, check in checks.items():
            if not check(fields[key]):
                raise ValueError(f"{key} can't be {fields[key]!r}")
        packs = fields.pop("packs")
        return cls(packs=None if packs is None else tuple(packs), **fields)

    def plan_is_for_engines(self) -> bool:
        """Whether ``plan`` was made inside an engine: it fits no Hugging Face model then, and the other way round.

        Raises :class:`UsageError` if there is no plan, or none that can be read.
        """
        try:
            data = json.loads(Path(self.plan or "").read_text(encoding="utf-8"))
            return str(data["model"]).startswith(ENGINE_PLAN)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.plan}: not a plan: {error}") from error

    @property
    def asked(self) -> str:
        """What is asked for, in words."""
        return "an audit" if self.audit else "surgery"

    @property
    def for_engines(self) -> bool:
        """Whether an engine's models are meant."""
        return self.plan is None or self.plan_is_for_engines()

    @property
    def for_loading(self) -> bool:
        """Whether Hugging Face models, as ``from_pretrained`` loads them, are meant."""
        return not self.audit and (self.plan is None or not self.plan_is_for_engines())


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_absolute(value: object) -> bool:
    return isinstance(value, str) and os.path.isabs(value)
