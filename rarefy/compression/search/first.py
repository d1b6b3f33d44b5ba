"""Where a search begins: widths for a given cost, before anything is trained.

    minimise  sum_f e_f(w_f)    such that   sum_f c_f(w_f) <= budget        (HiGHS; e measured, c linear about the
    whole)

The cost of a network is no sum over its families (a layer's time is a product of what it reads and makes), so the
budget
of the program is bisected until the table's own cost of what it chose is the wanted one.

Nor do errors add up, so the program's answer is where **level switches** begin (EvoPress, arXiv 2410.14649): a family
goes
up a width, others down until the cost is the wanted one again; of a handful of such offspring those with the least
error
of the whole network's answers on a few images are looked at on more (growing data), and the best goes on, if it is
better
than its parent. Nothing is trained meanwhile: an offspring costs one cut and a pass over the images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rarefy.compression.search.profile import Network, Profile
from rarefy.compression.search.space import widths_of
from rarefy.errors import InputError
from rarefy.quantization.mixed_precision import program

HALVINGS = 12  # of the program's budget
GENERATIONS, OFFSPRING, SURVIVORS = 5, 6, 2
SHARES = (0.25, 1.0)  # of the images: of the first look at an offspring, and of the second
SLACK = 0.02  # above the wanted cost, in shares of what pruning can save

Levels = tuple[int, ...]


def planned(profile: Profile, cost: float) -> Levels:
    """The widths with least sum of errors whose cost, in shares of the whole network's, is at most ``cost``."""
    if cost >= 1 or not profile.families:
        return profile.whole
    costs = []
    for index in range(len(profile.families)):
        row = [profile.cost(_at(profile.whole, index, level)) for level in range(len(profile.families[index].widths))]
        costs.append([max(one - min(row), 0.0) for one in row])
    low, high, best = 0.0, sum(map(max, costs)), tuple([0] * len(costs))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            levels = tuple(program([list(row) for row in profile.errors], costs, max(middle, 1e-9)))
        except InputError:  # HiGHS found none in its time
            low = middle
            continue
        if profile.cost(levels) <= cost:
            best, low = levels, middle
        else:
            high = middle
    return best


def refined(profile: Profile, network: Network, levels: Levels, seed: int) -> Levels:
    """Widths of about the same cost and a smaller error of the answers, by level switches."""
    random, cap = np.random.default_rng(seed), cap_of(profile, levels)
    few, all_of_them = (max(2, round(share * len(network.images))) for share in SHARES)

    def error(one: Levels, count: int) -> float:
        return network.error(widths_of(profile.families, one), count)

    best, least = levels, error(levels, all_of_them)
    for _ in range(GENERATIONS if len(levels) > 1 and levels != profile.whole else 0):
        offspring = {switched(profile, best, cap, random) for _ in range(OFFSPRING)} - {best}
        near = sorted(offspring, key=lambda one: (error(one, few), one))[:SURVIVORS]
        for one in near:
            if (found := error(one, all_of_them)) < least:
                best, least = one, found
    return best


def cap_of(profile: Profile, levels: Levels) -> float:
    """What refined widths may cost."""
    return profile.cost(levels) + SLACK * (1 - profile.cost([0] * len(levels)))


def switched(profile: Profile, levels: Levels, cap: float, random: np.random.Generator, steps: int = 1) -> Levels:
    """A family up, others down until the cost is at most ``cap``."""
    child, count = list(levels), len(levels)
    up = -1
    for _ in range(steps):
        able = [index for index in range(count) if child[index] < profile.whole[index]]
        if able:
            up = int(random.choice(able))
            child[up] += 1
    while profile.cost(child) > cap:
        able = [index for index in range(count) if child[index] > 0 and index != up]
        if not able:
            return levels
        child[int(random.choice(able))] -= 1
    return tuple(child)


def _at(levels: Sequence[int], index: int, level: int) -> list[int]:
    return [*levels[:index], level, *levels[index + 1 :]]
