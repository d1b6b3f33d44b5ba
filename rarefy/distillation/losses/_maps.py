"""What losses on features share: a projection of the student's channels to the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from rarefy.distillation.objective import Shapes


class Projection(nn.Module):
    """1x1: a linear map of the channels, the same at every position."""

    def __init__(self, shapes: Shapes):
        super().__init__()
        self.maps = nn.ModuleDict(
            {name: _BY_RANK[len(ours)](ours[0], theirs[0]) for name, (ours, theirs) in shapes.items()}
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.maps[name](value) if name in self.maps else value for name, value in features.items()}


def projection(shapes: Shapes) -> nn.Module | None:
    """For the features whose channels differ; None where none do."""
    differ = {name: pair for name, pair in shapes.items() if pair[0][0] != pair[1][0]}
    return Projection(differ) if differ else None


# (channels), (channels, positions), (channels, height, width)
_BY_RANK: dict[int, Callable[[int, int], nn.Module]] = {
    1: nn.Linear,
    2: lambda ours, theirs: nn.Conv1d(ours, theirs, 1),
    3: lambda ours, theirs: nn.Conv2d(ours, theirs, 1),
}
