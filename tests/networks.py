"""Networks of the tests, each the smallest that has what its name says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from rarefy.graph.capture import capture


class ConvNormLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.linear = nn.Linear(2, 3)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))


class PooledResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.one, self.two = nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.Conv2d(16, 12, 1)
        self.skip = nn.AvgPool2d(2)
        self.out = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        return self.out((self.skip(y) + self.two(self.one(y).relu())).relu().mean((2, 3)))


class Encoders(nn.Module):
    """Tokens through three pre-norm (or post-norm) blocks."""

    def __init__(self, post: bool = False):
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 2, 2)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=not post)
                for _ in range(3)
            )
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


class DenselyConnected(nn.Module):
    """Every layer adds channels: no block can leave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 + 4 * index, 4, 3, padding=1) for index in range(3))
        self.head = nn.Linear(13, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat((x, layer(x).relu()), 1)
        return self.head(x.mean((2, 3)))


class OfParameters(nn.Module):
    """A function of the input and of a few parameters (a: vectors of the channels; w: a matrix)."""

    def __init__(self, function: Callable[..., Tensor], shape: tuple[int, ...]):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Parameter(torch.randn(shape[0])), nn.Parameter(torch.rand(shape[0]))
        self.w = nn.Parameter(torch.randn(shape[-1], shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self)


class ResidualUnit(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.one, self.norm, self.two = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.two(self.norm(self.one(x)).relu())).relu()


class TwoStages(nn.Module):
    """Normalises its input, then two stages of residual blocks."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first = nn.Sequential(*(ResidualUnit(width) for _ in range(blocks)))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.side = nn.Conv2d(width, 2 * width, 1, stride=2)
        self.second = nn.Sequential(*(ResidualUnit(2 * width) for _ in range(blocks)))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x - self.mean))
        x = self.second(self.down(x.relu()) + self.side(x))
        return self.head(self.drop(x.mean((2, 3))))


class TokenStages(nn.Module):
    """A tiny transformer: one resolution."""

    def __init__(self, depth: int):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class GateOnTwoGrids(nn.Module):
    """A gate read on two grids, an addition, a concatenation, codes that are padded and pooled, a layer that narrow
    files widen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.left = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.right = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.left(x)
        z = (self.right(y) + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).relu()
        z = torch.cat([z, nn.functional.max_pool2d(x, 2)], 1)
        return self.head(nn.functional.avg_pool2d(z, 2).flatten(1))


class DepthwiseWithToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.depthwise = (
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=8),
        )
        self.token, self.mix, self.head = nn.Parameter(torch.randn(8, 4, 4)), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.norm(self.conv(x)).relu()) + self.token
        return self.head(self.mix(x.mean((2, 3))))


class Lookup(nn.Module):
    """Answers image i with row i of ``logits``."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits[(inputs[:, 0, 0, 0] * 255).round().long()]


class BehindLayer(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step, self.layer = step, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.layer(x))


class WithParts(nn.Module):
    """A step with a parameter, a buffer and three layers at hand."""

    def __init__(self, step: Callable[[WithParts, Tensor], Tensor]) -> None:
        super().__init__()
        self.step, self.table = step, nn.Parameter(torch.randn(6, 4, 3, 3))
        self.register_buffer("mask", torch.randn(6) > 0)
        self.conv, self.norm, self.other = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)
        for norm in (self.norm, self.other):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


class Pools(nn.Module):
    """Layers whose sums are rounded, one padded, averages over windows and the plane, a sum, numbers at last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.avg_pool2d(self.a(x).relu(), 2)
        y = nn.functional.pad(self.b(x).relu(), (2, 0, 2, 0))
        return self.c((x + y).mean((2, 3)))


class Stepwise(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)


class Creates(nn.Module):
    """Tensors made of nothing, on a device and of a type that the trace names; sizes, lists and numbers as values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x)).relu()
        y = y + torch.arange(y.shape[-1]).to(torch.float32) * torch.ones(1, 1, 1, 1) + torch.zeros_like(y)
        first, second = y.chunk(2, 1)
        return (first * second).flatten(1), torch.full((2,), 3.0).expand(x.shape[0], 2).long()


class UnboundAttention(nn.Module):
    """Queries, keys and values as timm cuts them; one operator of attention, with a mask that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("mask", torch.linspace(-1, 0, 6 * 6).view(1, 1, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        answer: Tensor = self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2)
        )
        return answer


