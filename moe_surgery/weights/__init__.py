"""Where a block's weights lie in the model, and the tensors a target is built from.

Takes a layout and a module; gives tensors by role (router, w13, w2, shared expert). It copies only what doesn't lie in
order.
"""
