"""How far a right block may be from the reference: plain torch, and kernels that round at other places.

The noise of the dtype, measured on plain torch that rounds where the spec does, times the slack is the limit of plain
torch. vLLM's kernels round elsewhere: a right layer was seen at 1.06 of it, in float32. So an engine's layers are held
to :data:`KERNELS` limits, in a swap and in an audit alike. No mutant gains by that: a proof holds only where each is
several times as far off as the block is, and a block that does what a mutant does is just as far.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_surgery.prove.ground import Ground

KERNELS = 2.0
"""How many limits a right layer of kernels may be off."""
SURELY = 4.0
"""A layer that is off by more limits than this is wrong, whatever mistake it makes."""
_APPROXIMATE = 32 * torch.finfo(torch.float32).eps
"""How far a right layer may be off in any dtype: kernels take exponentials that are good to 20 units of float32."""


def of_kernels(ground: Ground, logits_eps: float = 0.0) -> Ground:
    """The ground of a block that kernels compute, with the noise of exponentials that they approximate.

    ``logits_eps`` is what they may round a router's logits to, relative, where that isn't on trial.
    """
    largest = ground.routing.logits.abs().amax(-1)
    noise = []
    for family, measured in enumerate(ground.noise):
        tokens = ground.probes.of(family)
        logit = float(largest[tokens].amax()) if logits_eps and len(tokens) else 0.0
        noise.append(max(measured, logit * logits_eps / ground.slack, _APPROXIMATE / ground.slack))
    return replace(ground, noise=noise)
