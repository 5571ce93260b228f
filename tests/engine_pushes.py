"""Pushes weights into an engine that serves, as trainers do: whole, broken, and where there is no way in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_faults import faulty
from torch import Tensor

TRANSFER = "moe-surgery-test"
"""The weight transfer engine that :func:`register` makes known."""

Way = Callable[[Any, Path], object]
"""Pushes the checkpoint in a folder, given vLLM's worker."""


def register() -> None:
    """Make an engine known to vLLM that brings a file's tensors one by one, as those over networks do."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader import reload

    @dataclass
    class Files(WeightTransferUpdateInfo):
        folder: str
        skip: str = ""

    class FromFiles(WeightTransferEngine[WeightTransferInitInfo, Files]):
        init_info_cls, update_info_cls = WeightTransferInitInfo, Files

        def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None: ...

        def start_weight_update(self) -> None:
            reload.initialize_layerwise_reload(self.model)

        def finish_weight_update(self) -> None:
            reload.finalize_layerwise_reload(self.model, self.model_config)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))  # there is no device to wait for

        def receive_weights(self, update_info: Files) -> None:
            for name, tensor in tensors(Path(update_info.folder)):
                if name != update_info.skip:
                    self.model.load_weights([(name, tensor)])

        def shutdown(self) -> None: ...

    if TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER, FromFiles)


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Of a checkpoint, in the order of its files."""
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()


def _in_parts(worker: Any, folder: Path) -> None:
    """By decoder layers, and what belongs to none of them."""
    parts: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors(folder):
        layer = name.partition(".layers.")[2].partition(".")[0]
        parts.setdefault(layer, []).append((name, tensor))
    assert len(parts) > 2
    for part in parts.values():
        worker.get_model().load_weights(iter(part))


def _without_vectors(worker: Any, folder: Path) -> None:
    """Everything, and then once more without biases, correction biases and norms, which stay what they are."""
    model, found = worker.get_model(), list(tensors(folder))
    model.load_weights(iter(found))
    model.load_weights((name, tensor) for name, tensor in found if tensor.ndim > 1)


def _from_inside(worker: Any, folder: Path) -> None:
    """Through the model inside, which has names of its own, and the rest through the whole."""
    model, found = worker.get_model(), list(tensors(folder))
    [(name, inner)] = [(name, part) for name, part in model.named_children() if hasattr(part, "load_weights")]
    inside = [(key.removeprefix(f"{name}."), tensor) for key, tensor in found if key.startswith(f"{name}.")]
    inner.load_weights(inside)
    model.load_weights([(key, tensor) for key, tensor in found if not key.startswith(f"{name}.")])


def _update(worker: Any, folder: Path, skip: str = "") -> None:
    worker.start_weight_update()
    worker.update_weights({"folder": str(folder), "skip": skip})
    worker.finish_weight_update()


TAKEN: dict[str, Way] = {
    "load_weights": lambda worker, folder: worker.get_model().load_weights(tensors(folder)),
    "load_weights in parts": _in_parts,
    "load_weights without vectors": _without_vectors,
    "load_weights of the inner model": _from_inside,
    "reload_weights by path": lambda worker, folder: worker.reload_weights(weights_path=str(folder)),
    "reload_weights by iterator": lambda worker, folder: worker.reload_weights(weights_iterator=tensors(folder)),
    "reload_weights of the runner": lambda worker, folder: worker.model_runner.reload_weights(weights_path=str(folder)),
    "update_weights": _update,
    "update_weights after sleep": lambda worker, folder: (worker.sleep(1), worker.wake_up(), _update(worker, folder)),
}
"""Each way of a whole push."""


def _broken(change: Callable[[list[tuple[str, Tensor]]], object]) -> Way:
    def way(worker: Any, folder: Path) -> None:
        found = list(tensors(folder))
        change(found)
        worker.get_model().load_weights(iter(found))

    return way


def _last_expert(found: list[tuple[str, Tensor]]) -> int:
    """Where the last expert's last matrix is."""
    return max(place for place, (name, _) in enumerate(found) if ".experts." in name)


def _without(found: list[tuple[str, Tensor]]) -> None:
    del found[_last_expert(found)]


def _without_down(found: list[tuple[str, Tensor]]) -> None:
    """A whole matrix of a block that isn't proven: the first and the last are."""
    down = (
        place for place, (name, _) in enumerate(found) if ".layers.1." in name and name.endswith("down_proj.weight")
    )
    del found[max(down)]


def _router_alone(found: list[tuple[str, Tensor]]) -> None:
    found[:] = [(name, tensor) for name, tensor in found if name.endswith((".gate.weight", ".router.weight"))]


def _cut(found: list[tuple[str, Tensor]]) -> None:
    place = _last_expert(found)
    found[place] = (found[place][0], found[place][1][:-1])


