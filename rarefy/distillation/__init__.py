"""distill() and train(): the training loop and what a student learns from."""
