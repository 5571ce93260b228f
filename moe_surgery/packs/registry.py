"""Where packs come from: the built-in ones, installed third parties' ones, and files given by the user."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from moe_surgery.errors import PackError, UsageError
from moe_surgery.packs.file import load_pack
from moe_surgery.packs.pack import Pack

GROUP = "moe_surgery.packs"
logger = logging.getLogger("moe_surgery")


def load_packs(chosen: Sequence[str | Path | Pack] | None = None) -> tuple[Pack, ...]:
    """The packs to use, in the order in which their rules are tried.

    None is every installed pack: third parties' in the order of their entry points' names, then the built-in ones. A
    third party's pack that can't be used is passed over with a warning. Otherwise exactly the ``chosen`` ones, in their
    order: a pack, the path of a ``.toml`` file, or the name of an installed pack; installed packs of other names don't
    matter then. Packs marked ``last`` go to the end. Raises :class:`PackError` for a bad pack that was chosen or two of
    one name, :class:`UsageError` for a name that no installed pack has.
    """
    if chosen is None:
        found = installed_packs()
        for problem in found.problems:
            logger.warning("pack passed over: %s", problem)
        return found.packs
    if isinstance(chosen, (str, Path, Pack)):
        raise UsageError(f"packs must be a list of packs, names or files, not the one {chosen!r}")
    packs: list[Pack] = []
    for choice in chosen:
        if isinstance(choice, Pack):
            packs.append(choice)
        elif isinstance(choice, Path) or (isinstance(choice, str) and choice.endswith(".toml")):
            packs.append(load_pack(Path(choice)))
        elif isinstance(choice, str):
            packs.append(_named(choice))
        else:
            raise UsageError(f"a pack is a name, a .toml file or a Pack, not {choice!r}")
    return _ordered(packs)


def _named(name: str) -> Pack:
    """The installed pack ``name``; nothing of third parties is looked at for a built-in one."""
    built_in = next((pack for pack in built_in_packs() if pack.name == name), None)
    if built_in is not None:
        return built_in
    found = installed_packs()
    pack = next((pack for pack in found.packs if pack.name == name), None)
    if pack is None:
        passed_over = "".join(f"; passed over: {problem}" for problem in found.problems)
        known = ", ".join(pack.name for pack in found.packs)
        raise UsageError(f'no pack is named "{name}" (installed: {known}; files end in .toml){passed_over}')
    return pack


def check_packs(paths: Iterable[str | Path]) -> list[Pack]:
    """Read pack files, and every ``.toml`` file directly in the folders among ``paths``.

    Raises :class:`PackError` for the first bad one, for two of one name, and for a folder without any.
    """
    packs: list[Pack] = []
    for path in map(Path, paths):
        packs += _folder_packs(path, str(path)) if path.is_dir() else [load_pack(path)]
    return list(_ordered(packs))


def built_in_packs() -> list[Pack]:
    """The packs that come with this package, by file name; also from a checkout that is not installed."""
    package = Path(__file__).resolve().parent.parent
    # In a checkout they lie beside the package, and another installation's must not be taken for them.
    inside = package / "rules"
    folder = inside if inside.is_dir() else package.parent / "rules"
    return _folder_packs(folder, f"the built-in packs, {folder}")


@dataclass(frozen=True)
class Installed:
    """The installed packs that can be used, in their order, and why others can't, each naming file and entry point."""

    packs: tuple[Pack, ...]
    problems: tuple[str, ...]


def installed_packs() -> Installed:
    """The packs in the packages that entry points of the group ``moe_surgery.packs`` name, then the built-in ones.

    A package's folder is found without importing it: nothing of a third party's is run. A bad file, a folder without
    any or one that isn't there, and a pack whose name is taken are passed over.
    """
    built_in = built_in_packs()
    packs: list[Pack] = []
    problems: list[str] = []
    names = {pack.name: pack for pack in built_in}
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        owner = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        label = f'entry point "{point.name} = {point.value}"{owner}'
        try:
            files = _toml_files(_folder(point), point.value)
        except PackError as error:
            problems.append(f"{error} ({label})")
            continue
        for file in files:
            try:
                pack = load_pack(file)
                first = names.setdefault(pack.name, pack)
                if first is not pack:
                    raise PackError(f'{pack.origin}: a pack named "{pack.name}" is already at {first.origin}')
                packs.append(pack)
            except PackError as error:
                problems.append(f"{error} ({label})")
    return Installed(_ordered([*packs, *built_in]), tuple(problems))


def _folder(point: metadata.EntryPoint) -> Path:
    """The folder of the package that an entry point names. Raises :class:`PackError` if there is none."""
    if point.attr or point.extras:
        raise PackError(f"{point.value} must be the name of a package that holds .toml files, and nothing more")
    top, *inner = point.module.split(".")
    # A dotted name would import what is before the last dot.
    try:
        spec = find_spec(top)
    except Exception as error:  # finders are strangers' code too
        raise PackError(f"{top}: {type(error).__name__}: {error}") from error
    if spec is None:
        raise PackError(f"no package {top} is installed")
    places = [Path(place, *inner) for place in spec.submodule_search_locations or ()]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise PackError(f"{point.value} is no package that holds .toml files")
    return found


def _folder_packs(folder: Path, what: str) -> list[Pack]:
    return [load_pack(file) for file in _toml_files(folder, what)]


def _toml_files(folder: Path, what: str) -> list[Path]:
    """The pack files directly in ``folder``, by name. Raises :class:`PackError` if there is none."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix == ".toml" and file.is_file())
    except OSError as error:
        raise PackError(f"{what}: {error.strerror or error}") from error
    if not files:
        raise PackError(f"{what}: no .toml file is there")
    return files


def _ordered(packs: Sequence[Pack]) -> tuple[Pack, ...]:
    names: dict[str, Pack] = {}
    for pack in packs:
        first = names.setdefault(pack.name, pack)
        if first is not pack:
            raise PackError(f'{pack.origin}: a pack named "{pack.name}" is already at {first.origin}')
    return tuple(sorted(packs, key=lambda pack: pack.last))
