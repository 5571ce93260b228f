"""Where a block's weights lie in the model, and the tensors a target is built from."""
