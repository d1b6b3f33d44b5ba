"""Rules that turn scaled weights into codes, one a file: ``codes(scaled, grid, generator) -> codes`` with scaled = w / s + z."""
