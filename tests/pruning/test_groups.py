"""Each coupling rule on the smallest network that has it: who leaves with whom, and the cut network equals the masked
one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from coupled import classes, coupled, cut_half
from networks import FusedAttention, GroupedQueries, Multihead, Sorted, VitTokens, WeightNormed, Wired
from torch import Tensor, nn

from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.graph.nodes import attribute, set_attribute
from rarefy.pruning.groups.groups import couple
from rarefy.pruning.groups.slicing import cut
from rarefy.pruning.self_check.equivalence import check


def conv(inputs: int, outputs: int, size: int = 3, **options) -> nn.Conv2d:  # type: ignore[no-untyped-def]
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


IMAGE = torch.randn(2, 3, 8, 8)


def test_chain_ties_outputs_norm_and_next_inputs() -> None:
    found = coupled(nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4)), IMAGE)
    own = classes(found, "0.weight", 0)
    assert sorted(own) == [1, 2, 3, 4, 5, 6]
    for name, axis in (
        ("0.bias", 0),
        ("1.weight", 0),
        ("1.bias", 0),
        ("1.running_mean", 0),
        ("1.running_var", 0),
        ("3.weight", 1),
    ):
        assert classes(found, name, axis) == own
    assert classes(found, "0.weight", 1) == [0, 0, 0]
    assert classes(found, "3.weight", 0) == [0, 0, 0, 0]
    assert "output of the network" in found.frozen["3.weight"]
    cut_half(found)


def test_residual_add_ties_both_branches() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.stem(x)
        return s.head(F.relu(s.b(F.relu(s.a(x)))) + x)

    found = coupled(Wired(forward, stem=conv(3, 6), a=conv(6, 5), b=conv(5, 6), head=conv(6, 2)), IMAGE)
    stream = classes(found, "stem.weight", 0)
    assert stream == classes(found, "b.weight", 0) == classes(found, "head.weight", 1) == classes(found, "a.weight", 1)
    assert not set(classes(found, "a.weight", 0)) & set(classes(found, "stem.weight", 0))
    cut_half(found)


def test_squeeze_excite() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.stem(x)
        return s.head(x * torch.sigmoid(s.up(F.relu(s.down(x.mean((2, 3), keepdim=True))))))

    found = coupled(Wired(forward, stem=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), head=conv(8, 2)), IMAGE)
    assert classes(found, "stem.weight", 0) == classes(found, "up.weight", 0) == classes(found, "down.weight", 1)
    assert len(set(classes(found, "down.weight", 0))) == 4
    cut_half(found)


def test_cat_keeps_parts_apart() -> None:
    found = coupled(
        Wired(lambda s, x: s.head(torch.cat((s.a(x), s.b(x), x), 1)), a=conv(3, 4), b=conv(3, 5), head=conv(12, 2)),
        IMAGE,
    )
    assert classes(found, "head.weight", 1) == classes(found, "a.weight", 0) + classes(found, "b.weight", 0) + [0, 0, 0]
    cut_half(found)


def test_flatten_ties_a_channel_to_all_its_places() -> None:
    found = coupled(nn.Sequential(conv(3, 4), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(4 * 49, 3)), IMAGE)
    own = classes(found, "0.weight", 0)
    assert classes(found, "3.weight", 1) == [label for label in own for _ in range(49)]
    cut_half(found)


def test_two_axes_flattened_into_one_keep_one_of_them() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        return s.head((s.rows(x).unsqueeze(2) * s.columns(x).unsqueeze(1)).flatten(1))

    net = Wired(forward, rows=nn.Linear(3, 6), columns=nn.Linear(3, 5), head=nn.Linear(30, 2))
    found = coupled(net, torch.randn(2, 3))
    assert found.frozen["columns.weight"].startswith("two independent axes merged into one")
    own = classes(found, "rows.weight", 0)
    assert len(set(own)) == 6 and 0 not in own and set(classes(found, "columns.weight", 0)) == {0}
    assert classes(found, "head.weight", 1) == [label for label in own for _ in range(5)]
    for seed in range(3):
        cut_half(found, seed)


def test_squeeze_of_all_axes_leaves_one_that_pruning_made_of_size_one() -> None:
    net = Wired(
        lambda s, x: s.head(s.pool(s.a(x)).squeeze()), a=conv(3, 6), pool=nn.AdaptiveAvgPool2d(1), head=nn.Linear(6, 2)
    )
    found = coupled(net, IMAGE)
    own = classes(found, "a.weight", 0)
    assert own == classes(found, "head.weight", 1) and 0 not in own
    alive = torch.ones(found.count, dtype=torch.bool)
    alive[own[1:]] = False
    small = cut(found, alive)
    check(found, small, alive)
    assert small.get_parameter("head.weight").shape == (2, 1) and small(torch.randn(5, 3, 8, 8)).shape == (5, 2)


def test_what_cannot_be_cut_is_named_by_its_place() -> None:
    """Positions that survive as no rectangle, which coupling never asks for."""
    found = coupled(
        Wired(lambda s, x: s.head(s.a(x).view(x.shape[0], -1)), a=conv(3, 4), head=nn.Linear(256, 2)), IMAGE
    )
    view = next(node for node in found.graph.graph.nodes if "view" in str(node.target))
    found.values[view].layers = [torch.tensor([[0, 1, 1, 0]]).repeat(1, 64), torch.tensor([[2, 1] * 128])]
    alive = torch.ones(found.count, dtype=torch.bool)
    alive[1] = False
    with pytest.raises(InputError, match=r"view.*: an activation of shape \(1, 256\) would not stay a rectangle"):
        cut(found, alive)


def test_depthwise_with_multiplier() -> None:
    found = coupled(nn.Sequential(conv(3, 4), conv(4, 8, groups=4), conv(8, 2)), IMAGE)
    own = classes(found, "0.weight", 0)
    assert classes(found, "1.weight", 0) == [label for label in own for _ in range(2)] == classes(found, "2.weight", 1)
    small, alive = cut_half(found)
    assert tuple(small.get_parameter("1.weight").shape) == (2 * int(alive[own].sum()), 1, 3, 3)


def test_grouped_convolution_keeps_the_same_channels_in_each_group() -> None:
    found = coupled(nn.Sequential(conv(3, 8), conv(8, 12, groups=2), conv(12, 2)), IMAGE)
    own = classes(found, "0.weight", 0)
    assert own[:4] == own[4:] == classes(found, "1.weight", 1) and len(set(own)) == 4
    out = classes(found, "1.weight", 0)
    assert out[:6] == out[6:] == classes(found, "2.weight", 1)[:6] and len(set(out)) == 6
    cut_half(found)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_transposed_convolution(groups: int) -> None:
    found = coupled(nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 6, 2, 2, groups=groups), conv(6, 2)), IMAGE)
    assert classes(found, "0.weight", 0) == classes(found, "1.weight", 0)
    assert classes(found, "1.bias", 0) == classes(found, "2.weight", 1)
    own = classes(found, "1.weight", 0)
    assert 0 not in own and len(set(own)) == (3 if groups == 2 else 6)  # the same positions of each group
    if groups == 2:
        assert own[:3] == own[3:] and len(set(classes(found, "2.weight", 1))) == 3
    if groups == 6:
        assert own == classes(found, "2.weight", 1)
    cut_half(found)


def test_map_of_one_channel_ties_no_channels() -> None:
    found = coupled(
        Wired(lambda s, x: s.head(s.a(x) * torch.sigmoid(s.map(x))), a=conv(3, 6), map=conv(3, 1), head=conv(6, 2)),
        IMAGE,
    )
    assert len(set(classes(found, "a.weight", 0))) == 6
    cut_half(found)


def test_padded_shortcut_prunes_in_its_residual_stream() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.stem(x)
        return s.head(s.wide(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))

    found = coupled(Wired(forward, stem=conv(3, 4), wide=conv(4, 8, stride=2), head=conv(8, 2)), IMAGE)
    wide = classes(found, "wide.weight", 0)
    assert wide[2:6] == classes(found, "stem.weight", 0) and len(set(wide)) == 8
    for seed in range(4):
        cut_half(found, seed)


def shuffled(x: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    rows = x.view(n, blocks, c // blocks, h, w)
    return rows, rows.transpose(1, 2).contiguous().view(n, c, h, w)


@pytest.mark.parametrize("shuffle", [lambda x: shuffled(x, 2)[1], nn.ChannelShuffle(2)], ids=["views", "operator"])
def test_channel_shuffle_ties_nothing(shuffle) -> None:  # type: ignore[no-untyped-def]
    found = coupled(Wired(lambda s, x: s.head(shuffle(s.stem(x))), stem=conv(3, 8), head=conv(8, 2)), IMAGE)
    own = classes(found, "stem.weight", 0)
    assert len(set(own)) == 8
    assert classes(found, "head.weight", 1) == [own[place] for place in (0, 4, 1, 5, 2, 6, 3, 7)]
    for seed in range(3):
        cut_half(found, seed)


def test_blocks_that_are_looked_at_keep_equal_counts() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        rows, x = shuffled(s.stem(x), 2)
        return s.head(x) + rows.mean((2, 3, 4)).sum(1)[:, None, None, None]

    found = coupled(Wired(forward, stem=conv(3, 8), head=conv(8, 2)), IMAGE)
    own = classes(found, "stem.weight", 0)
    assert own[:4] == own[4:] and len(set(own)) == 4
    assert classes(found, "head.weight", 1) == [label for label in own[:4] for _ in range(2)]
    cut_half(found)


def test_views_that_mix_the_batch_are_no_shuffle() -> None:
    """At a batch of one this is a permutation of the channels, at two it is not."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.stem(x)
        n, c, h, w = x.shape
        return s.head(x.reshape(n * 2, c // 2, h * w).transpose(0, 1).reshape(n, c, h, w))

    graph = capture(Wired(forward, stem=conv(3, 8), head=conv(8, 2)), IMAGE)
    assert couple(graph).graph is graph


def test_chunk_and_split_become_unequal() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        a, b = s.stem(x).chunk(2, 1)
        c, d = s.second(a).split([2, 4], 1)
        return s.head(torch.cat((b, c.mean((2, 3), keepdim=True) * s.third(d)), 1))

    net = Wired(forward, stem=conv(3, 8), second=conv(4, 6), third=conv(4, 2), head=conv(6, 2))
    found = coupled(net, IMAGE)
    assert len(set(classes(found, "stem.weight", 0))) == 8
    for seed in range(4):
        cut_half(found, seed)


def test_slice_select_and_index() -> None:
    order = torch.tensor([5, 0, 3])

    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.c, self.d = conv(3, 8), conv(3, 2), conv(3, 2), conv(4, 2), conv(1, 2)
            self.register_buffer("order", order)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.a(x[:, 2:5]) + self.b(x[:, self.order]) + self.c(x[:, ::2]) + self.d(x[:, 1].unsqueeze(1))

    found = coupled(Picks(), IMAGE)
    own = classes(found, "stem.weight", 0)
    assert own[1] == 0  # selected alone, so it must stay
    assert classes(found, "b.weight", 1) == [own[5], own[0], own[3]] and classes(found, "c.weight", 1) == own[::2]
    for seed in range(4):
        cut_half(found, seed)


def test_groupnorm_prelu_glu_pixelshuffle() -> None:
    net = nn.Sequential(
        conv(3, 8), nn.GroupNorm(2, 8), nn.PReLU(8), conv(8, 16), nn.GLU(1), conv(8, 16), nn.PixelShuffle(2), conv(4, 2)
    )
    found = coupled(net, IMAGE)
    own = classes(found, "0.weight", 0)
    assert own[:4] == own[4:] == classes(found, "2.weight", 0)[:4]
    gate = classes(found, "3.weight", 0)
    assert gate[:8] == gate[8:] and len(set(gate)) == 8
    assert classes(found, "5.weight", 0) == [label for label in classes(found, "7.weight", 1) for _ in range(4)]
    cut_half(found)


def test_convolution_through_unfold() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        columns = F.unfold(s.stem(x), 3, padding=1)
        return (s.weight @ columns).unflatten(-1, (8, 8))

    found = coupled(Wired(forward, stem=conv(3, 5), weight=nn.Parameter(torch.randn(2, 45))), IMAGE)
    assert classes(found, "weight", 1) == [label for label in classes(found, "stem.weight", 0) for _ in range(9)]
    cut_half(found)


def test_fold_keeps_whole_channels() -> None:
    """Outlook attention's end: neighbours are summed into an image, and a channel leaves from all of them."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        return s.last(F.fold(s.gate(F.unfold(s.stem(x), 3, padding=1)), (8, 8), 3, padding=1))

    found = coupled(Wired(forward, stem=conv(3, 5), gate=nn.Conv1d(45, 36, 1), last=conv(4, 2)), IMAGE)
    assert classes(found, "gate.weight", 0) == [label for label in classes(found, "last.weight", 1) for _ in range(9)]
    assert len(set(classes(found, "gate.weight", 0))) == 4 and 0 not in classes(found, "gate.weight", 0)
    assert not found.unknown
    cut_half(found)


@pytest.mark.parametrize(
    ("options", "places"), [({}, 6), ({"kernel_size": 3, "padding": 1}, 6), ({"stride": 2}, 3), ({"padding": 1}, 8)]
)
def test_spatial_axis_of_a_pointwise_convolution(options: dict[str, int], places: int) -> None:
    """Three branches mixed at each channel (CoaT): a kernel of 1 treats the places, here the channels, each by itself;
    nothing else does."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        branches = torch.stack([layer(x).mean((2, 3)) for layer in (s.one, s.two, s.three)], 1)
        return s.last(s.mix(branches)[:, 0])

    mix = nn.Conv1d(3, 1, **{"kernel_size": 1, **options})
    found = coupled(
        Wired(forward, one=conv(3, 6), two=conv(3, 6), three=conv(3, 6), mix=mix, last=nn.Linear(places, 2)), IMAGE
    )
    own = classes(found, "one.weight", 0)
    if options:
        assert own == [0] * 6
        return
    assert (
        own == classes(found, "two.weight", 0) == classes(found, "three.weight", 0) == classes(found, "last.weight", 1)
    )
    assert len(set(own)) == 6 and 0 not in own
    for seed in range(3):
        cut_half(found, seed)


@pytest.mark.parametrize("heads", ["dims", "whole"])
def test_linear_attention(heads: str) -> None:
    """q (k' v): keys and values each keep an axis of their own beside the heads, and stay apart."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (
            s.qkv(s.stem(x).flatten(2).transpose(1, 2)).view(x.shape[0], 64, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        )
        return s.last((q @ (k.softmax(2).transpose(-1, -2) @ v)).transpose(1, 2).flatten(2).mean(1))

    found = coupled(Wired(forward, stem=conv(3, 6), qkv=nn.Linear(6, 36), last=nn.Linear(12, 2)), IMAGE, heads=heads)
    own = classes(found, "qkv.weight", 0)
    q, k, v = own[:12], own[12:24], own[24:]
    assert 0 not in own and q == k and v == classes(found, "last.weight", 1)
    if heads == "dims":
        assert k == k[:4] * 3 and v == v[:4] * 3 and len(set(k)) == len(set(v)) == 4
        assert q == k == v  # q, k and v are one tensor's blocks, which keep the same positions
    else:
        assert q == v and len(set(k)) == 3 and k == [label for label in k[::4] for _ in range(4)]
    for seed in range(3):
        cut_half(found, seed)


def test_sampling_and_smooth_resizing_keep_channels() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.stem(x) + F.interpolate(s.table, (8, 8), mode="bicubic", antialias=True)
        grid = s.where(x).permute(0, 2, 3, 1).tanh()
        return s.last(F.grid_sample(x, grid, align_corners=False))

    found = coupled(
        Wired(
            forward, stem=conv(3, 6), table=nn.Parameter(torch.randn(1, 6, 5, 5)), where=conv(6, 2), last=conv(6, 2)
        ).eval(),
        IMAGE,
    )
    own = classes(found, "stem.weight", 0)
    assert len(set(own)) == 6 and 0 not in own and not found.unknown
    assert own == classes(found, "table", 1) == classes(found, "where.weight", 1) == classes(found, "last.weight", 1)
    assert "where.weight" in found.frozen
    cut_half(found)


def test_masks_are_of_places_alone() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.first(x)
        x[x < -1] = 0.0
        x = x.masked_fill((x > 0) & ~(x > 2) | (x.abs() < 0.1), 0.5)
        return s.last(x)

    found = coupled(Wired(forward, first=conv(3, 6), last=conv(6, 2)).eval(), IMAGE)
    own = classes(found, "first.weight", 0)
    assert own == classes(found, "last.weight", 1) and len(set(own)) == 6 and 0 not in own and not found.unknown
    cut_half(found)


def test_heads_that_are_sampled_apart_lose_the_same_channels() -> None:
    """Deformable attention (arXiv 2010.04159): heads lie in the batch, each with places of its own."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.stem(x)
        n, _, h, w = x.shape
        grid = s.where(x).tanh().reshape(n * 2, 2, h, w).permute(0, 2, 3, 1)
        sampled = F.grid_sample(s.value(x).reshape(n * 2, 3, h, w), grid, align_corners=False)
        return s.last(sampled.reshape(n, 6, h, w))

    found = coupled(Wired(forward, stem=conv(3, 4), where=conv(4, 4), value=conv(4, 6), last=conv(6, 2)).eval(), IMAGE)
    own = classes(found, "value.weight", 0)
    assert own[:3] == own[3:] and len(set(own)) == 3 and 0 not in own
    assert "where.weight" in found.frozen and "grid_sampler" in found.frozen["where.weight"]
    cut_half(found)


def test_an_empty_slice_keeps_its_other_axes() -> None:
    """Rotary embedding leaves the first ``k`` tokens alone, and k may be 0."""
    found = coupled(
        Wired(
            lambda s, x: s.head(torch.cat(((y := s.stem(x))[:, :, :0], y[:, :, 0:].sin()), 2)),
            stem=conv(3, 6),
            head=conv(6, 2),
        ),
        IMAGE,
    )
    assert len(set(classes(found, "stem.weight", 0))) == 6 and 0 not in classes(found, "stem.weight", 0)
    cut_half(found)


def test_regions_without_autocast_or_gradients_are_inlined() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.stem(x)
        with torch.autocast("cpu", enabled=False):
            y = s.inner(x.float())
        with torch.no_grad():
            gate = torch.sigmoid(y)
        return s.head(y * gate)

    net = Wired(forward, stem=conv(3, 6), inner=conv(6, 5), head=conv(5, 2))
    found = coupled(net, IMAGE)
    assert torch.equal(found.graph(IMAGE), net(IMAGE))
    for one in (net, found.graph):
        one(IMAGE).square().sum().backward()
    mine = dict(found.graph.named_parameters())
    assert all(torch.equal(mine[name].grad, one.grad) for name, one in net.named_parameters())  # they stop at the gate
    assert len(set(classes(found, "stem.weight", 0)) | set(classes(found, "inner.weight", 0))) == 11
    cut_half(found)


@pytest.mark.parametrize(
    "attention",
    [FusedAttention(12, 3), FusedAttention(12, 3, fused=False), Multihead(12, 3)],
    ids=["sdpa", "plain", "multihead"],
)
def test_transformer_stream_and_heads(attention: nn.Module) -> None:
    found = coupled(VitTokens(attention), IMAGE)
    stream = classes(found, "patches.weight", 0)
    assert len(set(stream)) == 12 and 0 not in stream
    assert all(classes(found, name, 0) == stream for name in ("norm1.weight", "norm2.bias", "gamma", "down.weight"))
    for name, axis in (("cls", 2), ("position", 2), ("head.weight", 1), ("up.weight", 1)):
        assert classes(found, name, axis) == stream
    assert classes(found, "position", 1) == [0] * 5
    assert len(set(classes(found, "up.weight", 0))) == 20
    name = "attention.inner.in_proj_weight" if isinstance(attention, Multihead) else "attention.qkv.weight"
    dims = classes(found, name, 0)
    assert len(set(dims)) == 4 and dims == dims[:4] * 9 and 0 not in dims  # the same dims in each head, of q, k and v
    for seed in range(3):
        cut_half(found, seed)


@pytest.mark.parametrize(
    "attention",
    [FusedAttention(12, 3), FusedAttention(12, 3, fused=False), Multihead(12, 3)],
    ids=["sdpa", "plain", "multihead"],
)
def test_whole_heads(attention: nn.Module) -> None:
    found = coupled(VitTokens(attention), IMAGE, heads="whole")
    stream = classes(found, "patches.weight", 0)
    assert len(set(stream)) == 12 and 0 not in stream
    name = "attention.inner.in_proj_weight" if isinstance(attention, Multihead) else "attention.qkv.weight"
    heads = classes(found, name, 0)
    assert 0 not in heads and len(set(heads)) == 3
    assert heads == [own for own in heads[::4][:3] for _ in range(4)] * 3  # q, k and v of one head leave as one
    for seed in range(3):
        cut_half(found, seed)


def test_whole_heads_of_grouped_queries() -> None:
    """A head of keys and values leaves with the two of queries that read it."""
    found = coupled(VitTokens(GroupedQueries(12)), IMAGE, heads="whole")
    q, k, v = (classes(found, f"attention.{name}.weight", 0) for name in "qkv")
    assert k == v and q == [k[0]] * 8 + [k[4]] * 8 and len(set(k)) == 2 and 0 not in k
    cut_half(found)


def test_grouped_query_attention() -> None:
    found = coupled(VitTokens(GroupedQueries(12)), IMAGE)
    q, k, v = (classes(found, f"attention.{name}.weight", 0) for name in "qkv")
    assert (
        q == k[:4] * 4
        and k == k[:4] * 2
        and v == v[:4] * 2
        and len(set(k)) == 4
        and len(set(v)) == 4
        and not set(k) & set(v)
    )
    cut_half(found)


def test_einsum_and_bare_matrices() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = torch.einsum("nchw,dc->ndhw", s.stem(x), s.mix)
        return x.mean((2, 3)) @ s.out

    found = coupled(
        Wired(forward, stem=conv(3, 6), mix=nn.Parameter(torch.randn(5, 6)), out=nn.Parameter(torch.randn(5, 2))), IMAGE
    )
    assert classes(found, "stem.weight", 0) == classes(found, "mix", 1)
    assert classes(found, "mix", 0) == classes(found, "out", 0) and len(set(classes(found, "mix", 0))) == 5
    cut_half(found)


def test_tied_weights_stay_one() -> None:
    net = Wired(
        lambda s, x: s.head(s.b(F.relu(s.a(s.stem(x))))), stem=conv(3, 6), a=conv(6, 6), b=conv(6, 6), head=conv(6, 2)
    )
    graph = capture(net, IMAGE)
    set_attribute(graph, "b.weight", attribute(graph, "a.weight"))
    found = couple(graph)
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 1) == classes(found, "stem.weight", 0)
    small, _ = cut_half(found)
    assert small.get_parameter("a.weight") is small.get_parameter("b.weight")


class SortedWeight(nn.Module):
    """A layer that computes its weight in ``forward``: capture stores what a parametrization makes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.order = layer.weight, layer.bias, Sorted()
        self.run = F.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else F.conv2d

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.order(self.weight), self.bias)  # type: ignore[operator]


def sorted_weight(layer: nn.Module) -> nn.Module:
    return SortedWeight(layer)


class ComputedWeights(nn.Module):
    """Weights whose outputs are put in order: what is added a channel stays as well."""

    def __init__(self, first: type[nn.Module]) -> None:
        super().__init__()
        norm = sorted_weight
        self.first, self.free, self.second, self.head = (
            norm(first(3, 16, 3)), nn.Conv2d(16, 16, 3), norm(nn.Conv2d(16, 12, 3)), nn.Linear(12, 5)
        )  # fmt: skip
        self.side = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.free(self.first(x).relu()).relu()).mean((2, 3))
        return self.head(y + self.side(x).mean((2, 3)))


@pytest.mark.parametrize("first", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_computed_weight_keeps_its_bias(first: type[nn.Module]) -> None:
    found = coupled(ComputedWeights(first), IMAGE)
    assert set(classes(found, "first.bias", 0)) == set(classes(found, "second.bias", 0)) == {0}
    assert len(set(classes(found, "side.0.bias", 0))) == 16
    cut_half(found)


def test_unknown_operator_freezes_what_it_touches() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        return s.head(torch.renorm(s.a(x), 2, 1, 5.0) + s.b(s.c(x)))

    found = coupled(Wired(forward, a=conv(3, 4), b=conv(6, 4), c=conv(3, 6), head=conv(4, 2)), IMAGE)
    assert any("renorm" in name for name in found.unknown)
    assert set(classes(found, "a.weight", 0)) == set(classes(found, "b.weight", 0)) == {0}
    assert "unknown operator (renorm" in found.frozen["a.weight"]
    assert len(set(classes(found, "c.weight", 0))) == 6
    assert any("renorm" in line for line in found.explain())
    cut_half(found)


def test_an_operator_without_a_rule_that_reads_no_channels_is_none_to_tell_of() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        return s.head((s.a(x) * (rows + columns)).mean((2, 3)))

    found = coupled(Wired(forward, a=conv(3, 4), head=nn.Linear(4, 2)), IMAGE)
    assert not found.unknown and len(set(classes(found, "a.weight", 0))) == 4


def test_softmax_over_channels_freezes() -> None:
    found = coupled(Wired(lambda s, x: s.head(s.a(x).softmax(1)), a=conv(3, 4), head=conv(4, 2)), IMAGE)
    assert set(classes(found, "a.weight", 0)) == {0} and "softmax runs over it" in found.frozen["a.weight"]
    assert found.count == 1


def test_mean_over_channels_runs_over_what_is_kept() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.a(x)
        return s.head(x * torch.sigmoid(s.map(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1))))

    found = coupled(Wired(forward, a=conv(3, 6), map=conv(2, 1), head=conv(6, 2)), IMAGE)
    assert len(found.statistics) == 2
    cut_half(found)


class Standardised(nn.Conv2d):
    """timm's weight standardisation: a batch norm of the weight, with statistics over inputs and kernel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True).reshape_as(
            self.weight
        )
        return F.conv2d(x, weight, self.bias, padding=self.padding)


