"""Timing: old and new blocks, and a model's whole steps with either, in turns.

Takes a model that was operated on; gives a :class:`~moe_surgery.timing.blocks.Speed`. It proves nothing.
"""
