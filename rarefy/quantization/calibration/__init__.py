"""Rules that choose the range a grid covers, one a file.

A rule has two methods, both vectorised:

    activation_range(histogram, grid) -> (lo, hi)    from the streamed histogram of a tensor (``observers.Histogram``)
    weight_scale(rows, grid) -> scale (n,)            from the weights of n channels, rows: (n, elements)
"""
