"""What vLLM needs around a layer that runs outside its engine, kept from leaking into the user's process.

A layer is built with tensor, data and context parallel sizes of one given explicitly, so vLLM looks up no process
group: ``torch.distributed`` and vLLM's own groups are neither needed nor touched. What remains is a config while
building and a forward context while running; both are vLLM module globals, entered and restored by vLLM's own context
managers. The forward context is one per process, so run one thread at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep vLLM from talking below the level of errors, and put logging and ``os.environ`` back afterwards.

    Importing vLLM and making a config set variables meant for its own worker processes (``LD_PRELOAD``,
    ``LOCAL_WORLD_SIZE``, ``TORCHINDUCTOR_COMPILE_THREADS``, …). vLLM sets the config's ones again for every config, so
    an engine started later in the same process has them. Importing Inductor's config first keeps it from reading its
    number of compile threads from the changed environment.
    """
    environ = dict(os.environ)
    import torch._inductor.config  # noqa: F401

    root = logging.getLogger()
    loggers = [logging.getLogger(name) for name in ("vllm", "torch._library.triton")]  # torch misses Triton aloud
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # vLLM calls logging.debug(), which would give a root logger without handlers one that prints for good.
    stand_in = logging.NullHandler()
    root.addHandler(stand_in)
    try:
        yield
    finally:
        root.removeHandler(stand_in)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name in os.environ.keys() - environ.keys():
            del os.environ[name]
        os.environ.update(environ)


@contextmanager
def hosting(device: str) -> Iterator[VllmConfig]:
    """A fresh vLLM config for ``device``, current while inside.

    Layers register themselves in the config that is current when they are built. One config for each layer keeps them
    apart: no name can collide, and a layer dies with the block that holds it.
    """
    with undisturbed():
        from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config

        config = VllmConfig(device_config=DeviceConfig(device=device))
        with set_current_vllm_config(config):
            yield config
