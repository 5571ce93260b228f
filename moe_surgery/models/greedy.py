"""Greedy decoding of every part of a model that can generate, to compare a model before and after surgery."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_surgery import checks
from moe_surgery.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

MOST_TOKENS = 1 << 20
_MOST_ID = 2**63 - 1
# Parameters of a forward through which one part of a model is fed another part's hidden states, as the talkers of
# the Qwen omni models are fed the thinker's. Such a part takes embeddings, and never token ids, as its prompt.
FED_BY_ANOTHER = ("trailing_text_hidden", "tts_pad_embed")


def generating_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The generating parts: the direct children that generate, or else the model itself, as "model".

    Raises :class:`UsageError` for a model in which nothing generates.
    """
    from transformers import GenerationMixin

    children = {name: child for name, child in model.named_children() if isinstance(child, GenerationMixin)}
    if children:
        return children
    if not isinstance(model, GenerationMixin):
        raise UsageError(f"{type(model).__name__} has no part that generates tokens")
    return {"model": model}


@contextmanager
def without_a_trace(*models: nn.Module) -> Iterator[None]:
    """Take away the forward hooks that a call leaves behind in ``models``.

    transformers 5 hooks a model the first time its hidden states are asked for, routers included, and marks it as
    hooked; a block with a hook isn't operated on, since the hook would not see the block that replaces it.
    """
    mark = "_output_capturing_hooks_installed"
    hooks = [(module, dict(module._forward_hooks)) for model in models for module in model.modules()]
    marked = {id(module) for module, _ in hooks if hasattr(module, mark)}
    try:
        yield
    finally:
        for module, before in hooks:
            for key in module._forward_hooks.keys() - before.keys():
                del module._forward_hooks[key]
            if hasattr(module, mark) and id(module) not in marked:
                delattr(module, mark)


Tokens = list[int | None]
"""Token ids; None stands for one that was chosen among logits that aren't numbers, and is equal to no other."""


def greedy_tokens(model: nn.Module, prompt: list[int], count: int) -> dict[str, Tokens]:
    """Continue ``prompt`` by at most ``count`` tokens, always the likeliest, with each generating part on its own.

    The keys are the names of the parts ("thinker", "talker"), or "model" for a model that is one. A part that another
    one feeds gets the prompt as embeddings of its own vocabulary, token ids taken modulo its size, and zeros as the
    other part's states: not what the model would say, but the same question before and after. A part stops early at
    the end-of-sequence token of its generation config. Logits with a NaN in them, or whose greatest is infinite, choose
    no token. A ``generate`` that isn't transformers' may do anything: its model is asked for one token after another.

    Raises :class:`UsageError` for a prompt that doesn't fit the vocabulary and for a model in which nothing
    generates, :class:`ModelError` for one that can't be run.
    """
    import torch

    if not prompt:
        raise UsageError("a prompt of at least one token is needed")
    checks.whole(count, "the number of tokens to generate", 1, MOST_TOKENS)
    for token in prompt:
        checks.whole(token, "a token id", 0, _MOST_ID)
    result: dict[str, Tokens] = {}
    for name, part in _parts(model).items():
        if has_its_own_generate(part):
            with torch.no_grad(), without_a_trace(part):
                result[name] = _by_steps(part, prompt, count, name)
            continue
        arguments = generating(part, [prompt], count, name)
        arguments["generation_config"].output_logits = True
        try:
            with torch.no_grad(), without_a_trace(part):
                found = part.generate(**arguments)  # type: ignore[operator]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:  # a model that doesn't run as it is
            raise ModelError(f"{name}: it can't generate: {type(error).__name__}: {error}") from error
        tokens = found.sequences[0].tolist()
        tokens = tokens[len(prompt) :] if "input_ids" in arguments else tokens
        chosen = zip(tokens, found.logits, strict=True)
        result[name] = [token if bool(logits[0].max().isfinite()) else None for token, logits in chosen]
    return result


def has_its_own_generate(part: nn.Module) -> bool:
    """Whether a model generates by code of its own, not by that of transformers."""
    method = getattr(type(part), "generate", None)
    return method is not None and method.__module__.split(".")[0] not in ("transformers", "torch")


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    return {"model": model} if has_its_own_generate(model) else generating_parts(model)


def _by_steps(part: nn.Module, prompt: list[int], count: int, name: str) -> Tokens:
    """The likeliest tokens that continue ``prompt``, each found by a call of its own with all before it."""
    import torch

    config = getattr(part, "generation_config", None) or getattr(part, "config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = set(ends if isinstance(ends, (list, tuple)) else [ends])
    _check_positions(part, len(prompt) + count, name)
    ids = torch.tensor([prompt], device=next(part.parameters()).device)
    found: Tokens = []
    while len(found) < count and (not found or found[-1] not in ends):
        try:
            answer = part(ids)
            logits = answer if isinstance(answer, torch.Tensor) else getattr(answer, "logits", None)
            last = (answer[0] if logits is None else logits)[0, -1]
        except Exception as error:  # code of anybody's
            raise ModelError(f"{name}: it can't generate: {type(error).__name__}: {error}") from error
        token = int(last.argmax())
        found.append(token if bool(last.max().isfinite()) else None)
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
    return found


def _check_positions(part: nn.Module, tokens: int, name: str) -> None:
    """Raise :class:`UsageError` if a part's config has fewer positions than ``tokens``."""
    config: Any = getattr(part, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and tokens > positions:
        raise UsageError(f"{name}: {tokens} tokens, prompt and answer, are more than its {positions} positions")


def generating(part: nn.Module, prompts: list[list[int]], count: int, name: str) -> dict[str, Any]:
    """Arguments of ``generate`` that have a part continue prompts of one length, greedily, as said above."""
    import torch
    from transformers import GenerationConfig

    embedding: Any = part.get_input_embeddings()  # type: ignore[operator]
    _check_positions(part, len(prompts[0]) + count, name)
    vocabulary, device = embedding.weight.shape[0], embedding.weight.device
    ids = torch.tensor(prompts, device=device)
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    fed = [key for key in FED_BY_ANOTHER if key in inspect.signature(part.forward).parameters]
    if fed:
        with torch.no_grad():
            arguments["inputs_embeds"] = embedding(ids % vocabulary)
        arguments |= {key: torch.zeros_like(arguments["inputs_embeds"][:, :1]) for key in fed}
    else:
        outside = [token for prompt in prompts for token in prompt if not 0 <= token < vocabulary]
        if outside:
            raise UsageError(f"{name}: token {outside[0]} is not in the vocabulary of {vocabulary}")
        arguments["input_ids"] = ids
    # Such parts also read their own last hidden state back, so it has to be among the outputs.
    config = GenerationConfig(
        do_sample=False, max_new_tokens=count, output_hidden_states=bool(fed), return_dict_in_generate=True
    )
    return {**arguments, "generation_config": config}