def test_standardised_weights() -> None:
    found = coupled(
        nn.Sequential(Standardised(3, 6, 3, padding=1), Standardised(6, 5, 3, padding=1), conv(5, 2)), IMAGE
    )
    assert classes(found, "0.weight", 0) == classes(found, "1.weight", 1) and classes(found, "1.weight", 0) == classes(
        found, "2.weight", 1
    )
    assert len(set(classes(found, "0.weight", 0)) | set(classes(found, "1.weight", 0))) == 11
    assert [row.produces for row in found.rows if row.names[0] == "1.weight" and row.axis < 2] == [True, False]
    cut_half(found)


def test_softmax_over_branches_ties_them() -> None:
    """Selective kernels: (n, 2, c) weights that sum to one over the two branches."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = torch.stack((s.a(x), s.b(x)), 1)
        select = s.select(x.sum(1).mean((2, 3))).unflatten(1, (2, 6)).softmax(1)
        return s.head((x * select[..., None, None]).sum(1))

    found = coupled(Wired(forward, a=conv(3, 6), b=conv(3, 6), select=nn.Linear(6, 12), head=conv(6, 2)), IMAGE)
    own = classes(found, "a.weight", 0)
    assert len(set(own)) == 6 and classes(found, "b.weight", 0) == own and classes(found, "select.weight", 0) == own * 2
    cut_half(found)


def test_split_attention_loses_the_same_channels_of_each_branch() -> None:
    """ResNeSt: (n, 2, c) branches of one grouped convolution, weighted and summed."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.stem(x)
        x = s.wide(x).reshape(x.shape[0], 2, 6, 8, 8)
        select = s.select(x.sum(1).mean((2, 3))).view(-1, 1, 2, 6).transpose(1, 2).softmax(1).reshape(-1, 12)
        return s.head((x * select.reshape(-1, 2, 6, 1, 1)).sum(1))

    found = coupled(
        Wired(forward, stem=conv(3, 6), wide=conv(6, 12, groups=2), select=nn.Linear(6, 12), head=conv(6, 2)), IMAGE
    )
    own = classes(found, "wide.weight", 0)
    assert own[:6] == own[6:] and len(set(own)) == 6 and 0 not in own
    assert classes(found, "select.weight", 0) == own and classes(found, "head.weight", 1) == own[:6]
    cut_half(found)


