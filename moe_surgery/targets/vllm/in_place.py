"""Laying out weights that are the layer's own, with no second copy of them."""

from __future__ import annotations

from torch import nn


class LaidOutInPlace:
    """Brings one expert after another into the layout of the kernels, so that no second copy of all is needed.

    Where the layout takes more room, as for widths that are filled up, all are laid out at once.
    """

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        whole = {name: parameter.data for name, parameter in layer.named_parameters()}
        for expert in range(len(whole["w13_weight"])):
            one = nn.Module()
            for name, weight in whole.items():
                one.register_parameter(name, nn.Parameter(weight[expert : expert + 1], requires_grad=False))
            super().process_weights_after_loading(one)  # type: ignore[misc]
            laid_out = {name: parameter.data[0] for name, parameter in one.named_parameters()}
            if any(weight.shape != whole[name].shape[1:] for name, weight in laid_out.items()):
                super().process_weights_after_loading(layer)  # type: ignore[misc]
                return
            for name, weight in laid_out.items():
                whole[name][expert] = weight
