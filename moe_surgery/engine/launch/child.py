"""A command as a child process with orders in its environment."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_surgery.engine.orders import VARIABLE, Orders
from moe_surgery.errors import UsageError

SITE = Path(__file__).resolve().parent / "site"
"""The folder whose ``sitecustomize`` reaches every Python process."""
_FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
"""What the child gets for each: servers know no orderly end at SIGHUP."""
_SI_USER = 0
"""The greatest ``si_code`` of signals that processes send; those from the terminal have greater ones."""
_WAIT = 0.2


def environment(orders: Orders, environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` with the orders in it, and with what makes every Python process look at them."""
    path = environ.get("PYTHONPATH")
    site = f"{SITE}{os.pathsep}{path}" if path else str(SITE)
    return {**environ, VARIABLE: orders.to_env(), "PYTHONPATH": site}


def supervise(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run ``command`` with this process's own streams until it ends, and return its exit code as a shell tells it.

    SIGINT and SIGTERM sent to this process are passed on to the child, and SIGHUP as SIGTERM, unless it is ignored.
    One typed at the terminal isn't: the child has it already, and a second makes many a server give up its orderly end.
    Raises :class:`UsageError` if the command can't be started.
    """
    # Blocked, not handled: no signal is lost between two looks, and who sent it is known.
    forwarded = {sent: passed for sent, passed in _FORWARDED.items() if signal.getsignal(sent) != signal.SIG_IGN}
    watched = {*forwarded, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        child = subprocess.Popen(
            command, env=dict(environ), preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before)
        )
        while child.poll() is None:
            # The wait has an end, as SIGCHLD may go to another thread.
            arrived = signal.sigtimedwait(watched, _WAIT)
            if arrived is not None and arrived.si_signo in forwarded and arrived.si_code <= _SI_USER:
                child.send_signal(forwarded[signal.Signals(arrived.si_signo)])
    except OSError as error:
        raise UsageError(f"{command[0]} can't be started: {error.strerror or error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    code = child.returncode
    return code if code >= 0 else 128 - code
