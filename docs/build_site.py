"""Build the documentation's site and check every link in it: ``python docs/build_site.py``, which ``make docs`` calls.

The README is the first page. Pages are copied to ``build/docs`` first, since they link to files that aren't pages, such
as results of benchmarks; these are copied along. A link that leads nowhere, or to no heading, is an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
COPY, SITE = ROOT / "build" / "docs", ROOT / "site"
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_ABOVE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.anchors.add(value)


def copied() -> None:
    """Make ``build/docs`` from the pages and whatever they link to."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT / "docs", COPY, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    _page(ROOT / "README.md", COPY / "index.md")
    for name in _ABOVE:
        _page(ROOT / name, COPY / name)
    for page in (ROOT / "docs").glob("*.md"):
        _page(page, COPY / page.name)


def _page(source: Path, copy: Path) -> None:
    """Copy a page; a link to a file in ``docs`` goes to its copy, one to any other file takes that file along."""

    def moved(link: re.Match[str]) -> str:
        target, _, anchor = link[2].partition("#")
        if urlsplit(target).scheme or not target:
            return link[0]
        file = (source.parent / target).resolve()
        inside = ROOT / "docs" in file.parents
        place = file.relative_to(ROOT / "docs" if inside else ROOT)
        place = Path("index.md") if place == Path("README.md") else place
        if not inside and file.is_file() and file.suffix != ".md":
            (COPY / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, COPY / place)
        up = "../" * len(copy.relative_to(COPY).parent.parts)
        return f"{link[1]}{up}{place}{'#' + anchor if anchor else ''}{link[3]}"

    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(_LINK.sub(moved, source.read_text(encoding="utf-8")), encoding="utf-8")


def broken(site: Path) -> list[str]:
    """Links within ``site`` that lead nowhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target)
            if not target.is_file() or (parts.fragment and known and unquote(parts.fragment) not in known.anchors):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def main() -> int:
    copied()
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--clean", "--strict"], cwd=ROOT)
    if built.returncode:
        return built.returncode
    found = broken(SITE)
    for line in found:
        print(f"broken link: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