class ChunkedAttention(nn.Module):
    """The three are parts of one tensor, and the products are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        attention = ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1)
        answer: Tensor = self.out((attention @ v).transpose(1, 2).flatten(2))
        return answer


class Wired(nn.Module):
    """A network from its layers and a function of (self, x)."""

    def __init__(self, forward, **layers):  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class FusedAttention(nn.Module):
    """timm's way: fused qkv, heads by reshape."""

    def __init__(self, dim: int, heads: int, fused: bool = True):
        super().__init__()
        self.heads, self.fused, self.scale = heads, fused, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        plain = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        x = F.scaled_dot_product_attention(q, k, v) if self.fused else plain
        return self.proj(x.transpose(1, 2).reshape(n, tokens, dim))


class VitTokens(nn.Module):
    """Patches, class token, position embedding, one block with layer norms, layer scale, head on the class token."""

    def __init__(self, attention: nn.Module, dim: int = 12):
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, dim, 4, 4), attention
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 5, dim))
        self.norm1, self.norm2, self.gamma = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Parameter(torch.randn(dim))
        self.up, self.down, self.head = nn.Linear(dim, 20), nn.Linear(20, dim), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.position
        x = x + self.gamma * self.attention(self.norm1(x))
        return self.head((x + self.down(F.gelu(self.up(self.norm2(x)))))[:, 0])


