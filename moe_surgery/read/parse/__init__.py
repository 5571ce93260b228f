"""Parsing: from the formula of one token's output to router, routed experts and shared expert.

Takes formulas; gives the parts of a spec. Every factor of every summand must find its place; it may leave nothing over.
"""