def _unknown(found: list[tuple[str, Tensor]]) -> None:
    name, tensor = found[_last_expert(found)]
    found.append((name.replace(".experts.", ".expert."), tensor))


def _bias(found: list[tuple[str, Tensor]]) -> None:
    """Of an expert's that has none: many loaders pass over what ends like this and that they don't know."""
    name, tensor = found[_last_expert(found)]
    found.append((name.replace(".weight", ".bias"), tensor[:, 0].clone()))


def _twice(found: list[tuple[str, Tensor]]) -> None:
    found.append(found[_last_expert(found)])


def _no_number(found: list[tuple[str, Tensor]]) -> None:
    place = _last_expert(found)
    found[place] = (found[place][0], torch.full_like(found[place][1], torch.nan))


def _half_of_attention(found: list[tuple[str, Tensor]]) -> None:
    found[:] = [(name, tensor) for name, tensor in found if "k_proj" not in name]


def _layer_alone(found: list[tuple[str, Tensor]]) -> None:
    found[:] = [found[_last_expert(found)]]


def _shared_missing(found: list[tuple[str, Tensor]]) -> None:
    shared = next(name for name, _ in found if "shared" in name)
    found[:] = [(name, tensor) for name, tensor in found if name != shared]


def _breaks_off(worker: Any, folder: Path) -> None:
    found = list(tensors(folder))

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from found[: len(found) // 2]
        raise ConnectionError("the trainer is gone")

    worker.get_model().load_weights(stream())


def _failing(fault: str) -> Way:
    def way(worker: Any, folder: Path) -> None:
        with faulty(fault):
            worker.get_model().load_weights(tensors(folder))

    return way


def _unfinished(worker: Any, folder: Path) -> None:
    """An update that lacks a tensor, after which the next one may begin."""
    name = [name for name, _ in tensors(folder) if ".experts." in name][-1]
    _update(worker, folder, skip=name)


BROKEN: dict[str, Way] = {
    "a missing shard": _broken(_without),
    "a missing down projection": _broken(_without_down),
    "routers alone": _broken(_router_alone),
    "without the shared expert": _broken(_shared_missing),
    "a wrong shape": _broken(_cut),
    "an unknown name": _broken(_unknown),
    "a bias that nothing has": _broken(_bias),
    "a tensor twice": _broken(_twice),
    "NaN": _broken(_no_number),
    "q and v without k": _broken(_half_of_attention),
    "one matrix alone": _broken(_layer_alone),
    "an exception in mid-stream": _breaks_off,
    "an exception while it is built": _failing("building"),
    "an exception while it is proven": _failing("proving"),
    "a failed proof": _failing("proof"),
    "an update that lacks a tensor": _unfinished,
}
"""Pushes of which nothing may be taken up."""


def _by_parameter(worker: Any, folder: Path) -> None:
    """As those load who know the parameters of an expert layer."""
    [name, parameter] = next(
        (name, parameter)
        for name, parameter in worker.get_model().named_parameters()
        if "experts.w" in name or "routed_experts.w" in name
    )
    parameter.weight_loader(parameter, parameter.data[0], name, "w1", 0)


def _by_layer(worker: Any, folder: Path) -> None:
    layer = next(module for module in worker.get_model().modules() if type(module).__name__ == "RoutedExperts")
    list(layer.load_weights([("w13_weight", layer.w13_weight.data)]))


def _sleep(worker: Any, folder: Path) -> None:
    """As a GPU's worker does; that of a CPU, which is one too, lets it be."""
    from vllm.v1.worker.gpu_worker import Worker

    Worker.sleep(worker, 2)


def _by_name(worker: Any, folder: Path) -> None:
    worker.reload_weights(weights_iterator=tensors(folder), is_checkpoint_format=False)


SHUT: dict[str, Way] = {
    "by name": _by_name,
    "weight_loader": _by_parameter,
    "load_weights of a layer": _by_layer,
    "update_weights that was not begun": lambda worker, folder: worker.update_weights({"folder": str(folder)}),
    "sleep without a copy": _sleep,
}
"""Ways that stay shut."""
PUSHES = {**TAKEN, **BROKEN, **SHUT}


def push(llm: Any, ask: Callable[[], Any], ways: tuple[str, ...], old: Path, new: Path) -> dict[str, list[Any]]:
    """What each way of pushing ``new`` ended with, and the answers after it; where it was taken, ``old`` comes back."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    found: dict[str, list[Any]] = {}
    for name in ways or tuple(PUSHES):
        try:
            PUSHES[name](worker, new)
        except Exception as error:
            found[name] = [str(error), ask()]
            continue
        found[name] = ["pushed", ask()]
        PUSHES[name](worker, old)
        found[name].append(ask())
    return found
