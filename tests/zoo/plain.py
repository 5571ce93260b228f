"""One Qwen2-MoE-like computation, put together from parts that are spelled in many ways.

A block is a class composed of one mixin for each part: how the router scores, how the experts are stored, how tokens
reach them, how the shared expert is written, and how ``forward`` combines it all. Near misses override one method.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """H, E, k, I and S. All sizes differ but H and S, and H, I and S suit vLLM's CPU kernels."""

    hidden: int = 32
    experts: int = 8
    k: int = 2
    width: int = 16
    shared: int = 32


SIZES = Sizes()


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


class Base(nn.Module):
    """What all blocks share: sizes and the order of the computation."""

    scale = 1.0

    def __init__(self, sizes: Sizes = SIZES) -> None:
        super().__init__()
        self.hidden, self.num_experts, self.top_k = sizes.hidden, sizes.experts, sizes.k
        self.width, self.shared_width = sizes.width, sizes.shared
        self.make_router()
        self.make_experts()
        self.make_shared()
        self.make_more()

    def make_router(self) -> None:
        self.gate = nn.Linear(self.hidden, self.num_experts, bias=False)
        nn.init.normal_(self.gate.weight, std=2 * self.hidden**-0.5)

    def make_experts(self) -> None: ...

    def make_shared(self) -> None: ...

    def make_more(self) -> None:
        """What a near miss adds."""

    def act(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(x)
        return self.combine(x, self.routed(x, weights, ids), self.shared(x)).reshape(hidden_states.shape)

    def combine(self, x: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        return routed if shared is None else routed + shared

    def logits(self, x: Tensor) -> Tensor:
        return self.gate(x)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def shared(self, x: Tensor) -> Tensor | None:
        return None


# How the router scores.


class SoftmaxFirst(Base):
    renormalize = True

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights * self.scale).to(x.dtype), ids


class NotRenormalised(SoftmaxFirst):
    renormalize = False


class InPlaceRenormalised(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softmax(self.logits(x).float(), dim=1)
        weights, ids = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        weights /= weights.sum(dim=-1, keepdim=True)
        return weights.type_as(x), ids


class SoftmaxLast(Base):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = torch.topk(self.logits(x), self.top_k, dim=1)
        return torch.softmax(top, dim=1).to(x), ids


class Gathered(Base):
    """Scores gathered by the chosen ids, as DeepSeek's routers do."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).float().sigmoid()
        ids = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * 2.5, ids


class SigmoidOfChosen(Base):
    """Ranked by logits, weighted by their sigmoid."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = self.logits(x).topk(self.top_k)
        return top.sigmoid(), ids


class BareRouter(SoftmaxFirst):
    """A router that is a parameter, not a layer."""

    def make_router(self) -> None:
        self.router_weight = nn.Parameter(torch.randn(self.num_experts, self.hidden) * 2 * self.hidden**-0.5)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.router_weight.t()


class Float32Router(SoftmaxFirst):
    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.gate.weight.float())


class TransposedRouter(SoftmaxFirst):
    """A router stored [H, E]."""

    def make_router(self) -> None:
        self.wg = nn.Parameter(torch.randn(self.hidden, self.num_experts) * 2 * self.hidden**-0.5)

    def logits(self, x: Tensor) -> Tensor:
        return torch.einsum("th,he->te", x, self.wg)


ROUTERS = (
    SoftmaxFirst, NotRenormalised, InPlaceRenormalised, SoftmaxLast, Gathered, SigmoidOfChosen, BareRouter,
    Float32Router, TransposedRouter,
)  # fmt: skip


# How the experts are stored. ``expert`` is one of them; ``stacked`` are all, as [E, I, H], [E, I, H] and [E, H, I].


class Packed(Base):
    """Two stacked tensors, gate rows before up rows."""

    def make_experts(self) -> None:
        self.gate_up_proj = parameter(self.num_experts, 2 * self.width, self.hidden)
        self.down_proj = parameter(self.num_experts, self.hidden, self.width)

    def expert(self, number: Any, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[number]).chunk(2, dim=-1)
        return F.linear(self.act(gate) * up, self.down_proj[number])

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = self.gate_up_proj.split(self.width, dim=1)
        return gate, up, self.down_proj


class UpBeforeGate(Packed):
    """Two stacked tensors with up rows first."""

    def expert(self, number: Any, x: Tensor) -> Tensor:
        up, gate = F.linear(x, self.gate_up_proj[number]).split(self.width, dim=-1)
        return F.linear(self.act(gate) * up, self.down_proj[number])

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        up, gate = self.gate_up_proj.chunk(2, dim=1)
        return gate, up, self.down_proj


class Three(Base):
    """Three stacked tensors."""

    def make_experts(self) -> None:
        self.w1 = parameter(self.num_experts, self.width, self.hidden)
        self.w3 = parameter(self.num_experts, self.width, self.hidden)
        self.w2 = parameter(self.num_experts, self.hidden, self.width)

    def expert(self, number: Any, x: Tensor) -> Tensor:
        return (self.act(x @ self.w1[number].T) * (x @ self.w3[number].T)) @ self.w2[number].T

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1, self.w3, self.w2


class Transposed(Base):
    """Three stacked tensors, [in, out] each."""

    def make_experts(self) -> None:
        self.w1 = parameter(self.num_experts, self.hidden, self.width)
        self.w3 = parameter(self.num_experts, self.hidden, self.width)
        self.w2 = parameter(self.num_experts, self.width, self.hidden)

    def expert(self, number: Any, x: Tensor) -> Tensor:
        return torch.mm(self.act(torch.mm(x, self.w1[number])) * torch.mm(x, self.w3[number]), self.w2[number])

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1.transpose(1, 2), self.w3.transpose(1, 2), self.w2.permute(0, 2, 1)


class Flat(Base):
    """Three two-dimensional tensors, one expert's rows after another's, as DBRX stores them."""

    def make_experts(self) -> None:
        self.w1 = parameter(self.num_experts * self.width, self.hidden)
        self.v1 = parameter(self.num_experts * self.width, self.hidden)
        self.w2 = parameter(self.num_experts * self.width, self.hidden)

    def _views(self) -> list[Tensor]:
        return [weight.view(self.num_experts, self.width, self.hidden) for weight in (self.w1, self.v1, self.w2)]

    def expert(self, number: Any, x: Tensor) -> Tensor:
        w1, v1, w2 = self._views()
        return (self.act(x.matmul(w1[number].t())) * x.matmul(v1[number].t())).matmul(w2[number])

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        w1, v1, w2 = self._views()
        return w1, v1, w2.transpose(1, 2)


class MLP(nn.Module):
    """A gated MLP of three linear layers."""

    def __init__(self, hidden: int, width: int, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PackedMLP(nn.Module):
    """A gated MLP whose gate and up projections are one layer."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.input_linear, self.output_linear = linear(hidden, 2 * width), linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.input_linear(x).chunk(2, dim=-1)
        return self.output_linear(F.silu(first) * second)


class ListOfMLPs(Base):
    def make_experts(self) -> None:
        self.experts = nn.ModuleList(self.make_expert() for _ in range(self.num_experts))

    def make_expert(self) -> nn.Module:
        return MLP(self.hidden, self.width, self.act)

    def expert(self, number: Any, x: Tensor) -> Tensor:
        return self.experts[int(number)](x)

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        weights = [(e.gate_proj.weight, e.up_proj.weight, e.down_proj.weight) for e in self.experts]
        gate, up, down = zip(*weights, strict=True)
        return torch.stack(gate), torch.stack(up), torch.stack(down)


class ListOfPackedMLPs(Base):
    def make_experts(self) -> None:
        self.experts = nn.ModuleList(PackedMLP(self.hidden, self.width) for _ in range(self.num_experts))

    def expert(self, number: Any, x: Tensor) -> Tensor:
        return self.experts[int(number)](x)

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        both = torch.stack([expert.input_linear.weight for expert in self.experts])
        down = torch.stack([expert.output_linear.weight for expert in self.experts])
        return both[:, : self.width], both[:, self.width :], down


class ListOfLists(Base):
    """One list of layers for each projection."""

    def make_experts(self) -> None:
        for name, (inputs, outputs) in {
            "w1": (self.hidden, self.width),
            "w2": (self.width, self.hidden),
            "w3": (self.hidden, self.width),
        }.items():
            layers = nn.ModuleList(linear(inputs, outputs) for _ in range(self.num_experts))
            setattr(self, f"experts_{name}", layers)

    def expert(self, number: Any, x: Tensor) -> Tensor:
        e = int(number)
        return self.experts_w2[e](self.act(self.experts_w1[e](x)) * self.experts_w3[e](x))

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        lists = (self.experts_w1, self.experts_w3, self.experts_w2)
        first, second, third = (torch.stack([layer.weight for layer in layers]) for layers in lists)
        return first, second, third


STORES = (Packed, UpBeforeGate, Three, Transposed, Flat, ListOfMLPs, ListOfPackedMLPs, ListOfLists)


# How tokens reach their experts.


class OneHotLoop(Base):
    """Experts that were hit, each with its tokens, as transformers 5 does."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for number in hit:
            slot, token = torch.where(mask[number[0]])
            y = self.expert(number[0], x[token]) * weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


class WhereLoop(Base):
    """Every expert in turn, with the tokens that chose it, as the older Mixtral did."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for number in range(self.num_experts):
            slot, token = torch.where(mask[number])
            if token.shape[0] == 0:
                continue
            state = x[None, token].reshape(-1, x.shape[-1])
            out.index_add_(0, token, (self.expert(number, state) * weights[token, slot, None]).to(x.dtype))
        return out


class MaskLoop(Base):
    """Boolean masks and assignment through them, expert by expert and slot by slot."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            for slot in range(self.top_k):
                mine = ids[:, slot] == number
                if mine.any():
                    out[mine] += weights[mine, slot].unsqueeze(-1) * self.expert(number, x[mine])
        return out


class DenseLoop(Base):
    """Every expert on every token, weighted by zero where it wasn't chosen."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        total: Any = 0
        for number in range(self.num_experts):
            weight = (weights * (ids == number)).sum(-1, keepdim=True)
            total = total + weight * self.expert(number, x)
        return total


class DenseWhere(Base):
    """As above, with torch.where."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        outputs = [self.expert(number, x) for number in range(self.num_experts)]
        total = torch.zeros_like(x)
        for slot in range(self.top_k):
            for number in range(self.num_experts):
                chosen = (ids[:, slot] == number).unsqueeze(-1)
                total = total + torch.where(chosen, weights[:, slot, None] * outputs[number], torch.zeros_like(x))
        return total


class DenseEinsum(Base):
    """All experts at once, with a matrix of weights that is zero where they weren't chosen."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate, up, down = self.stacked()
        dense = weights.new_zeros(x.shape[0], self.num_experts).scatter(1, ids, weights)
        hidden = self.act(torch.einsum("th,eih->tei", x, gate)) * torch.einsum("th,eih->tei", x, up)
        return (torch.einsum("tei,ehi->teh", hidden, down) * dense.unsqueeze(-1)).sum(1)


class DenseBmm(Base):
    """All experts at once, as a batched product over experts."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate, up, down = self.stacked()
        every = x.unsqueeze(0).expand(self.num_experts, -1, -1)
        hidden = self.act(torch.bmm(every, gate.transpose(1, 2))) * torch.bmm(every, up.transpose(1, 2))
        dense = torch.zeros(x.size(0), self.num_experts, dtype=weights.dtype, device=x.device)
        dense.scatter_(1, ids, weights)
        return (torch.bmm(hidden, down.mT) * dense.t()[..., None]).sum(dim=0)


class GatherBmm(Base):
    """Every choice's own weights, gathered."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate, up, down = (stack[ids.flatten()] for stack in self.stacked())
        every = x.repeat_interleave(self.top_k, dim=0).unsqueeze(-1)
        y = torch.bmm(down, self.act(torch.bmm(gate, every)) * torch.bmm(up, every)).squeeze(-1)
        return (y.view(-1, self.top_k, x.shape[-1]) * weights.unsqueeze(-1)).sum(dim=1)


class GatherEinsum(Base):
    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate, up, down = (stack[ids] for stack in self.stacked())
        hidden = self.act(torch.einsum("th,tkih->tki", x, gate)) * torch.einsum("th,tkih->tki", x, up)
        return (torch.einsum("tki,tkhi->tkh", hidden, down) * weights[..., None]).sum(1)


class SortedNumpy(Base):
    """Tokens in the order of their experts, counted with numpy, as DeepSeek's remote code infers."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        counts = ids.new_zeros((ids.shape[0], self.num_experts))
        counts.scatter_(1, ids, 1)
        places = ids.view(-1).argsort()
        ordered = x[places // ids.shape[1]]
        outputs, start = [], 0
        for number, count in enumerate(counts.sum(dim=0).cpu().numpy()):
            end = start + count
            if count == 0:
                continue
            outputs.append(self.expert(number, ordered[start:end]))
            start = end
        joined = torch.cat(outputs, dim=0) if len(outputs) else ordered.new_empty(0)
        back = torch.empty_like(joined)
        back[places] = joined
        y = back.view(*ids.shape, -1).type(weights.dtype)
        return y.mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(x.dtype)


class SortedSplit(Base):
    """Tokens in the order of their experts, split by how many each got."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        chosen, places = ids.flatten().sort(stable=True)
        tokens = places.div(self.top_k, rounding_mode="trunc")
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        parts = x[tokens].split(counts, dim=0)
        y = torch.cat([self.expert(number, part) for number, part in enumerate(parts)])
        y = y * weights.flatten()[places][:, None]
        return torch.zeros_like(x).index_add(0, tokens, y.to(x.dtype))


class SortedScatter(Base):
    """Tokens in the order of their experts, put back through the inverse order and scatter_add."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        places = torch.argsort(ids.reshape(-1))
        tokens = places // self.top_k
        ends = torch.bincount(ids.reshape(-1), minlength=self.num_experts).cumsum(0).tolist()
        outputs, start = [], 0
        for number, end in enumerate(ends):
            if start == end:
                continue
            rows = x.index_select(0, tokens[start:end])
            outputs.append(self.expert(number, rows).mul(weights.view(-1, 1)[places[start:end]]))
            start = end
        total = torch.zeros_like(x)
        total.scatter_add_(0, tokens.view(-1, 1).repeat(1, x.shape[-1]), torch.cat(outputs))
        return total


class UniqueLoop(Base):
    """The experts that were chosen, from unique()."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        for number in ids.unique().tolist():
            token, slot = (ids == number).nonzero(as_tuple=True)
            out[token] = out[token] + self.expert(number, x[token]) * weights[token, slot].view(-1, 1)
        return out


DISPATCHES = (
    OneHotLoop, WhereLoop, MaskLoop, DenseLoop, DenseWhere, DenseEinsum, DenseBmm, GatherBmm, GatherEinsum,
    SortedNumpy, SortedSplit, SortedScatter, UniqueLoop,
)  # fmt: skip


# How the shared expert is written.


class SharedMLP(Base):
    """A module of its own and a layer that gates it."""

    def make_shared(self) -> None:
        self.shared_expert = MLP(self.hidden, self.shared_width)
        self.shared_expert_gate = linear(self.hidden, 1)

    def shared(self, x: Tensor) -> Tensor | None:
        return F.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


class SharedPacked(Base):
    def make_shared(self) -> None:
        self.shared_mlp = PackedMLP(self.hidden, self.shared_width)
        self.shared_gate = parameter(1, self.hidden)

    def shared(self, x: Tensor) -> Tensor | None:
        return self.shared_mlp(x) * torch.sigmoid(F.linear(x, self.shared_gate))


class SharedBare(Base):
    """Parameters on the block itself, multiplied in einsums."""

    def make_shared(self) -> None:
        self.shared_in = parameter(2, self.shared_width, self.hidden)
        self.shared_out = parameter(self.hidden, self.shared_width)
        self.shared_gate = nn.Linear(self.hidden, 1, bias=False)

    def shared(self, x: Tensor) -> Tensor | None:
        gate, up = (torch.einsum("th,sh->ts", x, weight) for weight in self.shared_in)
        return self.shared_gate(x).sigmoid() * torch.einsum("ts,hs->th", F.silu(gate) * up, self.shared_out)


class SharedUngated(Base):
    def make_shared(self) -> None:
        self.shared_experts = MLP(self.hidden, self.shared_width)

    def shared(self, x: Tensor) -> Tensor | None:
        return self.shared_experts(x)


class NoShared(Base):
    """A block of routed experts alone."""


SHAREDS = (SharedMLP, SharedPacked, SharedBare, SharedUngated, NoShared)


# How the activation is written.


class SiluModule(Base):
    def make_more(self) -> None:
        self.act_fn = nn.SiLU()

    def act(self, x: Tensor) -> Tensor:
        return self.act_fn(x)


class SiluByHand(Base):
    def act(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class SiluFromExp(Base):
    def act(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))


class SiluInPlace(Base):
    def act(self, x: Tensor) -> Tensor:
        return F.silu(x.clone(), inplace=True)


class Gelu(Base):
    def act(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class GeluTanh(Base):
    def act(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class Relu(Base):
    def act(self, x: Tensor) -> Tensor:
        return torch.relu(x)


ACTS = (SiluModule, SiluByHand, SiluFromExp, SiluInPlace, Gelu, GeluTanh, Relu)


# How forward combines it.


class Flattened(Base):
    """view and *sizes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        *lead, hidden = hidden_states.shape
        x = hidden_states.view(-1, hidden)
        weights, ids = self.route(x)
        return self.combine(x, self.routed(x, weights, ids), self.shared(x)).view(*lead, hidden)


class SharedFirst(Base):
    """The shared expert on the input as it came, added in place at the end."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        shared = self.shared(hidden_states)
        x = hidden_states.contiguous().view(-1, hidden_states.size(-1))
        weights, ids = self.route(x)
        out = self.routed(x, weights, ids).reshape(hidden_states.size())
        if shared is not None:
            out += shared
        return out


class Annotated(Base):
    """An early return for no tokens, and shape checks."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        assert hidden_states.shape[-1] == self.hidden, "another width"
        if hidden_states.numel() == 0:
            return hidden_states
        out = super().forward(hidden_states)
        assert out.shape == hidden_states.shape
        return out


FORWARDS = (Flattened, SharedFirst, Annotated)


def block_class(*parts: type[Base], name: str = "Unheard") -> type[Base]:
    """A block class of some parts; those not given are spelled in the first way."""
    chosen = list(parts)
    for options in (ROUTERS, STORES, DISPATCHES, SHAREDS):
        if not any(issubclass(part, options) for part in parts):
            chosen.append(options[0])
    return type(name, tuple(chosen), {})


def make(cls: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """An instance with weights of its own seed, ready to infer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls().to(dtype).eval().requires_grad_(False)


# Whole blocks in the style of code that is about.


class MixtralOfOld(Base):
    """Index lists in Python, as in transformers 4.36."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros((x.shape[0], self.hidden), dtype=x.dtype, device=x.device)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for number in range(self.num_experts):
            slot, token = torch.where(mask[number])
            if token.shape[0] == 0:
                continue
            slots, tokens = slot.tolist(), token.tolist()
            state = x[None, tokens].reshape(-1, self.hidden)
            out.index_add_(0, token, (self.expert(number, state) * weights[tokens, slots, None]).to(x.dtype))
        return out


class Router(nn.Module):
    """Logits, weights and ids from a module of its own."""

    def __init__(self, hidden: int, experts: int, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden) * 2 * hidden**-0.5)
        self.k = k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        top, ids = F.softmax(logits, dtype=torch.float, dim=-1).topk(self.k, dim=-1)
        top /= top.sum(dim=-1, keepdim=True)
        return logits, top.to(logits.dtype), ids


class Bank(Packed, OneHotLoop):
    """The experts as a module of their own."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return self.routed(x, weights, ids)

    def make_router(self) -> None: ...


class Nested(Base):
    """Router and experts in modules below, as in transformers 5."""

    def make_router(self) -> None:
        self.router = Router(self.hidden, self.num_experts, self.top_k)

    def make_experts(self) -> None:
        self.bank = Bank(Sizes(self.hidden, self.num_experts, self.top_k, self.width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, length, hidden = hidden_states.shape
        x = hidden_states.view(-1, hidden)
        _, weights, ids = self.router(x)
        shared = self.shared(x)
        out = self.bank(x, ids, weights)
        return (out if shared is None else out + shared).reshape(batch, length, hidden)


class DeepSeekRemote(ListOfMLPs):
    """moe_infer under no_grad, identity kept, float32 router, a list of experts of which none may be None."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        identity, shape = hidden_states, hidden_states.shape
        bsz, seq_len, h = hidden_states.shape
        flat = hidden_states.view(-1, h)
        scores = F.linear(flat.type(torch.float32), self.gate.weight.type(torch.float32), None).softmax(-1)
        top, ids = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        if self.top_k > 1:
            top = top / top.sum(dim=-1, keepdim=True)
        y = self.moe_infer(flat, ids, top).view(*shape)
        shared = self.shared(identity)
        return y if shared is None else y + shared

    @torch.no_grad()
    def moe_infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = ids.new_zeros((ids.shape[0], len(self.experts)))
        counts.scatter_(1, ids, 1)
        counts = counts.sum(dim=0)
        places = ids.view(-1).argsort()
        ordered = x[places // ids.shape[1]]
        outputs: list[Tensor] = []
        start = 0
        for number, count in enumerate(counts.cpu().numpy()):
            end = start + count
            if count == 0:
                continue
            expert = self.experts[number]
            outputs.append(expert(ordered[start:end]))
            start = end
        joined = torch.cat(outputs, dim=0) if len(outputs) else ordered.new_empty(0)
        back = torch.empty_like(joined)
        back[places] = joined
        return back.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(back.dtype)


class Unrolled(Base):
    """A router in a buffer, an autograd function, checkpointing, and autocast switched off."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

    def make_router(self) -> None:
        self.register_buffer("centroids", torch.randn(self.num_experts, self.hidden) * 2 * self.hidden**-0.5)

    def logits(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.centroids.float())

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not hidden_states.is_contiguous():
            hidden_states = hidden_states.contiguous()
        out = torch.utils.checkpoint.checkpoint(super().forward, hidden_states, use_reentrant=False)
        return self.Double.apply(out) * 0.5


WHOLES = (MixtralOfOld, Nested, DeepSeekRemote, Unrolled)


# Forwards patched onto an instance.


def patched_closure(block: Any) -> None:
    """What a project patches by hand: a closure that looks for children and guards what may be missing."""
    gate, top_k, has_shared = block.gate, block.top_k, hasattr(block, "shared_expert")

    def forward(hidden_states: Tensor) -> Tensor:
        shape = hidden_states.shape
        x = hidden_states.view(-1, shape[-1]) if hidden_states.dim() > 2 else hidden_states
        top, ids = torch.topk(gate(x).softmax(dim=-1, dtype=torch.float32), top_k, dim=-1)
        top = (top / top.sum(dim=-1, keepdim=True)).to(x.dtype)
        shared = None
        if has_shared and block.shared_expert is not None:
            shared = block.shared_expert(x)
            try:
                shared = torch.sigmoid(block.shared_expert_gate(x)) * shared
            except AttributeError:
                pass
        out = block.routed(x, top, ids)
        if isinstance(out, tuple):
            out = out[0]
        return (out if shared is None else out + shared).view(shape)

    block.forward = forward


def patched_partial(block: Any) -> None:
    block.forward = functools.partial(type(block).forward, block)


def patched_method(block: Any) -> None:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return type(self).forward(self, hidden_states)

    block.forward = types.MethodType(forward, block)


def patched_compiled(block: Any) -> None:
    block.forward = torch.compile(block.forward, backend="eager")


def patched_wrapped(block: Any) -> None:
    own = block.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    block.forward = forward


PATCHES = (patched_closure, patched_partial, patched_method, patched_compiled, patched_wrapped)
