"""The target itself: what it takes, and how it builds."""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

import torch

from moe_surgery.errors import SurgeryError, UnsupportedError
from moe_surgery.spec import MoESpec
from moe_surgery.targets.base import Context, Refusal
from moe_surgery.targets.vllm.block import FusedExperts, FusedMoEBlock
from moe_surgery.targets.vllm.eras import Installed, detect, look_up
from moe_surgery.targets.vllm.host import undisturbed
from moe_surgery.targets.vllm.installed_kernels import Kernels
from moe_surgery.weights.tensors import BlockTensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VllmTarget:
    """The installed vLLM's shared-fused MoE layer inside a plain model on CPU, without an engine.

    Building on CUDA needs process-wide workspaces of vLLM's engine and is refused by this release.
    """

    name = "vllm"

    def __init__(self) -> None:
        self._answers: dict[tuple[MoESpec, Context], Refusal | None] = {}

    @cached_property
    def installed(self) -> Installed:
        """The installed vLLM. Imports it. Raises :class:`UnsupportedError` if it is missing or unknown."""
        return detect()

    @cached_property
    def listed(self) -> Installed:
        """The installed vLLM, told from its source alone. Raises :class:`UnsupportedError` as ``installed`` does."""
        return look_up()

    @property
    def label(self) -> str:
        """What reports call the layer. Imports vLLM."""
        return self.installed.era.label

    def accepts(self, spec: MoESpec, context: Context) -> Refusal | None:
        """None if the installed vLLM has kernels for ``spec``, found by asking it; no weights are touched.

        Raises :class:`UnsupportedError` if vLLM is missing or of no known era.
        """
        key = (spec, context)
        if key not in self._answers:
            asked = self._refuse_by_asking if context.live else self._refuse_by_table
            self._answers[key] = self._refuse_early(spec, context) or asked(spec, context)
        return self._answers[key]

    def build(self, spec: MoESpec, tensors: BlockTensors, *, prefix: str) -> FusedMoEBlock:
        """See :meth:`moe_surgery.targets.base.Target.build`."""
        context = Context(tensors.w13.device.type, str(tensors.w13.dtype).removeprefix("torch."))
        refusal = self.accepts(spec, context)
        if refusal is not None:
            raise UnsupportedError(f"{prefix}: {refusal.reason}")
        _check_shapes(spec, tensors, prefix)
        return self._build(spec, tensors, prefix)

    def _build(self, spec: MoESpec, tensors: BlockTensors, prefix: str) -> FusedMoEBlock:
        block = FusedMoEBlock if spec.at == "block" else FusedExperts
        return block(spec, tensors, self._builder.FusedLayer(spec, tensors, prefix), self.label)

    @cached_property
    def _builder(self) -> Any:
        """The module that builds layers of the installed era; it imports vLLM."""
        assert self.installed.era.builder is not None
        with undisturbed():
            return importlib.import_module(self.installed.era.builder)

    def _refuse_early(self, spec: MoESpec, context: Context) -> Refusal | None:
        """What can be told without vLLM's kernels, cheapest first."""
        if context.device != "cpu":
            return Refusal(f"vLLM's layer is hosted in a plain model on cpu only; this one is on {context.device}")
        if context.dtype not in DTYPES:
            return Refusal(f"dtype {context.dtype} is none of {', '.join(DTYPES)}")
        experts, router = spec.experts.num_experts + spec.experts.identities, spec.router
        if router.num_experts != experts:
            return Refusal(f"the router scores {router.num_experts} experts, there are {experts}")
        if not 1 <= router.top_k <= experts:
            return Refusal(f"top-{router.top_k} of {experts} experts")
        installed = self.installed if context.live else self.listed
        version, era = installed.version, installed.era
        if era.builder is None:
            return Refusal(f"vLLM {version}: era {era.name} ({era.layer}) is recognised but not yet supported here")
        return None

    def _refuse_by_table(self, spec: MoESpec, context: Context) -> Refusal | None:
        """What the table says of the installed era's kernels; nothing is imported."""
        limits, name = self.listed.era.limits, f"vLLM {self.listed.version}'s {context.device.upper()} kernels"
        if limits is None:
            return None
        if spec.hidden % limits.hidden_multiple:
            return Refusal(
                f"hidden size {spec.hidden} is not a multiple of {limits.hidden_multiple}, which {name} require"
            )
        return None

    def _refuse_by_asking(self, spec: MoESpec, context: Context) -> Refusal | None:
        """What only the installed kernels can tell."""
        name = f"vLLM {self.installed.version}'s {context.device.upper()} kernels"
        objection = Kernels(self._builder, context.device, DTYPES[context.dtype], name).objection(spec)
        return None if objection is None else Refusal(objection)


def _check_shapes(spec: MoESpec, tensors: BlockTensors, prefix: str) -> None:
    """Raise :class:`SurgeryError` if ``tensors`` aren't those of ``spec``, all in one dtype on one device."""
    hidden, experts, width = spec.hidden, spec.experts.num_experts, spec.experts.width
    shared = spec.shared.width if spec.shared is not None else None
    gated = spec.shared is not None and spec.shared.gate is not None
    rows = 2 * width if spec.experts.gated else width
    wanted: dict[str, tuple[int, ...] | None] = {
        "router": (experts if spec.at == "block" else 0, hidden),
        "w13": (experts, rows, hidden),
        "w2": (experts, hidden, width),
        "w13_bias": (experts, rows) if spec.experts.biases else None,
        "w2_bias": (experts, hidden) if spec.experts.biases else None,
        "router_bias": (experts,) if spec.router.bias else None,
        "correction_bias": (experts,) if spec.router.correction_bias else None,
        "output_bias": (hidden,) if spec.output_bias else None,
        "shared_gate_proj": (shared, hidden) if shared else None,
        "shared_up_proj": (shared, hidden) if shared and spec.shared is not None and spec.shared.gated else None,
        "shared_down_proj": (hidden, shared) if shared else None,
        "shared_gate": (1, hidden) if gated else None,
    }
    for name, shape in wanted.items():
        tensor = getattr(tensors, name)
        got = None if tensor is None else tuple(tensor.shape)
        if got != shape:
            raise SurgeryError(f"{prefix}: {name} has shape {got}, the spec wants {shape}")
        loose = name in ("correction_bias", "router")  # models keep them in float32
        if (
            tensor is not None
            and not loose
            and (tensor.dtype, tensor.device) != (tensors.w13.dtype, tensors.w13.device)
        ):
            raise SurgeryError(
                f"{prefix}: {name} is {tensor.dtype} on {tensor.device}, the experts are {tensors.w13.dtype} on "
                f"{tensors.w13.device}"
            )
