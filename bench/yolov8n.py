"""A network as YOLOv8n is described in public: C2f blocks of widths 16 to 256, SPPF, a pyramid up and down, and a head
of distances by bins and classes on three maps; 3.2 million parameters with 80 classes, random weights from seed 0.

Needs torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128, 256)


class Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, width_in: int, width: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(width, eps=1e-3), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, width: int, shortcut: bool):
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(width, width, 3), Conv(width, width, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Halves, one of them on through bottlenecks, all that came out on the way joined."""

    def __init__(self, width_in: int, width: int, depth: int, shortcut: bool):
        super().__init__()
        half = width // 2
        self.cv1, self.cv2 = Conv(width_in, width), Conv((2 + depth) * half, width)
        self.m = nn.ModuleList(Bottleneck(half, shortcut) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.m)
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """The same pooling three times, all joined."""

    def __init__(self, width: int):
        super().__init__()
        self.cv1, self.cv2, self.m = Conv(width, width // 2), Conv(2 * width, width), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Concat(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


class Detect(nn.Module):
    """The maps of three strides: logits of four distances by bins, then of the classes."""

    def __init__(self, classes: int, widths: tuple[int, ...], bins: int = 16):
        super().__init__()
        self.nc, self.nl, self.reg_max, self.stride = classes, len(widths), bins, torch.tensor([8.0, 16.0, 32.0])
        sides, kinds = max(16, widths[0] // 4, 4 * bins), max(widths[0], min(classes, 100))
        self.cv2, self.cv3 = (
            nn.ModuleList(
                nn.Sequential(Conv(one, width, 3), Conv(width, width, 3), nn.Conv2d(width, end, 1)) for one in widths
            )
            for width, end in ((sides, 4 * bins), (kinds, classes))
        )

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [torch.cat([box(one), kind(one)], 1) for one, box, kind in zip(x, self.cv2, self.cv3)]


class Yolov8n(nn.Module):
    """Layers by number, each of which says where its input comes from (``f``)."""

    def __init__(self, classes: int = 80, size: int = 640):
        super().__init__()
        a, b, c, d, e = WIDTHS
        layers: list[tuple[int | list[int], nn.Module]] = [
            (-1, Conv(3, a, 3, 2)), (-1, Conv(a, b, 3, 2)), (-1, C2f(b, b, 1, True)), (-1, Conv(b, c, 3, 2)),
            (-1, C2f(c, c, 2, True)), (-1, Conv(c, d, 3, 2)), (-1, C2f(d, d, 2, True)), (-1, Conv(d, e, 3, 2)),
            (-1, C2f(e, e, 1, True)), (-1, SPPF(e)), (-1, nn.Upsample(None, 2, "nearest")), ([-1, 6], Concat()),
            (-1, C2f(e + d, d, 1, False)), (-1, nn.Upsample(None, 2, "nearest")), ([-1, 4], Concat()),
            (-1, C2f(d + c, c, 1, False)), (-1, Conv(c, c, 3, 2)), ([-1, 12], Concat()), (-1, C2f(c + d, d, 1, False)),
            (-1, Conv(d, d, 3, 2)), ([-1, 9], Concat()), (-1, C2f(d + e, e, 1, False)),
            ([15, 18, 21], Detect(classes, (c, d, e))),
        ]  # fmt: skip
        for number, (source, layer) in enumerate(layers):
            layer.f, layer.i = source, number  # type: ignore[assignment]
        self.model, self.args = nn.Sequential(*(layer for _, layer in layers)), {"imgsz": size}

    def forward(self, x: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        value: Tensor | list[Tensor] = x
        for layer in self.model:
            if layer.f != -1:
                value = [seen[-1] if place == -1 else seen[place] for place in layer.f]  # type: ignore[union-attr]
            value = layer(value)
            seen.append(value)  # type: ignore[arg-type]
        return value  # type: ignore[return-value]


def yolov8n(size: int = 640) -> Yolov8n:
    """In eval mode, with weights from seed 0 and statistics that a trained network's norms could have."""
    torch.manual_seed(0)
    network = Yolov8n(size=size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
    return network.eval()
