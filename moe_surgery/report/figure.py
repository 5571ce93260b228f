"""The terminal's rendering of a report as plain text, as a picture, and as a piece of a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from rich.console import Console

from moe_surgery.report.outcomes import Outcomes
from moe_surgery.report.terminal import Note, render

# rich's own template fetches a web font and leaves blanks to the viewer, some of which drop those that lead a line.
_TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-family: system-ui, sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix" xml:space="preserve">
{matrix}
</g>
</g>
</svg>
"""


_PAGE = '<pre style="white-space: pre; overflow-x: auto; line-height: 1.3">{code}</pre>'


def plain(render: Callable[[Console], None], width: int) -> str:
    """What ``render`` prints, ``width`` columns wide, without colours."""
    page = io.StringIO()
    render(Console(file=page, width=width, color_system=None))
    return page.getvalue().rstrip("\n")


def page(report: Outcomes, *, width: int = 128) -> str:
    """``report`` as a piece of HTML of ``width`` columns, in the page's own colours for text."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    render(report, console)
    return console.export_html(inline_styles=True, code_format=_PAGE)


def picture(report: Outcomes, *, notes: Sequence[Note] = (), title: str = "moe-surgery", width: int = 128) -> str:
    """``report`` as an SVG of ``width`` columns.

    It needs nothing but itself to be shown, and the same report gives the same text.
    """
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    render(report, console, notes)
    return console.export_svg(title=title, unique_id="moe-surgery", code_format=_TEMPLATE)