class Multihead(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.inner = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class GroupedQueries(nn.Module):
    """Grouped-query attention: 4 query heads share 2 of keys and values."""

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v, self.proj = nn.Linear(dim, 16), nn.Linear(dim, 8), nn.Linear(dim, 8), nn.Linear(16, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = (layer(x).view(n, tokens, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(x.transpose(1, 2).flatten(2))


class Sorted(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.sort(0)[0].sort(1)[0]


class WeightNormed(nn.Module):
    """Layers under weight norm, one of them run twice; directions and length of the last by hand, the length read once
    more."""

    def __init__(self, norm) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.first, self.twice = norm(nn.Conv2d(3, 8, 3)), norm(nn.Conv2d(8, 8, 3))
        self.last = norm(nn.ConvTranspose2d(8, 6, 3), dim=1)
        self.head = nn.Linear(6, 5, bias=False)
        self.v, self.g = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.rand(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        side = F.linear(x.mean((2, 3)), torch._weight_norm(self.v, self.g)) * self.g[:, 0]
        return self.head(self.last(self.twice(self.twice(self.first(x)).relu()).relu()).mean((2, 3))) + side


class ThreeConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(layer for _ in range(3) for layer in (nn.LazyConv2d(64, 3, padding=1), nn.ReLU())))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


class EveryConvolution(nn.Module):
    """A strided, a grouped, a depthwise, a dilated and a transposed convolution, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 18, 3, padding=1, groups=3, bias=False)
        self.depthwise = nn.Conv2d(18, 18, 3, padding=2, dilation=2, groups=18)
        self.up = nn.ConvTranspose2d(18, 7, 2, stride=2)
        self.out = nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(self.norm(self.first(x)).relu()).relu()
        return self.out(self.up(self.depthwise(y)).relu().mean((2, 3)))


class EveryShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.batch_norm = nn.Linear(12, 12), nn.LayerNorm(12), nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 12, 1, groups=3)
        self.pointwise, self.bias = nn.Conv2d(3, 12, 1), nn.Parameter(torch.randn(12, 1, 1))
        self.matrix = nn.Parameter(torch.randn(12, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.gelu(self.batch_norm(self.grouped(self.pointwise(x))) + self.bias)
        x = x * F.adaptive_avg_pool2d(x, 1)
        tokens = self.norm(self.linear(x.flatten(2).transpose(1, 2)))
        heads = tokens.view(tokens.shape[0], 30, 3, 4).permute(0, 2, 1, 3)
        heads = F.scaled_dot_product_attention(heads, heads, heads)
        one, two = torch.cat((heads, heads * 2), 3).softmax(-1).split([3, 5], 3)
        x = torch.einsum("nhtd,nhte->nhde", one, two) @ two.transpose(2, 3)
        return (x[:, :, 1:, 2:9], tokens @ self.matrix)


class CifarBlock(nn.Module):
    """He's block for CIFAR, with the padded shortcut (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(out + x)


class WithoutAuxiliary(nn.Module):
    """GoogLeNet and Inception without their auxiliary heads."""

    def __init__(self, name: str):
        super().__init__()
        self.model = torchvision.models.get_model(name, weights=None, aux_logits=False, init_weights=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Turned(nn.Module):
    """Two convolutions with the image turned between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).transpose(2, 3))


class RepairedStream(nn.Module):
    """A residual stream, a grouped and a depthwise convolution, biases with and without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.bn1 = nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24)
        self.depth, self.bn2 = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.bn3 = nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24)
        self.grouped = nn.Conv2d(24, 32, 3, 1, "same", dilation=2, groups=4)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(F.relu(self.bn0(self.stem(x))))))
        x = x + self.bn3(self.conv2(F.relu(self.bn2(self.depth(x)))))
        return self.head(F.relu(self.grouped(x)).mean((2, 3)))


class PlainUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.second(self.first(x).relu())).relu()


class TwoUnits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = (
            nn.Conv2d(3, 12, 3, 1, 1),
            PlainUnit(12),
            PlainUnit(12),
            nn.Linear(12, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(self.stem(x).relu())).mean((2, 3)))


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.wide, self.narrow, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
        return self.head(x.mean(1))


class Bottlenecks(nn.Module):
    """Two linear bottlenecks, one added to the other; ReLU6 within, as in MobileNetV2.

    Channels of what is added differ by ``unlike`` to either side.
    """

    def __init__(self, unlike: float = 1.0):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.expand = nn.ModuleList([nn.Conv2d(16, 32, 1), nn.Conv2d(16, 32, 1)])
        self.deep = nn.ModuleList(
            [nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 32, 3, padding=1, groups=32)]
        )
        self.project = nn.ModuleList([nn.Conv2d(32, 16, 1), nn.Conv2d(32, 16, 1)])
        self.head = nn.Conv2d(16, 24, 1)
        self.fc = nn.Linear(24, 10)
        scale = torch.logspace(-math.log10(unlike), math.log10(unlike), 16)
        with torch.no_grad():
            for maker in (self.stem, *self.project):
                maker.weight.mul_(3 * scale.view(-1, 1, 1, 1))
                maker.bias.mul_(3 * scale)
            for reader in (*self.expand, self.head):
                reader.weight.div_(scale.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for expand, deep, project in zip(self.expand, self.deep, self.project, strict=True):
            x = x + project(F.relu6(deep(F.relu6(expand(x)))))
        return self.fc(F.relu6(self.head(x)).mean((2, 3)))


class OneStream(nn.Module):
    """Of ReLUs, with a padding, pooling to one number and a linear layer behind it: all of that is one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.deep = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.one(x)), 2)
        x = F.relu(x + self.two(x))
        x = x + self.deep(F.pad(x, (1, 1, 1, 1)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class WithoutKernels(nn.Module):
    """A form without an integer kernel (an addition of a number), an operator that no runtime knows, and one whose
    source is in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)
        self.odd = nn.ConvTranspose1d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = self.inner(x) + x
        y = torch.erf(x) * (x + 0.5)
        return self.head(self.odd(y.flatten(2)).mean(2))


