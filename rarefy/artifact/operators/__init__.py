"""What the operators of a saved graph do with what a file gives them."""
