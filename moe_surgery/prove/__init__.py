"""The proof: old block, new block and wrong twins, all measured against the reference computed from the spec."""
