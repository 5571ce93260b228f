"""The target itself: what it takes, and how it builds."""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

import torch

from moe_surgery.errors import UnsupportedError
from moe_surgery.spec import MoESpec
from moe_surgery.targets.base import Context, Refusal
from moe_surgery.targets.shapes import check_shapes
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

    def remark(self, spec: MoESpec, context: Context) -> str | None:
        return None

    def build(self, spec: MoESpec, tensors: BlockTensors, *, prefix: str) -> FusedMoEBlock:
        """See :meth:`moe_surgery.targets.base.Target.build`."""
        context = Context(tensors.w13.device.type, str(tensors.w13.dtype).removeprefix("torch."))
        refusal = self.accepts(spec, context)
        if refusal is not None:
            raise UnsupportedError(f"{prefix}: {refusal.reason}")
        check_shapes(spec, tensors, prefix)
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
        experts, router = spec.experts.total, spec.router
        if router.num_experts != experts:
            return Refusal(f"the router scores {router.num_experts} experts, there are {experts}")
        if not 1 <= router.top_k <= experts:
            return Refusal(f"top-{router.top_k} of {experts} experts")
        installed = self.installed if context.live else self.listed
        version, era = installed.version, installed.era
        if era.builder is None:
            return Refusal(
                f"vLLM {version}: era {era.name} ({era.layer}) is recognised but not supported; "
                f"releases {era.releases} want a transformers older than this library does"
            )
        return None

    def _refuse_by_table(self, spec: MoESpec, context: Context) -> Refusal | None:
        """What the table says of the installed era's kernels; nothing is imported."""
        limits, name = self.listed.era.limits, f"vLLM {self.listed.version}'s {context.device.upper()} kernels"
        if limits is None:
            return None
        for what, size, multiple in (
            ("hidden size", spec.hidden, limits.hidden_multiple),
            ("expert width", spec.experts.width, limits.width_multiple),
        ):
            if size % multiple:
                return Refusal(f"{what} {size} is not a multiple of {multiple}, which {name} require")
        return None

    def _refuse_by_asking(self, spec: MoESpec, context: Context) -> Refusal | None:
        """What only the installed kernels can tell."""
        name = f"vLLM {self.installed.version}'s {context.device.upper()} kernels"
        objection = Kernels(self._builder, context.device, DTYPES[context.dtype], name).objection(spec)
        return None if objection is None else self._refuse_by_table(spec, context) or Refusal(objection)
