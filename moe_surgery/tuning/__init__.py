"""Tile sizes for a shape and a GPU of one's own: candidates, timed as whole blocks, and the table of the fastest.

Takes the spec of a block; gives a :class:`~moe_surgery.tuning.table.Table`, which the kernels find where it is stored.
"""
