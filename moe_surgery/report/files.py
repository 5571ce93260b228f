"""Writing files so that no reader ever sees half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from moe_surgery.errors import UsageError


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``: into a temporary file beside it, then renamed over it.

    After a failure ``path`` is what it was and no temporary file is left. A link is followed; a device or a pipe is
    written to as it is. Raises :class:`~moe_surgery.errors.UsageError` if that can't be done.
    """
    temporary: str | None = None
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_text(text, encoding="utf-8")
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as fault:
        raise UsageError(f"can't write {path}: {fault.strerror or fault}") from fault
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _umask() -> int:
    # The umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
