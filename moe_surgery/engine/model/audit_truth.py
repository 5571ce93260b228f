"""What an audit holds an engine's blocks against: the checkpoint as transformers has it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from vllm.config import CompilationMode, ModelConfig, VllmConfig, set_current_vllm_config

from moe_surgery.engine.model.planning import ROUNDED, rounds_float32
from moe_surgery.errors import ModelError
from moe_surgery.models.opening import open_meta
from moe_surgery.models.partial import Partial
from moe_surgery.models.site import Site
from moe_surgery.planning.survey import Surveyed, survey

_HARMLESS = frozenset({"architectures", "max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"})
"""Overrides of a checkpoint's config that choose vLLM's class, or tell of positions, which no block sees."""


class Incomparable(Exception):
    """Why a block can't be held against anything."""


@dataclass(frozen=True, eq=False)
class Truth:
    """The checkpoint as transformers has it: its sites by path, and the weights behind them."""

    weights: Partial
    sites: Mapping[str, Surveyed]


def truth_of(config: VllmConfig, model_config: ModelConfig) -> Truth:
    """What the blocks of an engine of this ``config`` are held against.

    Raises :class:`Incomparable`, or :class:`ModelError` if the checkpoint can't be opened.
    """
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1 or parallel.use_sequence_parallel_moe:
        raise Incomparable("under data or sequence parallelism no block can be asked by itself")
    if config.load_config.load_format == "dummy":
        raise Incomparable("its weights are random, so no checkpoint says what they should be")
    if rounds_float32(config):
        raise Incomparable(ROUNDED)
    dtype = str(model_config.dtype).removeprefix("torch.")
    trusted = bool(model_config.trust_remote_code)
    with _uncompiled(config):
        opened = open_meta(_directory(config, model_config), trust_remote_code=trusted, dtype=dtype)
    if others := sorted(_overridden(model_config.hf_overrides, opened.module.config) - _HARMLESS):
        raise Incomparable(f"the engine overrides the checkpoint's config (hf_overrides: {', '.join(others)})")
    return Truth(Partial(opened), {item.site.path: item for item in _surveyed(opened.module)})


def _overridden(overrides: Any, config: Any) -> set[str]:
    """What an engine reads otherwise than the checkpoint's ``config`` has it. Of draft models a function says it."""
    if not callable(overrides):
        return set(overrides or ())
    before, after = config.to_dict(), overrides(copy.deepcopy(config)).to_dict()
    return {key for key in before | after if before.get(key) != after.get(key)}


@contextmanager
def _uncompiled(config: VllmConfig) -> Iterator[None]:
    """vLLM makes classes of transformers' that it has served ones that compile themselves, by the current config."""
    plain = copy.copy(config)
    plain.compilation_config = copy.copy(config.compilation_config)
    plain.compilation_config.mode = CompilationMode.NONE
    with set_current_vllm_config(plain):
        yield


def _directory(config: VllmConfig, model_config: ModelConfig) -> str:
    """Where the checkpoint lies, which vLLM has downloaded if need be."""
    from huggingface_hub import snapshot_download

    if Path(model_config.model).is_dir():
        return str(model_config.model)
    try:
        return snapshot_download(
            model_config.model,
            revision=model_config.revision,
            cache_dir=config.load_config.download_dir,
            local_files_only=True,
        )
    except Exception as error:  # the hub client raises several unrelated families of errors
        raise ModelError(f"{model_config.model}: its files are not in the local cache: {error}") from error


def _surveyed(model: nn.Module) -> Iterator[Surveyed]:
    """The sites of transformers' model; of one whose experts alone could be read, the whole with the reason.

    So of one that is split behind its router, which says nothing of what another's router should do.
    """
    for item in survey(model):
        if item.reading is not None and item.reading.spec.at == "experts":
            path = item.site.path.rpartition(".")[0]
            yield Surveyed(Site(path, model.get_submodule(path)), None, item.reading.around)
        elif item.reading is not None and item.reading.spec.router.own:
            yield Surveyed(item.site, None, item.reading.around)
        else:
            yield item
