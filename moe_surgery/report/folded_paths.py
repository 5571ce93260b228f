"""Many module paths as few: ``layers.0.mlp`` … ``layers.19.mlp`` become ``layers.{0..19}.mlp``.

Only whole numeric parts between dots are folded. Folding is exact: a folded path stands for the paths it was made from
and for no other, so an irregular set of paths becomes several folded ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Box = tuple[tuple[int, ...], ...]
"""One sorted tuple of indices per varying place; the box stands for their cartesian product."""


def fold_paths(paths: Iterable[str]) -> list[tuple[str, int]]:
    """``(folded path, how many paths it stands for)``, ordered by the first path each stands for.

    Raises :class:`ValueError` if a path occurs twice, since module paths are unique.
    """
    groups: dict[tuple[str | None, ...], dict[tuple[int, ...], int]] = {}
    for position, path in enumerate(paths):
        parts = path.split(".")
        template = tuple(None if _is_index(part) else part for part in parts)
        indices = tuple(int(part) for part in parts if _is_index(part))
        group = groups.setdefault(template, {})
        if indices in group:
            raise ValueError(f"path occurs twice: {path}")
        group[indices] = position

    folded = []
    for template, group in groups.items():
        for box in _boxes(sorted(group)):
            first, count = min(_positions(box, group)), 1
            for values in box:
                count *= len(values)
            folded.append((first, _write(template, box), count))
    return [(text, count) for _, text, count in sorted(folded)]


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _boxes(points: Sequence[tuple[int, ...]]) -> list[Box]:
    """Split distinct, sorted index tuples of one length into disjoint boxes that cover them exactly."""
    if not points[0]:
        return [()]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for point in points:
        rests.setdefault(point[0], []).append(point[1:])
    firsts: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rest in rests.items():
        firsts.setdefault(tuple(rest), []).append(first)
    return [(tuple(values), *box) for rest, values in firsts.items() for box in _boxes(rest)]


def _positions(box: Box, group: dict[tuple[int, ...], int]) -> list[int]:
    return [at for point, at in group.items() if all(i in values for i, values in zip(point, box, strict=True))]


def _write(template: tuple[str | None, ...], box: Box) -> str:
    places = iter(box)
    return ".".join(_braced(next(places)) if part is None else part for part in template)


def _braced(values: Sequence[int]) -> str:
    """``5``, ``{0,1}``, ``{0..3,5,7..9}``, ``{1..31..2}`` for every second, as shells write it."""
    if len(values) == 1:
        return str(values[0])
    parts, start = [], 0
    while start < len(values):
        end = start + 1
        stride = values[end] - values[start] if end < len(values) else 0
        while end < len(values) and values[end] - values[end - 1] == stride:
            end += 1
        if stride == 1 and end - start >= 3:
            parts.append(f"{values[start]}..{values[end - 1]}")
        elif end - start >= 4:
            parts.append(f"{values[start]}..{values[end - 1]}..{stride}")
        else:
            end = start + 1
            parts.append(str(values[start]))
        start = end
    return "{" + ",".join(parts) + "}"
