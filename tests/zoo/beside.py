"""Blocks that need a tensor beside their input: another of each token, one of all experts, or token ids.

``TAKEN`` are replaced, ``LEFT`` are near misses, with a word of the reason. Each has ``told``, which makes of the input
what its model gives it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import around, plain
from .plain import ListOfMLPs, OneHotLoop, SoftmaxFirst, block_class

Alone: Any = block_class(around.Alone, SoftmaxFirst, ListOfMLPs, OneHotLoop, name="Alone")
TAKEN: list[type[Any]] = []
LEFT: dict[type[Any], str] = {}


def taken(cls: type[Any]) -> type[Any]:
    TAKEN.append(cls)
    return cls


def left(word: str) -> Any:
    def register(cls: type[Any]) -> type[Any]:
        LEFT[cls] = word
        return cls

    return register


class Masked(Alone):
    """Tokens of the padding come to nothing."""

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        return self.routed(x, weights * mask.reshape(-1, 1).to(weights.dtype), ids).view(hidden_states.shape)

    @staticmethod
    def told(x: Tensor) -> Tensor:
        return x[..., 0] > -1


@taken
class MaskedByTruth(Masked):
    pass


@taken
class MaskedByNumbers(Masked):
    @staticmethod
    def told(x: Tensor) -> Tensor:
        return Masked.told(x).long()


@taken
class RoutedByCentroids(Alone):
    """Experts are chosen by distances to centroids that the layer has (Moirai-MoE)."""

    def __init__(self) -> None:
        super().__init__()
        del self.gate

    def forward(self, x: Tensor, centroid: Tensor | None = None) -> Tensor:
        centroid = centroid.to(x.device).type_as(x)  # type: ignore[union-attr]
        apart = torch.cdist(x, centroid.unsqueeze(0).repeat(x.shape[0], 1, 1)).view(-1, self.num_experts)
        weights, ids = torch.topk(apart, self.top_k)
        return self.routed(x.view(-1, self.hidden), weights.softmax(-1), ids).view_as(x)

    @staticmethod
    def told(x: Tensor) -> Tensor:
        return torch.randn(8, x.shape[-1], generator=torch.Generator().manual_seed(3))


@taken
class RoutedByAnotherStream(Alone):
    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        weights, ids = self.route(before.reshape(-1, self.hidden))
        return self.routed(x.reshape(-1, self.hidden), weights, ids).view_as(x) + before

    @staticmethod
    def told(x: Tensor) -> Tensor:
        return x * 0.5 + 1


class ByToken(Alone):
    """Experts are looked up by token ids, their weights are scores (DeepSeek-V4)."""

    def __init__(self) -> None:
        super().__init__()
        rows = [torch.randperm(self.num_experts, generator=torch.Generator().manual_seed(n)) for n in range(50)]
        self.register_buffer("table", torch.stack(rows)[:, : self.top_k].contiguous())

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        flat = x.reshape(-1, self.hidden)
        ids = self.table[input_ids.reshape(-1)]
        weights = F.softplus(self.gate(flat)).sqrt().gather(1, ids)
        return self.routed(flat, weights / weights.sum(-1, keepdim=True), ids).view_as(x)

    @staticmethod
    def told(x: Tensor) -> Tensor:
        return torch.arange(x.shape[:-1].numel()).view(x.shape[:-1]) % 50


@taken
class ByTokenIds(ByToken):
    pass


@taken
class ByTokenIdsInAParameter(ByToken):
    """Its table is a parameter of smaller whole numbers (DeepSeek-V4's own code)."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.nn.Parameter(self.table.to(torch.int32), requires_grad=False)
        del self.table
        self.table = table

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        flat = x.reshape(-1, self.hidden)
        ids = self.table[input_ids.reshape(-1)].long()
        return self.routed(flat, F.softplus(self.gate(flat)).sqrt().gather(1, ids), ids).view_as(x)


class ByTokenAlone(Alone):
    """One expert for each token id, and no weights (hash layers)."""

    def __init__(self) -> None:
        super().__init__()
        del self.gate
        self.register_buffer("table", torch.arange(50) * 7 % self.num_experts)

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        return self.sent(x.reshape(-1, self.hidden), self.table[input_ids.reshape(-1)]).view_as(x)

    def sent(self, x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(ids == number)[0]
            out.index_add_(0, rows, expert(x[rows]))
        return out

    @staticmethod
    def told(x: Tensor) -> Tensor:
        return ByToken.told(x)


@taken
class ByTokenIdsAlone(ByTokenAlone):
    pass


@taken
class ByWhatRemainsOfTokenIds(ByTokenAlone):
    def __init__(self) -> None:
        super().__init__()
        del self.table

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        return self.sent(x.reshape(-1, self.hidden), self.hashed(input_ids.reshape(-1))).view_as(x)

    def hashed(self, input_ids: Tensor) -> Tensor:
        return input_ids % self.num_experts


@taken
class ByWhatRemainsOfMovedTokenIds(ByWhatRemainsOfTokenIds):
    def hashed(self, input_ids: Tensor) -> Tensor:
        return (super().hashed(input_ids * 5 - 100) + 1) % self.num_experts


@taken
class ByAnglesAlone(ByTokenAlone):
    """The nearest expert of a router of its own, with no weight."""

    def __init__(self) -> None:
        super().__init__()
        del self.table
        self.centres = plain.parameter(self.num_experts, self.hidden)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, self.hidden)
        near = F.normalize(flat, dim=-1) @ F.normalize(self.centres, dim=-1).t()
        return self.sent(flat, near.argmax(-1)).view_as(x)


@taken
class UnderOtherNumbers(Alone):
    """What a top-k chose are places, of which a table says which expert is there."""

    def __init__(self) -> None:
        super().__init__()
        order = torch.randperm(self.num_experts, generator=torch.Generator().manual_seed(0))
        self.register_buffer("expert_of_place", order)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, places = super().route(x)
        return weights, self.expert_of_place[places]


@taken
class WithAnUnusedTable(Alone):
    """It has the table of layers that look ids up, and routes by scores."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(50, self.top_k, dtype=torch.int64))


@left("takes no part")
class WithUnusedNumbers(WithAnUnusedTable):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(self.num_experts))


@left("looks at other tokens")
class SharedOutAmongUnmasked(Masked):
    """The mask of one token is the share of another."""

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return super().forward(hidden_states, mask / mask.sum().clamp(min=1))


@left("looks at other tokens")
class ByTheTokenIdBefore(ByWhatRemainsOfTokenIds):
    def hashed(self, input_ids: Tensor) -> Tensor:
        return super().hashed(input_ids.roll(1))


@left("no routed experts")
class ByTokenIdsTwice(ByWhatRemainsOfTokenIds):
    def sent(self, x: Tensor, ids: Tensor) -> Tensor:
        return 2 * super().sent(x, ids)


@left("no routed experts")
class ByTokenIdsOneExpertTwice(ByWhatRemainsOfTokenIds):
    def sent(self, x: Tensor, ids: Tensor) -> Tensor:
        return super().sent(x, ids) * (1 + (ids == 3).to(x.dtype)[:, None])


@left("no routed experts")
class ByTwoTokenIds(ByWhatRemainsOfTokenIds):
    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        return super().forward(x, input_ids) + super().forward(x, input_ids // self.num_experts)


@left("aren't those of its experts")
class ByTokenIdsWithoutAnExpert(ByWhatRemainsOfTokenIds):
    def hashed(self, input_ids: Tensor) -> Tensor:
        return super().hashed(input_ids).clamp(max=self.num_experts - 2)


@left("nothing is known")
class ByFewTokenIds(ByTokenAlone):
    def __init__(self) -> None:
        super().__init__()
        self.table %= 5


@left("")
class OfTheTokenBefore(RoutedByAnotherStream):
    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return super().forward(x, before.roll(1, 1))


@left("depends on the values")
class AskedWhetherAnyIsMasked(Masked):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return hidden_states if not mask.any() else super().forward(hidden_states, mask)


@left("")
class OfTheWholeRow(RoutedByAnotherStream):
    """One vector for each row of the batch."""

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return super().forward(x, before[:, None].expand_as(x))

    @staticmethod
    def told(x: Tensor) -> Tensor:
        return x[:, 0] + 1


@left("")
class LookedUpTwice(ByToken):
    """Which experts there are depends on a second table, which only some are looked up in."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("other", self.table.roll(1, 0).contiguous())

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        flat = x.reshape(-1, self.hidden)
        ids = self.table[input_ids.reshape(-1)]
        weights = self.gate(flat).softmax(-1).gather(1, ids)
        return self.routed(flat, weights, self.other[input_ids.reshape(-1)]).view_as(x)
