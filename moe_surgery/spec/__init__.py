"""What a sparse-MoE block computes, and nothing about how.

A :class:`MoESpec` stands between the models that can be read and the targets that can be built. It is also the ground
truth of the proof: the reference forward is computed from the spec and the weights alone.

For a token ``x`` of width H, with experts ``e`` of width I and a shared expert of width S::

    logits  = W_router x  (+ b_router)                         [E]
              c * tanh(logits / c)  with a soft cap c
    scores  = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))
              or the weights that the model's own router gives, as it is
    ranked  = logits or scores  (+ correction bias)
              in the best groups only, where groups limit the choice
    ids     = the k experts that rank highest
    w       = scores[ids];  w = w / max(sum(w) + epsilon, floor) if renormalize;  w = w * scale
    routed  = sum_j w[j] * MLP[ids[j]](x)          or  sum_j MLP[ids[j]](w[j] * x)
    shared  = g * scale_s * MLP_s(x),  g = sigmoid(W_g x) or 1
    out     = routed + shared

where ``MLP(x) = W_down mix(W_gate x + b_gate, W_up x + b_up) + b_down`` and :class:`Mix` says what stands between.
"""

from moe_surgery.spec.block import MoESpec
from moe_surgery.spec.experts import Activation, ExpertsSpec, Mix, SharedSpec
from moe_surgery.spec.router import Groups, GroupScore, Precision, Ranks, RouterSpec, Scoring

__all__ = [
    "Activation",
    "ExpertsSpec",
    "GroupScore",
    "Groups",
    "Mix",
    "MoESpec",
    "Precision",
    "Ranks",
    "RouterSpec",
    "Scoring",
    "SharedSpec",
]
