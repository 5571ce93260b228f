"""Where models are built and loaded by others: the only part of the library that touches global state."""
