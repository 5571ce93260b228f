"""The command line. It parses, calls a verb and maps the result to an exit code; nothing heavy is imported before."""

from __future__ import annotations


def main() -> None:
    """Run the command line; this is what the ``moe-surgery`` script calls."""
    from moe_surgery.cli.app import app

    app(prog_name="moe-surgery")
