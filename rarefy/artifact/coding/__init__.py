"""What a folder's tensors are stored as where it is to be small: symbols, and a coder that takes their entropy."""