def test_constants_and_creators() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.a(x)
        return s.head(torch.cat((x, x.new_zeros(x.shape[0], 2, 8, 8)), 1) + s.b(torch.zeros_like(x)))

    found = coupled(Wired(forward, a=conv(3, 4), b=conv(4, 6), head=conv(6, 2)), IMAGE)
    assert classes(found, "b.weight", 0)[:4] == classes(found, "a.weight", 0) and 0 not in classes(found, "b.weight", 0)
    for seed in range(3):
        cut_half(found, seed)


def test_coordinates_in_a_buffer_are_an_input() -> None:
    class Coordinates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.mlp, self.head = conv(3, 6), nn.Linear(2, 6), conv(6, 2)
            self.register_buffer("grid", torch.randn(64, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) + self.mlp(self.grid).t().reshape(1, 6, 8, 8))

    found = coupled(Coordinates(), IMAGE)
    assert classes(found, "grid", 1) == [0, 0] == classes(found, "mlp.weight", 1)
    assert classes(found, "mlp.weight", 0) == classes(found, "a.weight", 0)
    cut_half(found)


def test_several_inputs_and_outputs() -> None:
    net = Wired(
        lambda s, x, y: {"sum": s.head(z := s.a(x) + s.b(y)), "inner": [s.other(z), s.free(s.c(x))]},
        a=conv(3, 6),
        b=conv(2, 6),
        c=conv(3, 4),
        head=conv(6, 2),
        other=conv(6, 3),
        free=conv(4, 1),
    )
    found = coupled(net, IMAGE, torch.randn(2, 2, 8, 8))
    assert classes(found, "a.weight", 0) == classes(found, "b.weight", 0) and 0 not in classes(found, "a.weight", 0)
    cut_half(found)


