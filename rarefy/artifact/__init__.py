"""A model as a folder: structure as data, packed weights, a signature."""
