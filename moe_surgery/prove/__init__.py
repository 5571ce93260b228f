"""Proving: old block, new block and wrong twins, all measured against the reference computed from the spec.

Takes a spec, its weights and something to ask; gives a :class:`~moe_surgery.prove.verdict.Verdict`. It may use no model
code and no kernel for the truth, and a check that couldn't tell a wrong twin is a failed check.
"""
