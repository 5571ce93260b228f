"""Reading every site of a model; sites of the same structure are read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from moe_surgery.installed.imports import uncollected
from moe_surgery.models.site import Site
from moe_surgery.models.tree import find_sites
from moe_surgery.planning.surroundings import Surroundings
from moe_surgery.read.asking import Records
from moe_surgery.read.block import read, read_around, read_within
from moe_surgery.read.experts import experts_modules, read_experts
from moe_surgery.read.in_slots import read_in_slots, slots_modules
from moe_surgery.read.parsed import COMPARES, MIXES, NO_TOP_K
from moe_surgery.read.reading import Broken, Reading, Unfollowed, Unreadable, Untold
from moe_surgery.read.record.attributes import names_read
from moe_surgery.read.sameness import Readings, structure
from moe_surgery.read.unrecorded import check_site
from moe_surgery.targets.base import SwappedBlock
from moe_surgery.weights.tensors import weight

_CHOOSE = frozenset(["topk", "argmax", "max", "argsort", "sort"])
_NOR = "; nor its experts alone"


@dataclass(frozen=True, eq=False)
class Surveyed:
    """A site with what was read there, or why it could not be read; neither for a block swapped in before.

    ``held`` says who else in the model could use or change the weights of a site that was read, if anybody could.
    """

    site: Site
    reading: Reading | None
    unread: str | None
    held: str | None = None

    @property
    def swapped(self) -> bool:
        return isinstance(self.site.module, SwappedBlock)


def survey(model: nn.Module) -> tuple[Surveyed, ...]:
    """Every site of ``model``, read. Where only a block's module of experts can be read, that module is the site."""
    known = Readings()
    shared = _shared_modules(model)
    surveyed = [_survey(site, known, shared) for site in find_sites(model)]
    surveyed = [item for item in surveyed if item.site.sure or item.reading is not None or _may_choose(item)]
    around = Surroundings(model, [item.site for item in surveyed if item.reading is not None])
    return tuple(
        item if item.reading is None else replace(item, held=around.objection(item.site.path)) for item in surveyed
    )


def _may_choose(item: Surveyed) -> bool:
    """Whether a place that can't be read may route: its record has a top-k, or its code names something of the kind.

    One that mixes what all of its experts compute is told too.
    """
    if any(reason in (item.unread or "") for reason in (MIXES, COMPARES)):
        return True
    told, _, _ = (item.unread or "").partition(_NOR)
    return told != NO_TOP_K and not _CHOOSE.isdisjoint(names_read(item.site.module))


def _survey(site: Site, known: Readings, shared: dict[int, list[str]]) -> Surveyed:
    if isinstance(site.module, SwappedBlock):
        return Surveyed(site, None, None)
    if site.told is not None:
        return Surveyed(site, None, site.told)
    records = Records(site.module)
    try:
        return _whole(site, known, shared, records)
    except Broken as error:
        return Surveyed(site, None, str(error))
    except Unreadable as error:
        inside = _inside(site, known, shared, str(error))
        if inside.reading is not None:
            return inside
        around = _around(site, known, shared, records, inside, isinstance(error, Unfollowed))
        return around if around.reading is not None else _in_slots(site, known, shared, around)


def _around(
    site: Site, known: Readings, shared: dict[int, list[str]], records: Records, unread: Surveyed, alone: bool
) -> Surveyed:
    """A block of which a part can be read, split behind its router or all around its experts; else ``unread``.

    What came closest to being taken is named too: where the experts were found, why the rest can't go on as it is.
    With ``alone`` nothing was found out of it without what it takes beside its input.
    """
    problem: Unreadable = Untold()
    for reader in (read_around, read_within):
        try:
            _check_place(site, shared)
            return Surveyed(site, replace(_read(site, known, reader, records), around=unread.unread or ""), None)
        except Unreadable as error:
            vague = isinstance(error, Unfollowed) and not isinstance(problem, (Untold, Unfollowed))
            problem = problem if vague or (alone and isinstance(error, Untold)) else error
    if isinstance(problem, (Untold, Unfollowed)) or str(problem) in (unread.unread or ""):
        return unread
    return replace(unread, unread=f"{unread.unread}; nor can the rest of it go on as it is: {problem}")


