"""Finding MoE blocks: what a module computes, read from its dataflow, and the clauses a rule asks of it."""
