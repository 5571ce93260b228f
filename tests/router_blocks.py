"""Sparse-MoE blocks whose routers are generated: every way in which a block may rank and weight its experts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

HIDDEN, WIDTH = 32, 8


@dataclass(frozen=True)
class Case:
    """One router. ``spread`` is the standard deviation of the logits of unit tokens."""

    dtype: torch.dtype
    experts: int
    top_k: int
    spread: float
    scoring: str
    order: str  # what is ranked: "scores", or "logits", whose scores are "gathered" from those of all experts, or not
    wide_linear: bool
    wide_logits: bool
    wide_cap: bool
    wide_scores: bool
    rounded_ranks: bool
    soft_cap: float | None
    temperature: float | None
    bias: bool
    correction: bool
    groups: tuple[int, int, str, float] | None
    norm: bool
    scale: float
    narrow_weights: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts = draw(st.sampled_from([4, 8]))
    order = draw(st.sampled_from(["scores", "logits", "gathered"]))
    groups = st.tuples(
        st.just(experts // 2), st.just(2), st.sampled_from(["max", "top2"]), st.sampled_from([0.0, -1e9])
    )
    plain = draw(st.integers(0, 2)) > 0  # most have neither groups nor a correction bias
    return Case(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        experts=experts,
        top_k=draw(st.integers(1, 3)),
        spread=draw(st.sampled_from([0.3, 1.0, 3.0, 10.0, 20.0, 60.0])),
        scoring=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        order=order,
        wide_linear=draw(st.booleans()),
        wide_logits=draw(st.booleans()),
        wide_cap=draw(st.booleans()),
        wide_scores=draw(st.booleans()),
        rounded_ranks=draw(st.booleans()),
        soft_cap=draw(st.sampled_from([None, None, 2.0, 30.0])),
        temperature=draw(st.sampled_from([None, None, None, None, 0.5, 3.0])),
        bias=draw(st.booleans()),
        correction=not plain and order == "scores" and draw(st.booleans()),
        groups=draw(st.none() | groups) if not plain and order == "scores" else None,
        norm=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        narrow_weights=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.up = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def score(scoring: str, logits: Tensor) -> Tensor:
    if scoring == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if scoring == "sigmoid" else F.softplus(logits).sqrt()


class Block(nn.Module):
    """The block of a case, written as models write theirs. ``ranks`` and ``choose`` show how it comes to its choice."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)
        self.router = nn.Linear(HIDDEN, case.experts, bias=case.bias)
        self.experts = nn.ModuleList(MLP() for _ in range(case.experts))
        if case.correction:
            self.register_buffer("correction", torch.empty(case.experts))
        with torch.no_grad():
            for name, weight in self.named_parameters():
                size = case.spread if name == "router.weight" else 0.3 if weight.ndim == 1 else 1.0
                weight.copy_(torch.randn(weight.shape, generator=generator) * size / weight.shape[-1] ** 0.5)
            if case.correction:
                self.correction.copy_(torch.randn(case.experts, generator=generator) * 0.2)
        self.to(case.dtype).eval()

    def logits(self, x: Tensor) -> Tensor:
        case = self.case
        if case.wide_linear:
            bias = None if self.router.bias is None else self.router.bias.float()
            logits = F.linear(x.float(), self.router.weight.float(), bias)
        else:
            logits = self.router(x)
        if case.wide_cap:
            logits = logits.float()
        if case.temperature is not None:
            logits = logits / case.temperature
        if case.soft_cap is not None:
            logits = torch.tanh(logits / case.soft_cap) * case.soft_cap
        return logits.float() if case.wide_logits else logits

    def ranks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is ranked [T, E], before groups, and the scores [T, E]."""
        case, logits = self.case, self.logits(x)
        scores = score(case.scoring, logits.float() if case.wide_scores else logits)
        ranks = scores if case.order == "scores" else logits
        if case.rounded_ranks:
            ranks = ranks.to(x.dtype)
        if case.correction:
            ranks = ranks + self.correction
        return ranks, scores

    def choose(self, ranks: Tensor) -> Tensor:
        if self.case.groups is not None:
            count, chosen, kind, outside = self.case.groups
            by_group = ranks.view(len(ranks), count, -1)
            best = by_group.max(-1).values if kind == "max" else by_group.topk(2, -1)[0].sum(-1)
            mask = torch.zeros_like(best).scatter_(1, best.topk(chosen, -1)[1], 1)
            mask = mask.unsqueeze(-1).expand_as(by_group).reshape(ranks.shape)
            ranks = ranks.masked_fill(~mask.bool(), outside if outside == 0.0 else float("-inf"))
        return ranks.topk(self.case.top_k, -1)[1]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        case = self.case
        if case.order == "logits":
            logits = self.logits(x)
            if case.rounded_ranks:
                logits = logits.to(x.dtype)
            top, ids = logits.topk(case.top_k, -1)
            weights = score(case.scoring, top.float() if case.wide_scores else top)
        else:
            ranks, scores = self.ranks(x)
            ids = self.choose(ranks)
            weights = scores.gather(1, ids)
        return self.scaled(weights, x), ids

    def scaled(self, weights: Tensor, x: Tensor) -> Tensor:
        """The scores [T, k] that were chosen as weights."""
        case = self.case
        if case.norm:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * case.scale
        return weights.to(x.dtype) if case.narrow_weights else weights

    def truth(self, x: Tensor, ids: Tensor) -> Tensor:
        """The weights [T, k] of the experts ``ids``, in float64 throughout."""
        case = self.case
        plain = replace(case, wide_linear=False, wide_logits=False, wide_cap=False, wide_scores=False)
        twin, x = copy.deepcopy(self).double(), x.double()
        twin.case = replace(plain, narrow_weights=False, order="scores" if case.order == "gathered" else case.order)
        logits = twin.logits(x)
        if case.order == "logits":
            return twin.scaled(score(case.scoring, logits.gather(1, ids)), x)
        return twin.scaled(score(case.scoring, logits).gather(1, ids), x)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, HIDDEN)
        weights, ids = self.route(x)
        return self.experts_of(x, weights, ids).reshape(hidden_states.shape)

    def experts_of(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The sum of the experts ``ids``, weighted, of tokens [T, H]."""
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(ids == number)
            out.index_add_(0, rows, (expert(x[rows]) * weights[rows, slot, None]).to(x.dtype))
        return out

    def double_sum(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The same of experts as they are, added up in float64."""
        experts = torch.stack([expert(x).double() for expert in self.experts], dim=1)
        return (experts.gather(1, ids[..., None].expand(-1, -1, HIDDEN)) * weights[..., None]).sum(1)


def near_ties(block: Block, x: Tensor) -> Tensor:
    """Which tokens [T] may be sent to other experts: those that rounding what the block itself ranks may move.

    It is the block's own ranking, in its own dtype, that is moved: by four units in the last place, and of a softmax by
    as much more as its exponent is large, of which a float32 difference of logits is the argument.
    """
    case = block.case
    ranks, _ = block.ranks(x)
    eps = torch.finfo(ranks.dtype).eps
    size = eps * torch.ones_like(ranks, dtype=torch.float64)
    if case.order == "scores" and case.scoring == "softmax":
        logits = block.logits(x).double()
        size += torch.finfo(torch.float32).eps * (logits.amax(-1, keepdim=True) - logits)
    wide = ranks.double()
    chosen = _sets(block, wide)
    found = torch.zeros(len(x), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        signs = torch.randint(0, 2, wide.shape, generator=generator) * 2.0 - 1
        tiny = torch.finfo(torch.float32).tiny
        found |= (_sets(block, wide + signs * (4 * size * wide.abs() + tiny)) != chosen).any(-1)
    return found


def _sets(block: Block, ranks: Tensor) -> Tensor:
    return torch.zeros_like(ranks, dtype=torch.bool).scatter(1, block.choose(ranks), True)
