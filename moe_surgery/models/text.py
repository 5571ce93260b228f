"""Text in and out of the token ids of a checkpoint that has its tokenizer beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_surgery.errors import UsageError

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


class Tokenizer:
    """The tokenizer in a checkpoint's directory. Raises :class:`UsageError` if there is none that can be read."""

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        if not any(True for pattern in TOKENIZER_FILES for _ in directory.glob(pattern)):
            raise UsageError(f"{directory}: no tokenizer is there, so a prompt must be token ids: --generate 1,2,3")
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # of many kinds, as with models
            reason = " ".join(str(error).split())
            raise UsageError(f"{directory}: its tokenizer can't be read: {type(error).__name__}: {reason}") from error

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text``. Raises :class:`UsageError` if it has none."""
        found = [int(token) for token in self._tokenizer(text)["input_ids"]]
        if not found:
            raise UsageError(f"the prompt {text!r} has no tokens")
        return found

    def text(self, ids: Sequence[int | None]) -> str:
        """What token ids say; ids that the tokenizer hasn't, and None, say nothing."""
        return str(
            self._tokenizer.decode([token for token in ids if token is not None and token < len(self._tokenizer)])
        )
