"""The colours of pages and pictures: few, each with one meaning, in light and in dark."""

from __future__ import annotations

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "panel": "#f5f6f8",
    "rule": "#d5dae1",
    "ink": "#14181f",
    "muted": "#566070",
    "good": "#0a6b4d",
    "same": "#34588f",
    "doubt": "#855600",
    "bad": "#b0231b",
    "tint": "#e3f1ec",
    "flaw": "#fbe9e7",
}
DARK: Mapping[str, str] = {
    "paper": "#101318",
    "panel": "#181c23",
    "rule": "#343c48",
    "ink": "#e7eaee",
    "muted": "#9da8b7",
    "good": "#5fcfa4",
    "same": "#92b6ee",
    "doubt": "#e2b15c",
    "bad": "#ff8d83",
    "tint": "#15302a",
    "flaw": "#3a1b1a",
}
TONES: Mapping[str, str] = {
    "replaced": "good",
    "kept": "same",
    "missed": "doubt",
    "refused": "bad",
    "right": "good",
    "wrong": "bad",
    "not comparable": "doubt",
    "operated": "good",
    "unpatched": "doubt",
    "failed": "bad",
    "audited": "good",
}
"""The colour of each outcome."""

MONOSPACED = 'ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace'
PLAIN = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif'

_RULES = f"""
svg{{font-family:{PLAIN};font-size:13px;fill:var(--ink);display:block;max-width:100%}}
svg .m{{font-family:{MONOSPACED};font-size:12px}}
svg .q{{fill:var(--muted)}} svg .s{{font-size:12px}} svg .b{{font-weight:600}}
svg .i{{fill:var(--paper);font-weight:600;font-size:12px}}
svg .paper{{fill:var(--paper)}} svg .box{{fill:var(--panel);stroke:var(--rule)}}
svg .line{{fill:none;stroke:var(--rule)}} svg .flow{{fill:none;stroke:var(--muted)}} svg .tip{{fill:var(--muted)}}
svg .frame{{fill:none;stroke:var(--good);stroke-width:1.5}} svg .tint{{fill:var(--tint)}} svg .flaw{{fill:var(--flaw)}}
svg .hollow{{fill:var(--paper);stroke:var(--muted);stroke-width:1.5}}
svg .limit{{stroke:var(--good);stroke-dasharray:3 3}}
""".strip()
_FILLS = "".join(f"svg .{tone}{{fill:var(--{tone})}}" for tone in dict.fromkeys((*TONES.values(), "ink", "muted")))


def style() -> str:
    """The rules for pictures, with the colours they name."""
    return f"{colours()}{_RULES}{_FILLS}"


def colours() -> str:
    """The colours by name, as the reader's scheme wants them; on paper light ones."""
    return f":root{{{_named(LIGHT)}}}@media screen and (prefers-color-scheme:dark){{:root{{{_named(DARK)}}}}}"


def _named(scheme: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in scheme.items())