class AlikeStretches(nn.Module):
    """Two alike stretches of linear layers between layer norms, after a convolutional one of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.pointwise = (
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(16, 16, 3, groups=16),
            nn.Conv2d(16, 24, 1),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.first = nn.ModuleList(nn.Linear(24, 48) for _ in range(2))
        self.second = nn.ModuleList(nn.Linear(48, 24) for _ in range(2))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.depthwise(self.stem(x).relu()).relu()).flatten(2).transpose(1, 2)
        for norm, first, second in zip(self.norms, self.first, self.second, strict=True):
            x = x + second(first(norm(x)).relu())
        answer: Tensor = self.head(torch.sin(x.mean(1)))
        return answer


class IdleLayer(nn.Module):
    """A layer that hardly matters, and one whose error is all that shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.last = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Linear(16, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = x + 0.001 * self.idle(x)
        return self.last(x.mean((2, 3)))


class EveryKernel(nn.Module):
    """Every integer kernel once: residual add, concat, squeeze-excite, hardswish, pooling, ReLU6, a grouped
    convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.alone = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        gate = nn.functional.hardsigmoid(self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()))
        y = x + self.project(y * gate)
        y = torch.cat([y, nn.functional.max_pool2d(x, 3, 1, 1)], 1)
        y = self.alone(y).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


class PaddedReads(nn.Module):
    """Zeros around what convolutions read: as many on either side, and not."""

    def __init__(self, around: Sequence[int], padding: int, value: float = 0.0) -> None:
        super().__init__()
        self.conv, self.around, self.value = nn.Conv2d(3, 4, 3, padding=padding, stride=2), list(around), value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(nn.functional.pad(x, self.around, value=self.value))


class ImageAndNumbers(nn.Module):
    """An image, and numbers that go with it."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.numbers, self.head = nn.Conv2d(3, 16, 3), nn.Linear(7, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head((self.image(x).mean((2, 3)) + self.numbers(y)).relu())


class UnfoldedForms(nn.Module):
    """Convolution with stride, padding and dilation, grouped, depthwise, linear: each in its unfolded form."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 2, 2, groups=16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding="same", groups=4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class LoudNorms(nn.Module):
    """Three layers behind the first norm, one behind the second, which has no bias; the third is an answer's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.LayerNorm(32), nn.RMSNorm(32, eps=1e-6), nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.wide, self.narrow, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)
        with torch.no_grad():
            for norm in (self.first, self.second):
                norm.weight[torch.tensor([3, 17])] *= 60

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + nn.functional.scaled_dot_product_attention(self.q(y) / 30, self.k(y) / 30, self.v(y))
        x = x + self.narrow(nn.functional.gelu(self.wide(self.second(x))))
        y = self.last(x)
        answer: Tensor = self.head(y) + y[:, :, :10]
        return answer.mean(1)


class TanhNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, groups=32, bias=False)
        self.c, self.head = nn.Conv2d(32, 24, 1), nn.Linear(24, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.c(self.b(self.bn(self.a(x)).relu()))).mean((2, 3)))


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(72, 64), nn.Linear(64, 48, bias=False), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).mean(1))


class GatedWithTokens(nn.Module):
    """Hardswish, a squeeze-and-excite gate, a residual, a depthwise layer, a flattened stream of tokens with GELU and
    attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.project = nn.Conv2d(16, 16, 1)
        self.norm = nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.narrow, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.stem(x))
        y = nn.functional.relu(self.depthwise(x))
        gate = self.excite(nn.functional.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        x = x + self.project(y * nn.functional.hardsigmoid(gate))
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.narrow(nn.functional.gelu(self.wide(x)))
        answer: Tensor = self.head(x.mean(1))
        return answer


class UnevenDepthwise(nn.Module):
    """Depthwise layers of 24 channels: one gated as in MobileNetV3, one whose channels are parted and put beside
    others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (
            nn.Conv2d(3, 24, 1),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.Conv2d(8, 24, 1),
        )
        self.squeeze, self.excite, self.project = nn.Conv2d(24, 20, 1), nn.Conv2d(20, 24, 1), nn.Conv2d(24, 8, 1)
        self.last, self.head = nn.Conv2d(24, 24, 5, padding=2, groups=24), nn.Conv2d(32, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.first(nn.functional.hardswish(self.stem(x))))
        x = self.project(x * nn.functional.hardsigmoid(self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu())))
        left, right = self.last(self.second(x).relu()).chunk(2, 1)
        return self.head(torch.cat([x, right, left], 1)).mean((2, 3))


