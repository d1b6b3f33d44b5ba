"""Weights that share few values: which values, and which weight takes which."""
