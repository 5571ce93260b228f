"""The command line. It parses, calls a verb and maps the result to an exit code; nothing heavy is imported before."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; this is what the ``moe-surgery`` script calls."""
    try:
        _run()
    except KeyboardInterrupt:  # before a command has begun, or after it has ended
        from moe_surgery.cli import exits

        print("error: interrupted", file=sys.stderr)
        sys.exit(exits.INTERRUPTED)


def _run() -> None:
    from moe_surgery.cli import exits
    from moe_surgery.cli.app import app

    try:
        try:
            app(prog_name="moe-surgery")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # which the parser ends with a code of its own
            sys.exit(exits.DONE)
        raise
    except OSError as fault:
        # A command tells of its own result; what is left is help and the like, to a full disk or a reader that went.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(fault, BrokenPipeError):
            sys.exit(exits.DONE)
        if sys.stderr is not None:
            print(f"error: can't write to stdout: {fault.strerror or fault}", file=sys.stderr)
        sys.exit(exits.USAGE)
