"""Families at tiny widths as they are published otherwise: in bfloat16, and with as many experts as large ones have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from moe_surgery.errors import UsageError
from moe_surgery.testing.families import Family, build, config_fields, families, outputs

if TYPE_CHECKING:
    from torch import nn

EXPERTS, TOP_K = 256, 8
FORMS = {"bfloat16": "in bfloat16", "many": f"with {EXPERTS} experts"}
_COUNTS = frozenset(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
_CHOICES = frozenset(["num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"])


@dataclass(frozen=True)
class Published:
    """What became of families in these forms, by family and form, as ``benchmarks/published.py`` wrote it down."""

    outcomes: Mapping[tuple[str, str], str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises :class:`UsageError` if the file isn't one of them."""
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            return cls({(row["family"], row["form"]): str(row["outcome"]) for row in rows})
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no result of benchmarks/published.py: {error!r}") from error

    def of(self, family: str) -> list[str]:
        """What became of a family in each of the :data:`FORMS`."""
        return [self.outcomes.get((family, form), "not tried") for form in FORMS]

    def sentence(self) -> str:
        """What to quote."""
        folders: dict[str, list[str]] = {}
        for name, one in families().items():
            folders.setdefault(one.folder, []).append(name)
        counts = [
            sum(all(self.outcomes.get((name, form)) == "replaced" for name in names) for names in folders.values())
            for form in FORMS
        ]
        told = ", ".join(f"{count} {FORMS[form]}" for count, form in zip(counts, FORMS, strict=True))
        return f"Of the {len(folders)} families these are replaced with proof: {told} (`benchmarks/published.py`)."


def build_form(chosen: Family, form: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A family's model in one of the :data:`FORMS`, and its inputs.

    In bfloat16 what its class keeps in float32 whatever the checkpoint's dtype, such as a correction bias, stays so, if
    the model runs like that.
    With many experts top-k is 8, but where routing is top-1.
    """
    import torch
    from torch import Tensor

    if form == "many":
        model, inputs = build(chosen.name, form, seed, more(config_fields(chosen)))
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.shape == (EXPERTS,):  # a bias beside so many scores is small, or some experts are never chosen
                tensor.data /= 16
        return model, inputs
    model, inputs = build(chosen.name, seed=seed)
    wide = [name for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict") if getattr(model, name, None)]
    kept = {part for name in wide for part in getattr(model, name)}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not any(part in name for part in kept):
            tensor.data = tensor.data.bfloat16()
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = value.to(torch.bfloat16)
    try:
        outputs(model, inputs)
    except RuntimeError:  # code that doesn't convert on the way to what is kept
        model.bfloat16()
    return model, inputs


def more(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a config's ``fields`` that say how many experts there are, and are chosen, with larger values."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and (inner := more(value)):
            found[name] = inner
        elif name in _COUNTS and type(value) is int:
            found[name] = EXPERTS
        elif name in _CHOICES and type(value) is int and value > 1:
            found[name] = TOP_K
    return found
