"""Elements of SVG as text. Whatever comes from a model passes through here, where it can't become markup."""

from __future__ import annotations

import html
import re

from moe_surgery.report.pictures.palette import style

_MARGIN = 20
_HEAD = re.compile(r'<svg [^>]*width="([\d.]+)" height="([\d.]+)"')
MONO = 0.61
SANS = 0.56
"""About how wide a character is, in units of the font's size."""

_CONTROL = {number: "�" for number in range(32) if number not in (9, 10, 13)}


def safe(text: object) -> str:
    """``text`` as it may stand in markup, between tags or in a quoted attribute."""
    return html.escape(str(text).translate(_CONTROL).encode("utf-8", "backslashreplace").decode(), quote=True)


def element(name: str, *children: str, **attributes: object) -> str:
    """An element; ``class_`` is the attribute ``class``, and underscores are hyphens. ``children`` are markup."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{safe(_number(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{told}>{''.join(children)}</{name}>" if children else f"<{name}{told}/>"


def label(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Text on the baseline ``y``."""
    placed = {} if anchor == "start" else {"text_anchor": anchor}
    return element("text", safe(text), x=x, y=y, **({"class_": kind} if kind else {}), **placed)


def title(text: str) -> str:
    """What a pointer is told."""
    return element("title", safe(text))


def drawing(width: float, height: float, told: str, *parts: str) -> str:
    """A picture; ``told`` is what is said of it to whoever can't see it."""
    return element(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_number(width)} {_number(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=told,
    )


def alone(picture: str) -> str:
    """The picture as a file of its own, on paper with a margin."""
    head, end = _HEAD.match(picture), picture.index(">") + 1
    assert head is not None
    width, height = (float(size) + 2 * _MARGIN for size in head.groups())
    paper = element("rect", width=width, height=height, class_="paper")
    moved = element("g", picture[end:].removesuffix("</svg>"), transform=f"translate({_MARGIN} {_MARGIN})")
    told = html.unescape(picture[: end - 2].rpartition('aria-label="')[2])
    return drawing(width, height, told, element("style", style()), paper, moved) + "\n"


def fitted(text: str, width: float, size: float, per: float = SANS) -> str:
    """``text`` cut in its middle, so that it takes no more than ``width``."""
    most = max(int(width / (size * per)), 4)
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
