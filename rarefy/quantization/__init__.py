"""quantize(): numbers on grids, chosen and rounded on a few images."""
