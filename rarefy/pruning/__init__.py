"""prune() and mask(): channels that leave, weights that become zero."""