def test_ignore_names_a_module_a_parameter_or_nothing() -> None:
    graph = capture(nn.Sequential(conv(3, 6), conv(6, 5), conv(5, 2)), IMAGE)
    for glob in ("0", "0.weight", "0*"):
        found = couple(graph, (glob,))
        assert set(classes(found, "0.weight", 0)) == {0} and 0 not in classes(found, "1.weight", 0)
        assert f"ignore='{glob}'" in found.frozen["0.weight"]
    with pytest.raises(InputError, match="matches no parameter or module"):
        couple(graph, ("features.*",))


def test_explain_lists_groups_and_what_is_frozen() -> None:
    lines = coupled(nn.Sequential(conv(3, 6), conv(6, 2)), IMAGE).explain()
    assert lines[0] == "6 channels: 0.weight[0], 0.bias[0], 1.weight[1]"
    assert lines[1].startswith("frozen 1.weight: output of the network")


def test_components_are_those_of_scipy() -> None:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    from rarefy.pruning.groups.groups import _components

    generator = torch.Generator().manual_seed(0)
    for labels, edges in ((1, 0), (7, 0), (50, 20), (200, 150), (1000, 990), (300, 5000)):
        pairs = torch.randint(0, labels, (2, edges), generator=generator)
        matrix = coo_matrix((torch.ones(edges), tuple(pairs.numpy())), shape=(labels, labels))
        assert _components(pairs, labels).tolist() == connected_components(matrix, directed=False)[1].tolist()
    order = torch.randperm(999, generator=generator)  # a chain in no order
    assert _components(torch.stack((order[:-1], order[1:])), 999).unique().tolist() == [0]


