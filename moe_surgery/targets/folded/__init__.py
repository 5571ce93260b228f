"""The folded target: the shared expert as further experts of one grouped product, in our own kernels."""
