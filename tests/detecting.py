"""Detectors of the tests, each the smallest that ends as its family does, on a pyramid of a few channels."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


def step(width_in: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


class Pyramid(nn.Module):
    """(N, 3, H, W) -> maps of strides 8, 16, 32, each with what the next one says added to it."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Sequential(step(3, width, 2), step(width, width, 2))
        self.stages = nn.ModuleList([step(width, width, 2), step(width, 2 * width, 2), step(2 * width, 3 * width, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(times * width, width, 1) for times in (1, 2, 3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage, lateral in zip(self.stages, self.lateral):
            x = stage(x)
            maps.append(lateral(x))
        for above, below in ((2, 1), (1, 0)):
            maps[below] = maps[below] + F.interpolate(maps[above], scale_factor=2.0, mode="nearest")
        return maps


class Levels(nn.Module):
    """A pyramid, and of each of its maps a branch of a few channels to each of ``ends``."""

    def __init__(self, ends: list[int], width: int = 8):
        super().__init__()
        self.pyramid = Pyramid(width)
        self.branches = nn.ModuleList(
            nn.ModuleList(nn.Sequential(step(width, width), nn.Conv2d(width, end, 1)) for end in ends) for _ in range(3)
        )

    def levels(self, x: Tensor) -> list[list[Tensor]]:
        return [[one(level) for one in branch] for level, branch in zip(self.pyramid(x), self.branches)]


class GridHead(Levels):
    """As YOLOX exports: (N, places, 5 + classes)."""

    def __init__(self, classes: int = 3, width: int = 8):
        super().__init__([4, 1, classes], width)

    def forward(self, x: Tensor) -> Tensor:
        maps = [torch.cat([a, b.sigmoid(), c.sigmoid()], 1) for a, b, c in self.levels(x)]
        return torch.cat([one.flatten(2) for one in maps], 2).permute(0, 2, 1)


class BinHead(Levels):
    """As NanoDet exports: classes of three strides, then distances of these; or all in one."""

    def __init__(self, classes: int = 3, bins: int = 8, joined: bool = False, width: int = 8):
        super().__init__([classes, 4 * bins], width)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        pairs = [(a.sigmoid().flatten(2), b.flatten(2)) for a, b in self.levels(x)]
        if self.joined:
            return torch.cat([torch.cat(pair, 1) for pair in pairs], 2).permute(0, 2, 1)
        return tuple(pair[part].permute(0, 2, 1) for part in (0, 1) for pair in pairs)


class SoftmaxHead(nn.Module):
    """As FastestDet: (N, 5 + classes, rows, columns) of one stride."""

    def __init__(self, classes: int = 3, width: int = 8):
        super().__init__()
        self.pyramid = Pyramid(width)
        self.branches = nn.ModuleList(
            nn.Sequential(step(width, width), nn.Conv2d(width, end, 1), nn.BatchNorm2d(end)) for end in (1, 4, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        level = self.pyramid(x)[1]
        found, box, kind = (branch(level) for branch in self.branches)
        return torch.cat([found.sigmoid(), box, kind.softmax(1)], 1)


class Backbone(nn.Module):
    """A pyramid as torchvision's detectors take it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.out_channels = width
        self.pyramid = Pyramid(width)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(place), level) for place, level in enumerate(self.pyramid(x)))


def torchvision_detector(name: str, classes: int = 3) -> nn.Module:
    """Of torchvision's class: labels 1 to ``classes``, heads that say something, pictures of 96 to 128 pixels."""
    tv = torchvision.models.detection
    sizes = {"min_size": 96, "max_size": 128}
    three = (((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    anchors = tv.anchor_utils.AnchorGenerator
    if name == "ssd":
        boxes = tv.anchor_utils.DefaultBoxGenerator([[2], [2, 3], [2]], steps=[8, 16, 32])
        head = tv.ssd.SSDHead([8] * 3, boxes.num_anchors_per_location(), classes + 1)
        model = tv.ssd.SSD(Backbone(), boxes, (96, 64), classes + 1, head=head)
    elif name == "retinanet":
        model = tv.RetinaNet(Backbone(), classes + 1, anchor_generator=anchors(*three), **sizes)
    elif name == "fcos":
        generator = anchors(((8,), (16,), (32,)), ((1.0,),) * 3)
        model = tv.FCOS(Backbone(64), classes + 1, anchor_generator=generator, **sizes)
    else:
        crops = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], 3, 2)
        model = tv.FasterRCNN(
            Backbone(), rpn_anchor_generator=anchors(*three), box_roi_pool=crops,
            box_head=tv.faster_rcnn.TwoMLPHead(8 * 9, 16),
            box_predictor=tv.faster_rcnn.FastRCNNPredictor(16, classes + 1), **sizes,
        )  # fmt: skip
    for part, value in model.named_parameters():
        if "head" in part and value.dim() == 4:
            nn.init.kaiming_normal_(value)
        elif part.endswith("cls_logits.bias"):
            nn.init.zeros_(value)
    return model.eval()


class Block(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, width_in: int, width: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn, self.act = nn.BatchNorm2d(width), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, width: int, shortcut: bool):
        super().__init__()
        self.one, self.two, self.shortcut = Block(width, width, 3), Block(width, width, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x)) if self.shortcut else self.two(self.one(x))


class C3(nn.Module):
    """Two paths, one of them through bottlenecks, joined."""

    def __init__(self, width: int, shortcut: bool):
        super().__init__()
        half = width // 2
        self.a, self.b, self.join = Block(width, half), Block(width, half), Block(2 * half, width)
        self.inner = nn.Sequential(Bottleneck(half, shortcut), Bottleneck(half, shortcut))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.inner(self.a(x)), self.b(x)], 1))


class C2f(nn.Module):
    """Halves, one of them on through blocks, all that came out on the way joined; of v11 the blocks are C3."""

    def __init__(self, width_in: int, width: int, shortcut: bool = True, deep: bool = False):
        super().__init__()
        self.half = width // 2
        self.open, self.join = Block(width_in, 2 * self.half), Block(3 * self.half, width)
        self.blocks = nn.ModuleList([C3(self.half, shortcut) if deep else Bottleneck(self.half, shortcut)])

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.open(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.join(torch.cat(parts, 1))


class SPPF(nn.Module):
    """The same pooling again and again, all joined."""

    def __init__(self, width: int):
        super().__init__()
        self.open, self.join, self.pool = Block(width, width // 2), Block(2 * width, width), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.open(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.join(torch.cat(parts, 1))


class Attention(nn.Module):
    """Of places, of few heads, with a depthwise convolution of the values for where they are."""

    def __init__(self, width: int, heads: int = 2):
        super().__init__()
        self.heads, self.key, self.value = heads, width // heads // 2, width // heads
        self.qkv = nn.Conv2d(width, width + 2 * self.key * heads, 1)
        self.place, self.out = nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(x).view(n, self.heads, 2 * self.key + self.value, h * w)
        q, k, v = qkv.split([self.key, self.key, self.value], 2)
        weights = ((q.transpose(-2, -1) @ k) * self.key**-0.5).softmax(-1)
        y = (v @ weights.transpose(-2, -1)).view(n, c, h, w)
        return x + self.out(y + self.place(v.reshape(n, c, h, w)))


class Detect(nn.Module):
    """Distances by bins and classes of three maps; in eval mode decoded, and the maps beside."""

    def __init__(self, classes: int, widths: list[int], bins: int = 16):
        super().__init__()
        self.nc, self.nl, self.reg_max, self.stride = classes, len(widths), bins, torch.tensor([8.0, 16.0, 32.0])
        self.cv2 = nn.ModuleList(
            nn.Sequential(Block(one, 16, 3), Block(16, 16, 3), nn.Conv2d(16, 4 * bins, 1)) for one in widths
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(Block(one, one, 3, 1, one), Block(one, 16), nn.Conv2d(16, classes, 1)) for one in widths
        )

    def forward(self, x: list[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        maps = [torch.cat([self.cv2[place](one), self.cv3[place](one)], 1) for place, one in enumerate(x)]
        if self.training:
            return maps
        boxes = []
        for one, stride in zip(maps, self.stride.tolist(), strict=True):
            n, _, h, w = one.shape
            bins = one[:, : 4 * self.reg_max].view(n, 4, self.reg_max, h * w).softmax(2)
            far = (bins * torch.arange(float(self.reg_max)).view(1, 1, -1, 1)).sum(2)
            y, x_ = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            middle = torch.stack([x_.flatten(), y.flatten()])
            low, high = middle - far[:, :2], middle + far[:, 2:]
            boxes.append(torch.cat([(low + high) / 2, high - low], 1) * stride)
        scores = torch.cat([one[:, 4 * self.reg_max :].flatten(2) for one in maps], 2).sigmoid()
        return torch.cat([torch.cat(boxes, 2), scores], 1), maps


class Numbered(nn.Module):
    """Layers by number, each of which says where its input comes from (``f``), as models from a yaml file are."""

    def __init__(self, classes: int = 3, width: int = 16, deep: bool = False):
        super().__init__()
        w = width
        layers: list[tuple[int | list[int], nn.Module]] = [
            (-1, Block(3, w, 3, 2)), (-1, Block(w, w, 3, 2)), (-1, C2f(w, w, deep=deep)), (-1, Block(w, 2 * w, 3, 2)),
            (-1, C2f(2 * w, 2 * w, deep=deep)), (-1, Block(2 * w, 2 * w, 3, 2)), (-1, C2f(2 * w, 2 * w, deep=deep)),
            (-1, Block(2 * w, 4 * w, 3, 2)), (-1, SPPF(4 * w)), (-1, Attention(4 * w) if deep else nn.Identity()),
            (-1, nn.Upsample(scale_factor=2.0)), ([-1, 6], Joined()), (-1, C2f(6 * w, 2 * w, False)),
            (-1, nn.Upsample(scale_factor=2.0)), ([-1, 4], Joined()), (-1, C2f(4 * w, 2 * w, False)),
            (-1, Block(2 * w, 2 * w, 3, 2)), ([-1, 12], Joined()), (-1, C2f(4 * w, 2 * w, False)),
            (-1, Block(2 * w, 2 * w, 3, 2)), ([-1, 9], Joined()), (-1, C2f(6 * w, 4 * w, False)),
            ([15, 18, 21], Detect(classes, [2 * w, 2 * w, 4 * w])),
        ]  # fmt: skip
        for number, (source, layer) in enumerate(layers):
            layer.f, layer.i = source, number
        self.model = nn.Sequential(*(layer for _, layer in layers))
        self.names, self.args = {place: str(place) for place in range(classes)}, {"imgsz": 64}

    def forward(self, x: Tensor) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []
        for layer in self.model:
            if layer.f != -1:
                x = [x if place == -1 else seen[place] for place in layer.f]
            x = layer(x)
            seen.append(x)
        return x


class Joined(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


class AnchorDetect(nn.Module):
    """Objectness and classes of three anchors on three maps; in eval mode decoded, and the maps beside."""

    def __init__(self, classes: int, widths: list[int]):
        super().__init__()
        self.nc, self.no, self.nl, self.na = classes, classes + 5, len(widths), 3
        self.stride = torch.tensor([8.0, 16.0, 32.0])
        sides = torch.tensor([[8.0, 8], [12, 20], [20, 12]]) * torch.tensor([1.0, 2, 3])[:, None, None]
        self.register_buffer("anchors", sides / self.stride.view(-1, 1, 1))
        self.m = nn.ModuleList(nn.Conv2d(one, 3 * self.no, 1) for one in widths)

    def maps(self, x: list[Tensor]) -> list[Tensor]:
        for place in range(self.nl):
            x[place] = self.m[place](x[place])
        return x

    def forward(self, x: list[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        found = []
        x = self.maps(x)
        for place in range(self.nl):
            n, _, h, w = x[place].shape
            x[place] = x[place].view(n, self.na, self.no, h, w).permute(0, 1, 3, 4, 2).contiguous()
            if not self.training:
                rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
                grid = torch.stack([columns, rows], 2).view(1, 1, h, w, 2) - 0.5
                anchor = (self.anchors[place] * self.stride[place]).view(1, self.na, 1, 1, 2)
                xy, wh, sure = x[place].sigmoid().split((2, 2, self.nc + 1), 4)
                one = torch.cat([(xy * 2 + grid) * self.stride[place], (wh * 2) ** 2 * anchor, sure], 4)
                found.append(one.view(n, self.na * h * w, self.no))
        return x if self.training else (torch.cat(found, 1), x)


class Added(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.implicit = nn.Parameter(0.02 * torch.randn(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.implicit + x


class Times(Added):
    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.implicit) * x


class IAnchorDetect(AnchorDetect):
    """With something learned that is added before and multiplied behind each convolution."""

    def __init__(self, classes: int, widths: list[int]):
        super().__init__(classes, widths)
        self.ia = nn.ModuleList(Added(one) for one in widths)
        self.im = nn.ModuleList(Times(3 * self.no) for _ in widths)

    def maps(self, x: list[Tensor]) -> list[Tensor]:
        for place in range(self.nl):
            x[place] = self.im[place](self.m[place](self.ia[place](x[place])))
        return x


class Elan(nn.Module):
    """Two paths, one of them through two blocks, all that came out on the way joined."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        half = width // 2
        self.a, self.b = Block(width_in, half), Block(width_in, half)
        self.one, self.two, self.join = Block(half, half, 3), Block(half, half, 3), Block(4 * half, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.a(x), self.b(x)]
        parts.append(self.one(parts[-1]))
        parts.append(self.two(parts[-1]))
        return self.join(torch.cat(parts[::-1], 1))


class Smaller(nn.Module):
    """Half the side, by pooling and by a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.pool, self.a = nn.MaxPool2d(2, 2), Block(width, width // 2)
        self.b, self.down = Block(width, width // 2), Block(width // 2, width // 2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.down(self.b(x)), self.a(self.pool(x))], 1)


class Rep(nn.Module):
    """A 3x3 and a 1x1 convolution, and the input itself, each normalised, as long as it is trained."""

    def __init__(self, width: int):
        super().__init__()
        self.dense, self.point = (
            nn.Sequential(nn.Conv2d(width, width, kernel, 1, kernel // 2, bias=False), nn.BatchNorm2d(width))
            for kernel in (3, 1)
        )
        self.same, self.act = nn.BatchNorm2d(width), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x) + self.point(x) + self.same(x))


class AnchorNumbered(Numbered):
    """As v5 ends; ``seven``: with v7's blocks and its head."""

    def __init__(self, classes: int = 3, width: int = 16, seven: bool = False):
        nn.Module.__init__(self)
        w = width
        if seven:
            layers: list[tuple[int | list[int], nn.Module]] = [
                (-1, Block(3, w, 3, 2)), (-1, Block(w, w, 3, 2)), (-1, Elan(w, 2 * w)), (-1, Smaller(2 * w)),
                (-1, Elan(2 * w, 2 * w)), (-1, Smaller(2 * w)), (-1, Elan(2 * w, 2 * w)), (-1, Smaller(2 * w)),
                (-1, SPPF(2 * w)), (-1, nn.Upsample(None, 2, "nearest")), ([-1, 6], Joined()), (-1, Elan(4 * w, 2 * w)),
                (-1, nn.Upsample(None, 2, "nearest")), ([-1, 4], Joined()), (-1, Elan(4 * w, 2 * w)), (-1, Rep(2 * w)),
                ([15, 11, 8], IAnchorDetect(classes, [2 * w] * 3)),
            ]  # fmt: skip
        else:
            layers = [
                (-1, Block(3, w, 3, 2)), (-1, Block(w, w, 3, 2)), (-1, C3(w, True)), (-1, Block(w, 2 * w, 3, 2)),
                (-1, C3(2 * w, True)), (-1, Block(2 * w, 2 * w, 3, 2)), (-1, C3(2 * w, True)),
                (-1, Block(2 * w, 2 * w, 3, 2)), (-1, SPPF(2 * w)), (-1, Block(2 * w, w)),
                (-1, nn.Upsample(None, 2, "nearest")), ([-1, 6], Joined()), (-1, Block(3 * w, 2 * w)),
                (-1, C3(2 * w, False)), (-1, Block(2 * w, w)), (-1, nn.Upsample(None, 2, "nearest")),
                ([-1, 4], Joined()), (-1, Block(3 * w, 2 * w)), (-1, C3(2 * w, False)),
                ([18, 13, 8], AnchorDetect(classes, [2 * w] * 3)),
            ]  # fmt: skip
        for number, (source, layer) in enumerate(layers):
            layer.f, layer.i = source, number
        self.model = nn.Sequential(*(layer for _, layer in layers))
        self.names, self.args = {place: str(place) for place in range(classes)}, {"imgsz": 64}
