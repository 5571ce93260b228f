"""Elements of SVG as text. Whatever comes from a model passes through here, where it can't become markup."""

from __future__ import annotations

from html import escape

from moe_surgery.report.pictures.palette import style

MONO = 0.61
SANS = 0.56
"""About how wide a character is, in units of the font's size."""

_CONTROL = {number: "�" for number in range(32) if number not in (9, 10, 13)}


def safe(text: object) -> str:
    """``text`` as it may stand in markup, between tags or in a quoted attribute."""
    return escape(str(text).translate(_CONTROL).encode("utf-8", "backslashreplace").decode(), quote=True)


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
    """The picture as a file of its own."""
    end = picture.index(">") + 1
    paper = element("rect", width="100%", height="100%", class_="paper")
    return f"{picture[:end]}<style>{style()}</style>{paper}{picture[end:]}\n"


def fitted(text: str, width: float, size: float, per: float = SANS) -> str:
    """``text`` cut in its middle, so that it takes no more than ``width``."""
    most = max(int(width / (size * per)), 4)
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
