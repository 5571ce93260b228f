"""A model that a verb is about: where it came from, what is planned for it, and what is known of one of its sites."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from moe_surgery import checks
from moe_surgery.errors import UsageError
from moe_surgery.models.checkpoint import CONFIG, Digest, digest
from moe_surgery.packs.match import Match, Miss
from moe_surgery.packs.pack import Pack, Rule
from moe_surgery.packs.registry import load_packs
from moe_surgery.planning.costs import Costs
from moe_surgery.planning.deciding import make_plan, trails
from moe_surgery.planning.plan import Plan
from moe_surgery.planning.selection import Selection
from moe_surgery.planning.survey import Surveyed, survey
from moe_surgery.report.explanation import Explanation
from moe_surgery.targets import get_target

if TYPE_CHECKING:
    from moe_surgery.models.quantisation import Quantisation

Model = nn.Module | str | Path
Packs = Sequence[str | Path | Pack] | None


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to look at: live, or built on the meta device from a directory's or hub id's config."""

    name: str
    module: nn.Module
    config: object
    directory: Path | None
    quantisation: Quantisation | None = None

    @classmethod
    def of(cls, model: Model, trust_remote_code: bool = False, dtype: str | None = None) -> Subject:
        if not isinstance(model, nn.Module | str | Path):
            raise UsageError(f"a model is a module, a directory or a hub id, not {checks.shown(model)}")
        if isinstance(model, nn.Module):
            _check_sharded(model)
            config = getattr(model, "config", None)
            name = str(getattr(config, "name_or_path", "") or "")
            directory = Path(name) if name and os.path.isfile(os.path.join(name, CONFIG)) else None
            return cls(name or type(model).__name__, model, config, directory)
        from moe_surgery.models.opening import open_meta

        opened = open_meta(str(model), trust_remote_code=trust_remote_code, dtype=dtype)
        return cls(opened.name, opened.module, opened.config, opened.directory, opened.quantisation)

    def obstacle(self, item: Surveyed) -> str | None:
        """Why a site that can be read can't be operated on in the numbers that its weights are kept in."""
        if self.quantisation is None or item.reading is None:
            return None
        mlp = item.reading.layout.experts[0]
        if not self.quantisation.covers(f"{item.site.path}.{mlp.gate.path.removesuffix('.weight')}"):
            return None
        return f"its weights are {self.quantisation.scheme}; {self.quantisation.advice}"

    def digest(self) -> Digest | None:
        """What tells the checkpoint it came from from others, if that is known."""
        return None if self.directory is None else digest(self.directory)


def _check_sharded(model: nn.Module) -> None:
    """Raise :class:`UsageError` for a model whose modules have given up their weights: it would have no site."""
    sharding = sys.modules.get("torch.distributed.fsdp")
    if sharding is not None and any(
        isinstance(module, sharding.FullyShardedDataParallel) for module in model.modules()
    ):
        raise UsageError(
            "FullyShardedDataParallel holds the model's weights, flat and in shards; operate on the model before it is "
            "wrapped"
        )


def planned(
    subject: Subject,
    sites: Sequence[Surveyed],
    packs: Packs,
    target: str,
    selection: Selection,
    device: str = "cpu",
) -> Plan:
    """A plan; ``device`` is the type of device that a model on the meta device is planned for."""
    started = time.perf_counter()
    name, config, chosen = subject.name, subject.config, load_packs(packs)
    made = make_plan(name, sites, config, chosen, target, get_target, selection, subject.obstacle, device)
    real = next((parameter.device.type for parameter in subject.module.parameters() if not parameter.is_meta), device)
    costs = Costs.of(subject.module, [step.path for step in made.steps if step.outcome == "replaced"], real)
    return replace(made, checkpoint=subject.digest(), seconds=time.perf_counter() - started, costs=costs)


def explained(subject: Subject, path: str, chosen: Sequence[Pack]) -> Explanation:
    """What is known of the site at ``path``, and how near each rule of the ``chosen`` packs comes to it.

    Raises :class:`UsageError` if there is no such site.
    """
    sites = survey(subject.module)
    item = next((item for item in sites if item.site.path == path), None)
    if item is None:
        known = ", ".join(item.site.path for item in sites[:5]) or "none"
        raise UsageError(f"no MoE-looking site at {path!r}; there are {len(sites)}: {known}{' …' * (len(sites) > 5)}")
    site, reading = item.site, item.reading
    if reading is None:
        rules = () if item.swapped else tuple(rule for pack in chosen for rule in pack.rules)
        glances = [(rule, Miss(site, rule.glance(site, subject.config), item.unread)) for rule in rules]
        unread = item.unread or "already fused"
        return Explanation(path, site.kind, None, None, unread, tuple(sorted(glances, key=_nearness)))
    held = sorted(trails(item, chosen, subject.config), key=_nearness)
    return Explanation(
        path,
        site.kind,
        reading.spec,
        reading.combine,
        None,
        tuple(held),
        children=reading.children,
        alike=tuple(other.site.path for other in sites if other is not item and other.reading == reading),
        edits={
            rule.full_name: rule.edits(found, reading, subject.config)
            for rule, found in held
            if isinstance(found, Miss)
        },
    )


def _nearness(held: tuple[Rule, Match | Miss]) -> int:
    return sum(not clue.held for clue in held[1].trail)