def _whole(site: Site, known: Readings, shared: dict[int, list[str]], records: Records) -> Surveyed:
    _check_place(site, shared)
    check_site(site.module)
    reading = _read(site, known, read, records)
    if reading.above_zero is not None:
        held = weight(site.module, reading.above_zero.path)
        if held.is_meta or bool((held < 0).any()):
            where = "has no values here" if held.is_meta else "ranks some inside of them lower"
            raise Unreadable(f"experts outside its groups rank as 0, and its correction bias {where}")
    return Surveyed(site, reading, None)


def _inside(site: Site, known: Readings, shared: dict[int, list[str]], reason: str) -> Surveyed:
    """The only module of experts inside a block that can't be read for ``reason``, if it can be; else both reasons."""
    found, left = _alone(site, known, shared, experts_modules(site.module), read_experts, 3, reason)
    if len(found) == 1:
        return found[0]
    return Surveyed(site, None, reason + (_several(site, found) if found else _why(left)))


def _in_slots(site: Site, known: Readings, shared: dict[int, list[str]], unread: Surveyed) -> Surveyed:
    """The only module of experts inside a block that is called with tokens in slots, if it can be read; or ``unread``.

    Where there is one that can't be read, its reason is given too; what doesn't take slots is none.
    """
    reason = unread.unread or ""
    found, left = _alone(site, known, shared, slots_modules(site.module), read_in_slots, 1, reason)
    if len(found) == 1:
        return found[0]
    told = [(path, error) for path, error in left if not isinstance(error, Unfollowed)]
    return replace(unread, unread=reason + (_several(site, found) if found else _why(told)))


def _alone(
    site: Site,
    known: Readings,
    shared: dict[int, list[str]],
    modules: Iterator[tuple[str, nn.Module]],
    reader: Callable[[nn.Module], Reading],
    inputs: int,
    reason: str,
) -> tuple[list[Surveyed], list[tuple[str, Unreadable]]]:
    """Which of the ``modules`` inside a block, left alone for ``reason``, can be read as experts; why others can't.

    They are called with so many ``inputs``.
    """
    found: list[Surveyed] = []
    left: list[tuple[str, Unreadable]] = []
    for path, module in modules:
        inner = Site(f"{site.path}.{path}" if site.path else path, module)
        try:
            _check_place(inner, shared)
            check_site(module, inputs=inputs)
            found.append(Surveyed(inner, replace(_read(inner, known, reader), around=reason), None))
        except Unreadable as error:
            left.append((path, error))
    return found, left


def _why(left: list[tuple[str, Unreadable]]) -> str:
    """Why the only module that might be a block's experts can't be read alone, behind the block's own reason."""
    return f"{_NOR} ({left[0][0]}): {left[0][1]}" if len(left) == 1 else ""


def _several(site: Site, found: list[Surveyed]) -> str:
    """Why none of several modules that might be a block's experts is replaced alone."""
    names = [item.site.path.removeprefix(f"{site.path}.") for item in found]
    return f"{_NOR} ({', '.join(names)}): there are {len(names)} such modules, and no more than one is replaced"


def _check_place(site: Site, shared: dict[int, list[str]]) -> None:
    if not site.path:
        raise Unreadable("it is the whole model; a block can be replaced only inside a model")
    if len(shared[id(site.module)]) > 1:
        raise Unreadable(f"it is one module at several places: {', '.join(shared[id(site.module)])}")


def _read(site: Site, known: Readings, reader: Callable[..., Reading], *records: Records) -> Reading:
    def read_now() -> Reading:
        with uncollected():
            try:
                return reader(site.module, *records)
            except Unreadable:
                raise
            except Exception as error:  # of a block that nobody thought of; the others are replaced all the same
                what = f"{type(error).__name__}: {error}"
                raise Unreadable(f"reading it broke off, which is a mistake of this library ({what})") from error

    return known.once((reader, structure(site.module, site.path)), read_now)


def _shared_modules(model: nn.Module) -> dict[int, list[str]]:
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    return places
