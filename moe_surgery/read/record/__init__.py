"""Recording: one run of a block on meta tensors, written down operation by operation.

Takes a module; gives a :class:`~moe_surgery.read.record.flow.Flow`. It gives no operation a meaning; it objects to code
that does something else with another batch, another load or the next time. Only here is torch.fx used.
"""
