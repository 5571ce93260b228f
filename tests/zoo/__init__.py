"""Hand-made sparse-MoE blocks of classes that nobody has heard of.

``plain`` holds one Qwen2-MoE-like computation in many spellings, all of which must be read. ``nearmiss`` holds blocks
that are one semantic change away from it: each must be replaced by something equal or left alone for the right reason.
"""
