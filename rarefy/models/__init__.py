"""Where a model comes from: libraries, files, functions."""
