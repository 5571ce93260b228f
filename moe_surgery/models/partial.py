"""A model on the meta device whose parts get their weights from its checkpoint one at a time.

transformers says itself which tensors of a checkpoint make up which parameter, and how they are put together; so what
a part holds here is what ``from_pretrained`` would give it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_surgery.errors import ModelError
from moe_surgery.models.checkpoint import checkpoint_headers, files_of
from moe_surgery.models.loading import quiet_bars
from moe_surgery.models.opening import Opened

if TYPE_CHECKING:
    from torch import nn


class Partial:
    """``opened``, on the meta device, and the checkpoint in its directory.

    Raises :class:`ModelError` if the checkpoint's headers can't be read.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self._names = tuple(checkpoint_headers(opened.directory))
        self._files = files_of(opened.directory)

    @cached_property
    def _targets(self) -> dict[str, str]:
        """The name of each of the checkpoint's tensors, and that of the parameter which it is loaded into first."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        model: Any = self.opened.module
        state, rules = model.state_dict(), self._rules()
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

        def target(name: str) -> str:
            renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if renamed not in state and name in state:
                renamed, _ = rename_source_key(name, [], [], model.base_model_prefix, state)
            return renamed

        return {name: target(name) for name in self._names}

    def _rules(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return get_model_conversion_mapping(self.opened.module)

    def sources(self, path: str) -> tuple[str, ...]:
        """The checkpoint's tensors that the module at ``path`` is loaded from."""
        return tuple(name for name, target in self._targets.items() if target.startswith(f"{path}."))

    @contextmanager
    def loaded(self, path: str, device: str = "cpu") -> Iterator[nn.Module]:
        """A copy of the module at ``path`` with its weights, on ``device``, as long as this lasts.

        Raises :class:`ModelError` if the checkpoint lacks one of them, or has one of another shape.
        """
        from safetensors import safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        model: Any = self.opened.module
        before = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        by_file: dict[Path, list[str]] = defaultdict(list)
        for source in self.sources(path):
            by_file[self._files[source]].append(source)
        dtype = model.dtype
        model.get_submodule(parent).register_module(name, copy.deepcopy(before))
        try:
            with ExitStack() as stack, quiet_bars():
                found: dict[str, Any] = {}
                for file, sources in by_file.items():
                    opened = stack.enter_context(safe_open(file, framework="pt"))
                    found |= {source: opened.get_slice(source) for source in sources}
                info, _ = convert_and_load_state_dict_in_model(
                    model,
                    found,
                    LoadStateDictConfig(
                        dtype=dtype,
                        dtype_plan=model._get_dtype_plan(dtype),
                        weight_mapping=self._rules(),
                        device_map={"": device},
                        ignore_mismatched_sizes=True,
                    ),
                )
            inside = f"{path}."
            for faults, words in (
                (info.conversion_errors, "can't be put together"),
                ({entry[0] for entry in info.mismatched_keys}, "is of another shape in the checkpoint"),
                (info.missing_keys, "is not in the checkpoint"),
                ((key for key, tensor in self._meta(path)), "is not in the checkpoint"),
            ):
                first = min((key for key in faults if key.startswith(inside)), default=None)
                if first is not None:
                    raise ModelError(f"{self.opened.directory}: {first} {words}")
            yield model.get_submodule(path)
        finally:
            model.get_submodule(parent).register_module(name, before)

    def _meta(self, path: str) -> Iterator[tuple[str, Any]]:
        """The tensors of the module at ``path`` that hold nothing."""
        module = self.opened.module.get_submodule(path)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta:
                yield f"{path}.{name}", tensor