def test_a_row_that_meets_a_column_is_tied_in_few_edges() -> None:
    """Labels (groups, n, 1) and (groups, 1, m): in each group all leave with all, as the n * m pairs say."""
    from rarefy.pruning.groups.groups import _components
    from rarefy.pruning.groups.labels import Trace

    trace = Trace(torch.fx.symbolic_trace(nn.Identity()), {})
    one, other = trace.fresh(3 * 40).reshape(3, 40, 1), trace.fresh(3 * 50).reshape(3, 1, 50)
    trace.tie(one, other)
    assert sum(len(edge[0]) for edge in trace.edges) == 3 * (40 + 50)
    found = _components(torch.cat([torch.stack(edge) for edge in trace.edges], 1), trace.count)
    pairs = torch.stack([layer.reshape(-1) for layer in torch.broadcast_tensors(one, other)])
    assert torch.equal(found, _components(pairs, trace.count))


def test_equal_layers_of_classes_are_one_tensor() -> None:
    """Of the largest networks labels took tens of MB: the vectors of a batch norm, and the activations between, have
    the same classes."""
    net = Wired(
        lambda self, x: self.b(self.norm(self.a(x)).relu()),
        a=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
        b=nn.Conv2d(8, 4, 3),
    )
    coupling = coupled(net, torch.randn(2, 3, 8, 8))
    rows = {row.names[0]: row.classes for row in coupling.rows if row.names[0].startswith("norm")}
    assert len(rows) == 4
    assert len({classes.data_ptr() for classes in rows.values()}) == 1
    assert max(int(classes.max()) for classes in rows.values()) < coupling.count


