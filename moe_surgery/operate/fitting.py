"""A plan held against the model that it is to be carried out on."""

from __future__ import annotations

from collections.abc import Sequence

from moe_surgery.errors import PlanError
from moe_surgery.planning.plan import Plan
from moe_surgery.planning.survey import Surveyed
from moe_surgery.read.reading import Reading
from moe_surgery.read.record.tensor_entries import own_dtype


def check_fits(plan: Plan, sites: Sequence[Surveyed]) -> dict[str, Reading]:
    """The readings of the sites a plan replaces. Raises :class:`PlanError` if the model isn't the one planned for."""
    _check_place(plan, sites)
    found = {item.site.path: item for item in sites}
    planned = [step.path for step in plan.steps]
    if list(found) != planned:
        strange = sorted(set(found) ^ set(planned)) or ["their order"]
        raise PlanError(f"the plan is for other sites than the model has: they differ in {', '.join(strange[:3])}")
    readings = {}
    for step in plan.steps:
        if step.outcome != "replaced":
            continue
        item = found[step.path]
        if item.reading is None:
            raise PlanError(f"{step.path}: planned to be replaced, but now {item.unread or 'already fused'}")
        if item.held is not None:
            raise PlanError(f"{step.path}: planned to be replaced, but now {item.held}")
        if item.reading.spec != step.spec:
            wanted = step.spec.sentence() if step.spec else "nothing"
            raise PlanError(f"{step.path}: planned as {wanted}, but now {item.reading.spec.sentence()}")
        readings[step.path] = item.reading
    return readings


def _check_place(plan: Plan, sites: Sequence[Surveyed]) -> None:
    """Raise :class:`PlanError` if the sites are on another device or in another dtype than the plan was asked for."""
    tensors = {f"{item.site.path}.{name}": one for item in sites for name, one in item.site.module.named_parameters()}
    dtype = own_dtype(tensors)
    for device in sorted({tensor.device.type for tensor in tensors.values()}):
        plan.check_place(device, str(dtype).removeprefix("torch."))
