"""Whether tensors are those that a spec describes."""

from __future__ import annotations

from moe_surgery.errors import SurgeryError
from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import BlockTensors


def check_shapes(spec: MoESpec, tensors: BlockTensors, prefix: str) -> None:
    """Raise :class:`SurgeryError` if ``tensors`` aren't those of ``spec``, all in one dtype on one device."""
    hidden, experts, width = spec.hidden, spec.experts.num_experts, spec.experts.width
    scored = spec.router.num_experts  # experts that return their input are scored, and have no weights
    shared = spec.shared.width if spec.shared is not None else None
    gated = spec.shared is not None and spec.shared.gate is not None
    rows = 2 * width if spec.experts.gated else width
    wanted: dict[str, tuple[int, ...] | None] = {
        "router": (scored if spec.at == "block" else 0, hidden),
        "w13": (experts, rows, hidden),
        "w2": (experts, hidden, width),
        "w13_bias": (experts, rows) if spec.experts.biases else None,
        "w2_bias": (experts, hidden) if spec.experts.biases else None,
        "router_bias": (scored,) if spec.router.bias else None,
        "correction_bias": (scored,) if spec.router.correction_bias else None,
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
        loose = name == "correction_bias" or (name == "router" and spec.router.wide_matrix)  # kept in float32
        if (
            tensor is not None
            and not loose
            and (tensor.dtype, tensor.device) != (tensors.w13.dtype, tensors.w13.device)
        ):
            raise SurgeryError(
                f"{prefix}: {name} is {tensor.dtype} on {tensor.device}, the experts are {tensors.w13.dtype} on "
                f"{tensors.w13.device}"
            )