@pytest.mark.parametrize("bias", [True, False])
def test_a_large_convolution_runs_in_parts(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    from rarefy.pruning.self_check import equivalence

    graph = capture(nn.Conv2d(6, 20, 3, bias=bias), torch.randn(2, 6, 9, 9))
    (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
    read = [
        torch.randn(2, 6, 9, 9),
        *(attribute(graph, str(source.target)).detach() for source in node.all_input_nodes[1:]),
    ]
    calls = []
    run = equivalence._called
    monkeypatch.setattr(equivalence, "LARGE", 6 * 9 * 7)  # 7 of the 20 outputs
    monkeypatch.setattr(equivalence, "_called", lambda *given: calls.append(1) or run(*given))
    parts = equivalence._by_outputs(node, read)
    assert len(calls) == 3
    torch.testing.assert_close(parts, run(node, read), rtol=1e-5, atol=1e-5)


def test_a_large_convolution_in_groups_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.pruning.self_check import equivalence

    monkeypatch.setattr(equivalence, "LARGE", 8)
    cut_half(coupled(nn.Sequential(conv(3, 8), conv(8, 12, groups=2), conv(12, 2)), IMAGE))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm])
def test_layers_under_weight_norm_are_pruned_as_any_other(norm) -> None:  # type: ignore[no-untyped-def]
    net = WeightNormed(norm).eval()
    graph = capture(net, torch.randn(2, 3, 10, 10))
    x = torch.randn(3, 3, 10, 10)
    assert torch.equal(graph(x), net(x))
    weights = {"first.weight", "twice.weight", "last.weight"}
    assert set(graph.state_dict()) == {*weights, "first.bias", "twice.bias", "last.bias", "head.weight", "v", "g"}
    found = couple(graph)
    assert all(len(set(classes(found, name, int(name == "last.weight")))) > 4 for name in weights)
    cut_half(found)


def test_a_weight_norm_written_by_hand() -> None:
    net = Wired(
        lambda self, x: F.linear(F.linear(x, torch._weight_norm(self.v, self.g)), torch._weight_norm(self.v, self.g))
    )
    net.v, net.g = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.rand(6, 1))
    graph = capture(net, torch.randn(2, 6))
    x = torch.randn(4, 6)
    assert set(graph.state_dict()) == {"v", "g"} and torch.equal(graph(x), net(x))
