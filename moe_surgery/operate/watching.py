"""Being told of the calls of a model's sites, and of what the modules around them return, while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from moe_surgery.interrupts import without_interrupts


@contextmanager
def watched(
    model: nn.Module,
    part: str,
    sites: Mapping[str, nn.Module],
    called: Callable[[str, Callable[..., Any]], Callable[..., Any]],
    returned: Callable[[str, Any], None],
    inside: list[str] | None = None,
) -> Iterator[None]:
    """Put ``called`` around the forward of every site, and ``returned`` behind every module between it and ``part``.

    Paths of the modules that have begun and not ended are in ``inside``. Calls of other threads, such as of a server,
    are none of ours: nothing is done around them. Afterwards everything is as it was.
    """
    hooks = []
    ours = threading.get_ident()
    forwards: list[tuple[nn.Module, Any]] = []
    stack: list[str] = [] if inside is None else inside
    try:
        for path in sorted({around for site in sites for around in _between(site, part)}):
            module = model.get_submodule(path)

            def enter(_: nn.Module, __: Any, path: str = path) -> None:
                if threading.get_ident() == ours:
                    stack.append(path)

            def leave(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
                if threading.get_ident() == ours:
                    stack.pop()
                    returned(path, output)

            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        for path, module in sites.items():
            own = vars(module)
            forwards.append((module, own.get("forward")))
            own["forward"] = _in_thread(ours, called(path, module.forward), module.forward)
        yield
    finally:
        with without_interrupts():
            for module, before in reversed(forwards):
                vars(module).pop("forward", None)
                if before is not None:
                    vars(module)["forward"] = before
            for hook in hooks:
                hook.remove()


def _in_thread(ident: int, inner: Callable[..., Any], outer: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is ``inner`` in one thread, and ``outer`` in all others."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (inner if threading.get_ident() == ident else outer)(*args, **kwargs)

    return forward


def _between(site: str, part: str) -> Iterator[str]:
    """The paths around a site that are inside of a part."""
    while site:
        site = site.rpartition(".")[0]
        if under(site, part) and site != part:
            yield site


def under(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(f"{part}.")
