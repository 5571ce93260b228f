"""A headless browser for tests of pages, where the machine has one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest
from hanging import HANG

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_MEASURE = """
function tone(text) { return text.match(/[0-9.]+/g).map(Number); }
function light(c) { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; }
function contrast(a, b) { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); }
function behind(element) { for (let e = element; e; e = e.parentElement) {
    const c = tone(e.ownerDocument.defaultView.getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; }
function measure(frame) {
  const page = frame.contentDocument, view = frame.contentWindow; let worst = 99, where = "";
  for (const e of page.querySelectorAll("body *:not(svg *)")) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
    const found = contrast(tone(view.getComputedStyle(e).color).slice(0, 3), behind(e));
    if (found < worst) { worst = found; where = e.outerHTML.slice(0, 120); } }
  const root = page.documentElement;
  document.body.replaceChildren(JSON.stringify({contrast: worst, where: where, wide: root.scrollWidth,
    shown: root.clientWidth, background: view.getComputedStyle(page.body).backgroundColor})); }
"""


def browser() -> str:
    """The browser's path; skips the test where there is none."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on this machine; CHROMIUM=PATH names one")
    return found


def measured(page: str, folder: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """What a browser makes of ``page`` in a window so wide; that its console had nothing to say is asserted."""
    file = folder / f"{width}-{dark}.html"
    frame = f'<iframe width="{width}" height="900" srcdoc="{escape(page)}" onload="measure(this)"></iframe>'
    file.write_text(f'<meta charset="utf-8"><script>{_MEASURE}</script><body>{frame}', encoding="utf-8")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width + 40, 600)},1000"]
    command += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    ended = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=HANG, check=True)
    assert "CONSOLE" not in ended.stderr, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r"<body>(\{.*\})</body>", ended.stdout, re.DOTALL)
    assert found, ended.stdout[-500:]
    told: dict[str, Any] = json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return told
