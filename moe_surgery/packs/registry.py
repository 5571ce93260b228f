"""Where packs come from: the built-in ones, installed third parties' ones, and files given by the user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module, metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path

from moe_surgery.errors import PackError, UsageError
from moe_surgery.packs.file import load_pack, parse_pack
from moe_surgery.packs.pack import Pack

GROUP = "moe_surgery.packs"
BUILT_IN = "moe_surgery.rules"


def load_packs(chosen: Sequence[str | Path | Pack] | None = None) -> tuple[Pack, ...]:
    """The packs to use, in the order in which their rules are tried.

    None is every installed pack: third parties' in the order of their entry points' names, then the built-in ones.
    Otherwise exactly the ``chosen`` ones, in their order: a pack, the path of a ``.toml`` file, or the name of an
    installed pack. Packs marked ``last`` go to the end. Raises :class:`PackError` for a bad pack or two of one name,
    :class:`UsageError` for a name that no installed pack has.
    """
    if chosen is None:
        return _ordered([*entry_point_packs(), *built_in_packs()])
    packs: list[Pack] = []
    installed: dict[str, Pack] | None = None
    for choice in chosen:
        if isinstance(choice, Pack):
            packs.append(choice)
        elif isinstance(choice, Path) or choice.endswith(".toml"):
            packs.append(load_pack(Path(choice)))
        else:
            installed = installed or {pack.name: pack for pack in load_packs()}
            if choice not in installed:
                raise UsageError(f'no pack is named "{choice}" (installed: {", ".join(installed)}; files end in .toml)')
            packs.append(installed[choice])
    return _ordered(packs)


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
    checkout = package.is_dir() and not (package / "rules").is_dir()
    folder: Traversable = package.parent / "rules" if checkout else resources.files(BUILT_IN)
    return _folder_packs(folder, f"the built-in packs, {folder}")


def entry_point_packs() -> list[Pack]:
    """The packs in the packages that entry points of the group ``moe_surgery.packs`` name.

    The package is imported, as finding its folder needs; nothing else of it is run. Raises :class:`PackError` naming
    the entry point if the package can't be imported or a pack of it is bad.
    """
    packs: list[Pack] = []
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        owner = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        label = f'entry point "{point.name} = {point.value}"{owner}'
        try:
            packs += _folder_packs(_resources(point), point.value)
        except PackError as error:
            raise PackError(f"{error} ({label})") from error
        except Exception as error:  # the import ran a stranger's code, which may raise anything
            raise PackError(f"{label}: {type(error).__name__}: {error}") from error
    return packs


def _resources(point: metadata.EntryPoint) -> Traversable:
    if point.attr or point.extras:
        raise PackError(f"{point.value} must be the name of a package that holds .toml files, and nothing more")
    module = import_module(point.module)
    if not hasattr(module, "__path__"):
        raise PackError(f"{point.value} is a module, not a package that holds .toml files")
    return resources.files(module)


def _folder_packs(folder: Traversable, what: str) -> list[Pack]:
    files = (
        sorted(
            (file for file in folder.iterdir() if file.name.endswith(".toml") and file.is_file()),
            key=lambda file: file.name,
        )
        if folder.is_dir()
        else []
    )
    if not files:
        raise PackError(f"{what}: no .toml file is there")
    return [parse_pack(file.read_bytes(), str(file)) for file in files]


def _ordered(packs: Sequence[Pack]) -> tuple[Pack, ...]:
    names: dict[str, Pack] = {}
    for pack in packs:
        first = names.setdefault(pack.name, pack)
        if first is not pack:
            raise PackError(f'{pack.origin}: a pack named "{pack.name}" is already at {first.origin}')
    return tuple(sorted(packs, key=lambda pack: pack.last))
