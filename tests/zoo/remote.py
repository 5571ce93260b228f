"""Sparse-MoE blocks as remote code writes them: near copies of families under other names, experts in other stores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, E, K, I = 64, 8, 2, 32  # noqa: E741


class FeedForward(nn.Module):
    """A gated MLP as old Mixtral spelled it, w2(act(w1(x)) * w3(x)), with an optional clamp, alpha and biases."""

    def __init__(self, width: int = I, bias: bool = False, limit: float | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(H, width, bias=bias), nn.Linear(H, width, bias=bias)
        self.w2 = nn.Linear(width, H, bias=bias)
        self.limit, self.alpha = limit, alpha

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w3(x)
        if self.limit is None:
            return self.w2(F.silu(gate) * up)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.w2(gate * torch.sigmoid(self.alpha * gate) * (up + 1))


def in_turn(mlps: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, mlp in enumerate(mlps):
        rows, slots = torch.where(ids == number)
        out.index_add_(0, rows, (mlp(x[rows]) * weights[rows, slots, None]).to(out.dtype))
    return out


class ListedMixtral(nn.Module):
    """Softmax, renormalised; experts in a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.scorer = nn.Linear(H, E, bias=False)
        self.mlps = nn.ModuleList(FeedForward() for _ in range(E))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        weights, ids = self.scorer(x).float().softmax(-1).topk(K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return in_turn(self.mlps, x, weights.to(x.dtype), ids).view(hidden.shape)


class BiasedGroups(nn.Module):
    """DeepSeek-V3's routing written inline, its correction bias a parameter of the block; a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(E, H) / 8)
        self.balance = nn.Parameter(0.1 * torch.randn(E))
        self.routed = nn.ModuleList(FeedForward() for _ in range(E))
        self.always = FeedForward(2 * I)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        scores = F.linear(x.float(), self.centroids.float()).sigmoid()
        ranked = scores + self.balance
        best = ranked.view(x.shape[0], 4, E // 4).topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
        kept = torch.zeros(x.shape[0], 4, dtype=torch.bool, device=x.device).scatter_(1, best, True)
        ranked = ranked.masked_fill(~kept.repeat_interleave(E // 4, dim=1), float("-inf"))
        ids = ranked.topk(K, dim=-1).indices
        weights = scores.gather(1, ids)
        weights = 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return (in_turn(self.routed, x, weights, ids) + self.always(x)).view(hidden.shape)


class ClampedWithBiases(nn.Module):
    """gpt-oss's arithmetic over single linear layers with biases, and a bias on the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = nn.Linear(H, E)
        self.mlps = nn.ModuleList(FeedForward(bias=True, limit=2.0, alpha=1.702) for _ in range(E))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        values, ids = self.switch(x).topk(K, dim=-1)
        return in_turn(self.mlps, x, values.softmax(-1), ids).view(hidden.shape)


class StackedInTwo(nn.Module):
    """dbrx's storage: every expert's rows in one tall matrix; sigmoid scores with a soft cap."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.tall_gate, self.tall_up = (nn.Parameter(torch.randn(E * I, H) / 8) for _ in range(2))
        self.tall_down = nn.Parameter(torch.randn(E * I, H) / 8)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        logits = 5.0 * torch.tanh(self.router(x).float() / 5.0)
        weights, ids = logits.sigmoid().topk(K, dim=-1)
        gates, ups, downs = (w.view(E, I, H) for w in (self.tall_gate, self.tall_up, self.tall_down))
        out = torch.zeros_like(x)
        for number in range(E):
            rows, slots = torch.where(ids == number)
            y = (F.gelu(x[rows] @ gates[number].T) * (x[rows] @ ups[number].T)) @ downs[number]
            out.index_add_(0, rows, (y * weights[rows, slots, None]).to(out.dtype))
        return out.view(hidden.shape)


class Ungated(nn.Module):
    """relu², no up projection, a list of layers for each of the two maps; an ungated shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.ups = nn.ModuleList(nn.Linear(H, I, bias=False) for _ in range(E))
        self.downs = nn.ModuleList(nn.Linear(I, H, bias=False) for _ in range(E))
        self.up, self.down = nn.Linear(H, I, bias=False), nn.Linear(I, H, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        scores = F.softplus(self.router(x).float()).sqrt()
        weights, ids = scores.topk(K, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
        out = self.down(F.relu(self.up(x)).square())
        for number in range(E):
            rows, slots = torch.where(ids == number)
            y = self.downs[number](F.relu(self.ups[number](x[rows])).square())
            out = out.index_add(0, rows, (y * weights[rows, slots, None]).to(out.dtype))
        return out.view(hidden.shape)


class WeightedInputs(nn.Module):
    """llama4's arithmetic, top-1: every expert sees its tokens times their weight; transposed packed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.packed, self.out = nn.Parameter(torch.randn(E, H, 2 * I) / 8), nn.Parameter(torch.randn(E, I, H) / 8)
        self.shared = FeedForward()

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        value, ids = self.router(x).topk(1, dim=-1)
        scores = torch.full((x.shape[0], E), float("-inf"), dtype=x.dtype, device=x.device)
        scores = scores.scatter(1, ids, value).sigmoid()
        given = x[None] * scores.t()[:, :, None]
        gate, up = torch.bmm(given, self.packed).chunk(2, dim=-1)
        routed = torch.bmm(F.silu(gate) * up, self.out).sum(0)
        return (routed + self.shared(x)).view(hidden.shape)


class Packed(nn.Module):
    """Experts alone, as transformers calls them, with ids beyond the experts that return their input."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Parameter(torch.randn(E, 2 * I, H) / 8), nn.Parameter(torch.randn(E, H, I) / 8)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(E + 2):
            rows, slots = torch.where(ids == number)
            y = x[rows]
            if number < E:
                gate, up = F.linear(y, self.both[number]).chunk(2, dim=-1)
                y = F.linear(F.silu(gate) * up, self.down[number])
            out.index_add_(0, rows, (y * weights[rows, slots, None]).to(out.dtype))
        return out


class BehindAnMLP(nn.Module):
    """A router that no field describes, before experts of which two do nothing; a norm after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(H, 16), nn.Linear(16, E + 2)
        self.bank = Packed()
        self.norm = nn.LayerNorm(H)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden.reshape(-1, H)
        scores = self.second(F.gelu(self.first(x))).softmax(-1)
        weights, ids = scores.topk(3, dim=-1)
        return self.norm(self.bank(x, ids, weights)).view(hidden.shape), scores


VARIANTS = {
    ListedMixtral: "softmax top-2 of 8 renormalised · experts 64→32 silu",
    BiasedGroups: (
        "sigmoid top-2 of 8 with correction bias in 2 of 4 groups (top2, -inf outside) renormalised ×2.5 · "
        "experts 64→32 silu · shared 64 silu"
    ),
    ClampedWithBiases: (
        "softmax top-2 of 8 by logits with logit bias renormalised · experts 64→32 silu(α 1.702), up + 1 clamped at 2 "
        "with biases"
    ),
    StackedInTwo: "sigmoid top-2 of 8 soft-capped at 5 · experts 64→32 gelu",
    Ungated: "sqrtsoftplus top-2 of 8 renormalised · experts 64→32 relu2 ungated · shared 32 relu2 ungated",
    WeightedInputs: "sigmoid top-1 of 8 by logits · experts 64→32 silu, weighted inputs · shared 32 silu",
    BehindAnMLP: "experts alone, behind its own router · 8 experts 64→32 silu, 2 identity experts",
}