class TwoAnswers(nn.Module):
    """Two answers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Conv2d(3, 16, 3), nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x).relu().mean((2, 3))
        return self.first(x), self.second(x)


class PaddedNorm(nn.Module):
    """A norm, padded behind: OpenVINO pads the codes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.head = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.norm(x.permute(0, 2, 3, 1)), (0, 0, 0, 3, 0, 3))
        return self.head(self.one(x).relu().mean((1, 2)))


class Between(nn.Module):
    """A function of 12 channels between two convolutions.

    It is given the module, too, whose ``map`` makes one channel of one, and ``up`` enlarges each by itself.
    """

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.one, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.map = nn.Conv2d(1, 1, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 12, 2, stride=2, groups=12)
        self.head = nn.Linear(8, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self, torch.relu(self.one(x)))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Reader(nn.Module):
    """Lines of an image read by a recurrent layer: convolution, columns as steps, the last answer's class."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any):
        super().__init__()
        self.one = nn.Conv2d(1, 6, 3, padding=1)
        self.many = kind(24, 10, **{"batch_first": True, **options})
        width = (self.many.proj_size or 10) * (2 if self.many.bidirectional else 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.relu(self.one(x)).permute(0, 3, 1, 2).flatten(2)
        if self.many.batch_first:
            return self.head(self.many(steps)[0][:, -1])  # type: ignore[no-any-return]
        return self.head(self.many(steps.transpose(0, 1))[0][-1])  # type: ignore[no-any-return]


class Stepped(nn.Module):
    """A cell of a recurrent layer, step after step."""

    def __init__(self, kind: type[nn.RNNCellBase]):
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(5, 7), kind(7, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = torch.zeros(x.shape[0], 9)
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in range(x.shape[1]):
            state = self.cell(torch.relu(self.first(x[:, step])), state)
        return self.head(state[0] if isinstance(state, tuple) else state)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A recurrent layer of 12 inputs and 8 units: answers and last states.

    begins: with a state made of its input.
    """

    def __init__(self, kind: str, begins: bool = True, **options: Any):
        super().__init__()
        self.many: nn.RNNBase = getattr(nn, kind)(12, 8, batch_first=True, **options)
        self.begins = begins

    def forward(self, x: Tensor) -> list[Tensor]:
        rows = self.many.num_layers * (2 if self.many.bidirectional else 1)
        sizes = [self.many.proj_size or 8, 8][: 2 if isinstance(self.many, nn.LSTM) else 1]
        states = [x[:, :1, :size].transpose(0, 1).expand(rows, -1, -1).contiguous() for size in sizes]
        given: Any = states[0] if len(states) == 1 else tuple(states)
        answers, last = self.many(x, given if self.begins else None)
        return [answers, *(last if isinstance(last, tuple) else [last])]


class Lines(nn.Module):
    """Conv1d in its forms: padded in words, in groups, dilated, behind a pooling; a signal's class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(4, 16, 5, padding="same"),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 16, 3, padding=1, groups=16),
            nn.ReLU6(),
            nn.MaxPool1d(2),
            nn.Conv1d(16, 24, 3, stride=2, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv1d(24, 24, 1, padding="valid"),
            nn.ReLU(),
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(-1))  # type: ignore[no-any-return]


class Volumes(nn.Module):
    """Conv3d in its forms: padded in words, in groups, strided, behind a pooling; a volume's class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(2, 8, 3, padding="same"),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), groups=8),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(8, 16, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 0)),
            nn.ReLU(),
            nn.Conv3d(16, 16, 1),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3, 4)))  # type: ignore[no-any-return]


def of_one_value(value: float, width: int = 64) -> fx.GraphModule:
    """A model whose weights are all ``value``."""
    layer = nn.Linear(width, width, bias=False)
    nn.init.constant_(layer.weight, value)
    return capture(nn.Sequential(layer), torch.zeros(2, width))


def value_of(model: nn.Module) -> float:
    """The one value of all its weights; there is no second one."""
    values = torch.cat([one.detach().flatten() for one in model.parameters()]).unique()
    assert values.numel() == 1, f"mixed: {values.tolist()}"
    return float(values)
