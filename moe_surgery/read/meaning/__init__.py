"""Meaning: what each recorded operation makes of rows and matrices.

Takes a :class:`~moe_surgery.read.record.flow.Flow`; gives formulas over the block's input and weights, one for each
row. An operation without a meaning can't be read. It knows nothing of experts or routers.
"""
