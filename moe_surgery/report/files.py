"""Writing files so that no reader ever sees half of one, and nothing but a regular file is ever replaced."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from moe_surgery.errors import UsageError


def check_writable(path: str | Path) -> None:
    """Raise :class:`~moe_surgery.errors.UsageError` if ``path`` is a directory, or clearly can't be written."""
    try:
        found = _stat(path)
        if found is None:
            folder = os.path.dirname(os.path.realpath(path))
            reason = None if os.path.isdir(folder) else "no such directory"
            reason = reason or (None if os.access(folder, os.W_OK | os.X_OK) else "permission denied")
        else:
            reason = None if os.access(path, os.W_OK) else "permission denied"
            reason = "it is a directory" if stat.S_ISDIR(found.st_mode) else reason
    except (OSError, ValueError) as fault:
        raise _error(path, fault) from fault
    if reason is not None:
        raise UsageError(f"can't write {path}: {reason}")


def write_whole(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``: into a temporary file beside it, then renamed over it.

    After a failure ``path`` is what it was and no temporary file is left. A link stays one: what it points at is
    written. A pipe, a device or whatever else isn't a regular file is written to as it is. A file that is replaced
    keeps its mode, and its owner where that is allowed. Raises :class:`~moe_surgery.errors.UsageError` if that can't
    be done.
    """
    check_writable(path)
    temporary: str | None = None
    try:
        found = _stat(path)
        if found is not None and not stat.S_ISREG(found.st_mode):
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return
        target = os.path.realpath(path)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".moe-surgery.", suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask() if found is None else stat.S_IMODE(found.st_mode))
        if found is not None:
            with suppress(OSError):
                os.chown(temporary, found.st_uid, found.st_gid)
        os.replace(temporary, target)
        temporary = None
    except (OSError, ValueError) as fault:
        raise _error(path, fault) from fault
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _stat(path: str | Path) -> os.stat_result | None:
    """What ``path`` is, links followed; None if it isn't there."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _error(path: str | Path, fault: OSError | ValueError) -> UsageError:
    return UsageError(f"can't write {path}: {getattr(fault, 'strerror', None) or fault}")


def _umask() -> int:
    # The umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
