"""Our Triton kernels: a whole sparse-MoE block, shared expert included, in three launches (few tokens) or five."""
