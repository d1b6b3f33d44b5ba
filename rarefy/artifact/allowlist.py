"""What a saved graph may call. ``save`` writes nothing else, and ``load`` runs nothing else.

A call is three things, each checked before a graph is built from it: its name stands in the tables below; its arguments
are those of the operator's own schema, in number and in type; and a literal size among them stays below
``MOST_ELEMENTS``.

* aten operators by name, every overload that changes none of its arguments. Left out on purpose: those that read a file
  (``from_file``), yield memory that was never written (``empty``), change storage (``set``, ``resize``), trust their
  input (sparse, nested and quantized tensors' raw constructors), or belong to one backend.
* rarefy's own operators: ``rarefy.kernels.OPERATORS``.
* arithmetic on sizes, from ``operator``, ``math`` and ``torch``.

What is not promised: a graph that calls only these can still take much memory and time when it is *run*, by multiplying
what it was given. Loading it takes neither.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from rarefy.errors import FormatError
from rarefy.graph.nodes import Value
from rarefy.kernels import OPERATORS

# Elements a literal size may ask for: 8 GiB of float32.
MOST_ELEMENTS = 2**31
# Positions a literal padding, stride, dilation or kernel may span.
WIDEST = 2**16

_ATEN_TEXT = """
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr angle arccos arccosh arcsin arcsinh arctan arctan2
arctanh asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div divide erf erfc erfinv exp exp2
expm1 fix float_power floor floor_divide fmax fmin fmod frac gcd heaviside hypot i0 igamma igammac lcm ldexp lerp
lgamma log log10 log1p log2 logaddexp logaddexp2 logit maximum minimum mul multiply mvlgamma nan_to_num neg negative
nextafter polygamma positive pow rad2deg reciprocal remainder round rsqrt rsub sgn sigmoid sign signbit sin sinc sinh
sqrt square sub subtract tan tanh true_divide trunc xlogy special_entr special_erf special_erfc special_erfcx
special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc special_gammaln special_i0
special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_logit special_ndtr special_ndtri
special_round special_sinc special_xlog1py special_xlogy

all allclose any eq equal ge greater greater_equal gt isclose isfinite isin isinf isnan isneginf isposinf isreal le
less less_equal logical_and logical_not logical_or logical_xor lt ne not_equal where

celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_softmax mish prelu relu relu6
rrelu selu silu softmax softplus softshrink special_log_softmax special_softmax threshold _log_softmax _prelu_kernel
_safe_softmax _softmax

alpha_dropout batch_norm dropout feature_alpha_dropout feature_dropout group_norm instance_norm layer_norm
native_batch_norm native_dropout native_group_norm native_layer_norm rms_norm _batch_norm_no_update
_native_batch_norm_legit_no_training _weight_norm

adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
avg_pool1d avg_pool2d avg_pool3d bilinear col2im conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d
conv_transpose3d convolution embedding embedding_bag im2col linear max_pool1d max_pool1d_with_indices max_pool2d
max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d scaled_dot_product_attention
_adaptive_avg_pool2d _adaptive_avg_pool3d _convolution

gru gru_cell lstm lstm_cell rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell

affine_grid_generator grid_sampler grid_sampler_2d grid_sampler_3d upsample_bicubic2d upsample_bilinear2d
upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_bicubic2d_aa
_upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d

baddbmm bmm cdist chain_matmul cosine_similarity cross cov corrcoef det dist dot einsum ger inner inverse kron
linalg_cholesky linalg_cross linalg_det linalg_diagonal linalg_eigh linalg_eigvalsh linalg_inv linalg_lstsq linalg_lu
linalg_matmul linalg_matrix_exp linalg_matrix_norm linalg_matrix_power linalg_multi_dot linalg_norm linalg_pinv
linalg_qr linalg_slogdet linalg_solve linalg_solve_triangular linalg_svd linalg_svdvals linalg_vander linalg_vecdot
linalg_vector_norm logdet matmul matrix_exp matrix_power mm mv outer pairwise_distance pdist renorm tensordot trace
vdot

amax amin aminmax argmax argmin bincount count_nonzero cummax cummin cumprod cumsum diff frobenius_norm histc kthvalue
logcumsumexp logsumexp max mean median min mode nanmean nanmedian nanquantile nansum norm nuclear_norm prod quantile
special_logsumexp std std_mean sum sum_to_size trapezoid trapz unique_consecutive unique_dim var var_mean

binary_cross_entropy binary_cross_entropy_with_logits cross_entropy_loss huber_loss kl_div l1_loss mse_loss nll_loss
nll_loss2d nll_loss_nd smooth_l1_loss

adjoint alias as_strided atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cat channel_shuffle
chunk clone column_stack concat concatenate constant_pad_nd contiguous copy detach diag diag_embed diagflat diagonal
diagonal_scatter dsplit dstack expand expand_as expand_copy flatten flip fliplr flipud hsplit hstack lift_fresh_copy mH
mT matrix_H meshgrid moveaxis movedim narrow native_channel_shuffle numpy_T pad pad_sequence permute permute_copy
pixel_shuffle pixel_unshuffle ravel reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave
replication_pad1d replication_pad2d replication_pad3d reshape reshape_as roll rot90 row_stack select select_copy
select_scatter slice slice_copy slice_scatter split split_copy split_with_sizes split_with_sizes_copy squeeze
squeeze_copy stack swapaxes swapdims t t_copy tensor_split tile transpose transpose_copy tril triu unbind unbind_copy
unflatten unfold unfold_copy unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy view view_as
view_copy vsplit vstack _reshape_copy _stack _unsafe_view

argsort argwhere bucketize gather index index_add index_copy index_fill index_put index_reduce index_select masked_fill
masked_scatter masked_select msort nonzero nonzero_numpy one_hot put scatter scatter_add scatter_reduce searchsorted
sort take take_along_dim topk

complex conj conj_physical fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn
fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn imag istft polar real
resolve_conj resolve_neg stft view_as_complex view_as_real

arange eye fill full full_like linspace logspace new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices
triu_indices zero zeros zeros_like bartlett_window blackman_window hamming_window hann_window kaiser_window

bernoulli multinomial normal_functional rand rand_like randint randint_like randn randn_like randperm

fake_quantize_per_channel_affine fake_quantize_per_tensor_affine

is_complex is_floating_point is_nonzero is_same_size is_signed item numel sym_numel sym_size sym_stride to type_as
_local_scalar_dense _shape_as_tensor _to_copy
"""
ATEN = frozenset(_ATEN_TEXT.split())

Target = Callable[..., Value]

# name -> (function, number of arguments)
_OF_TWO = "add sub mul floordiv truediv mod pow eq ne lt le gt ge and_ or_".split()
FUNCTIONS: dict[str, tuple[Target, int]] = {
    "operator.getitem": (operator.getitem, 2),
    **{f"operator.{name}": (getattr(operator, name), 2) for name in _OF_TWO},
    **{f"operator.{name}": (getattr(operator, name), 1) for name in ("neg", "pos")},
    **{f"math.{name}": (getattr(math, name), 1) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": (getattr(torch, name), 1) for name in ("sym_float", "sym_int", "sym_not")},
    **{f"torch.{name}": (getattr(torch, name), 2) for name in ("sym_max", "sym_min")},
}
_NAME_OF: dict[object, str] = {function: name for name, (function, _) in FUNCTIONS.items()}
_OVERLOAD = re.compile(r"(aten|rarefy)\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z][A-Za-z0-9_]*)")

# What a node yields, as far as an argument must know it.
TENSOR, TENSORS, LIST, NUMBER, ANY = "tensor", "tensors", "list", "number", "any"

_SCALARS: dict[str, Callable[[object], bool]] = {
    "Tensor": lambda value: type(value) in (int, float, bool),  # a number stands for a tensor of one element
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "number": lambda value: type(value) in (int, float, bool),
    "bool": lambda value: type(value) is bool,
    "str": lambda value: type(value) is str,
    "ScalarType": lambda value: isinstance(value, torch.dtype),
    "Layout": lambda value: value is torch.strided,
    "MemoryFormat": lambda value: isinstance(value, torch.memory_format),
    "Device": lambda value: isinstance(value, torch.device),
}
_FROM_NODE: Mapping[str, Sequence[str]] = {
    "Tensor": (TENSOR, NUMBER, ANY),
    **dict.fromkeys(("int", "float", "number", "bool"), (NUMBER, ANY)),
}

_SIZES = {"size", "sizes", "shape", "repeats", "dims", "output_size"}
_SPANS = {"pad", "padding", "output_padding", "dilation", "kernel_size"}


def name_of(target: object) -> str:
    """``aten.conv2d.default``, ``operator.add``: the text ``function_named`` takes back.

    Raises FormatError if it would not.
    """
    name = str(target) if isinstance(target, torch._ops.OpOverload) else _NAME_OF.get(target, "")
    if not name or function_named(name) is not target:
        raise FormatError(f"calls {target}, which is not in the list of operators a saved graph may call")
    return name


def function_named(name: str) -> Target:
    """The operator of that name. Raises FormatError if it is not in the list, or this torch has none such."""
    if name in FUNCTIONS:
        return FUNCTIONS[name][0]
    match = _OVERLOAD.fullmatch(name)
    if match and match[1] == "rarefy":
        for found in OPERATORS:
            if str(found) == name:
                return found
    if not match or match[1] == "rarefy" or match[2] not in ATEN:
        raise FormatError(f"calls {name[:80]!r}, which is not in the list of operators a saved graph may call")
    packet = getattr(torch.ops.aten, match[2], None)
    if packet is None or match[3] not in packet.overloads():
        raise FormatError(
            f"calls {name}, which torch {torch.__version__} does not have; load with the torch that manifest.json names"
        )
    overload = getattr(packet, match[3])
    if overload._schema.is_mutable:
        raise FormatError(f"calls {name}, which changes its argument")
    return overload


def check_call(
    target: Target, args: Sequence[Value], kwargs: Mapping[str, Value], yields: Mapping[fx.Node, str]
) -> str:
    """Does the operator take these arguments?

    Returns what it yields; ``yields`` says so of the nodes among the arguments.

    Raises FormatError.
    """
    if target in _NAME_OF:
        return _check_function(_NAME_OF[target], args, kwargs, yields)
    assert isinstance(target, torch._ops.OpOverload)
    arguments = target._schema.arguments
    positional = [argument for argument in arguments if not argument.kwarg_only]
    if len(args) > len(positional):
        raise FormatError(f"{target} takes {len(positional)} arguments, not {len(args)}")
    given = {argument.name: value for argument, value in zip(positional, args, strict=False)}
    twice = given.keys() & kwargs.keys()
    unknown = kwargs.keys() - {argument.name for argument in arguments}
    if twice or unknown:
        raise FormatError(f"{target} takes no argument {min(twice | unknown)[:80]!r}{' twice' if twice else ''}")
    given.update(kwargs)
    name = target._schema.name.removeprefix("aten::")
    for argument in arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                raise FormatError(f"{target} lacks its argument {argument.name!r}")
            continue
        value, kind = given[argument.name], str(argument.real_type)
        if not _fits(value, kind, yields):
            raise FormatError(f"{target}: {argument.name} must be {kind}, not {_said(value)}")
        _check_sizes(target, name, argument.name, value, kind)
    if name == "arange":
        _check_arange(target, given)
    return _yielded([str(result.type) for result in target._schema.returns])


def _fits(value: object, kind: str, yields: Mapping[fx.Node, str]) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[9:-1], yields)
    if kind.startswith("List["):
        inner = kind[5:-1]
        if isinstance(value, fx.Node):
            return yields[value] in (TENSORS, LIST, ANY)
        if isinstance(value, (list, tuple)):
            return all(_fits(item, inner, yields) for item in value)
        return inner in ("int", "float") and _fits(value, inner, yields)  # one number for all axes
    if isinstance(value, fx.Node):
        return yields[value] in _FROM_NODE.get(kind, ())
    return kind in _SCALARS and _SCALARS[kind](value)


def _check_sizes(target: Target, name: str, argument: str, value: object, kind: str) -> None:
    items = value if isinstance(value, (list, tuple)) else [value]
    numbers = [item for item in items if type(item) is int]
    if "int" not in kind or not numbers:
        return
    whole = math.prod(max(abs(number), 1) for number in numbers) if argument in _SIZES else max(map(abs, numbers))
    position = name.startswith("slice") and argument in ("start", "end")  # 2**63 - 1 is "to the end"
    most = 2**63 if position else WIDEST if argument in _SPANS else MOST_ELEMENTS
    if whole > most:
        raise FormatError(f"{target}: {argument} = {_said(value)} is too large (at most {most})")


def _check_arange(target: Target, given: Mapping[str, Value]) -> None:
    start, end, step = given.get("start", 0), given.get("end"), given.get("step", 1)
    if not all(type(value) in (int, float) for value in (start, end, step)):
        return  # a size that is only known when the graph runs
    if not step or not abs((end - start) / step) <= MOST_ELEMENTS:  # written so that NaN is refused too
        raise FormatError(f"{target}: from {start} to {end} by {step} is too large (at most {MOST_ELEMENTS} elements)")


def _yielded(returns: Sequence[str]) -> str:
    if len(returns) != 1:
        return TENSORS if all(kind == "Tensor" for kind in returns) else LIST
    known = {"Tensor": TENSOR, "List[Tensor]": TENSORS}
    return known.get(returns[0], LIST if returns[0].startswith("List[") else NUMBER)


def _check_function(
    name: str, args: Sequence[Value], kwargs: Mapping[str, Value], yields: Mapping[fx.Node, str]
) -> str:
    if len(args) != FUNCTIONS[name][1] or kwargs:
        raise FormatError(f"{name} takes {FUNCTIONS[name][1]} arguments, not {len(args) + len(kwargs)}")
    if name == "operator.getitem":
        source, index = args
        if not isinstance(source, fx.Node) or yields[source] not in (TENSORS, LIST, ANY):
            raise FormatError("operator.getitem takes an element of a list of tensors")
        if type(index) is not int or abs(index) > MOST_ELEMENTS:
            raise FormatError(f"operator.getitem takes a whole number as index, not {_said(index)}")
        return TENSOR if yields[source] == TENSORS else ANY
    for value in args:
        if isinstance(value, fx.Node):
            if yields[value] not in (NUMBER, ANY):
                raise FormatError(f"{name} takes numbers, not the {yields[value]} {value.name}")
        elif type(value) not in (int, float, bool) or abs(value) > 2**63:
            raise FormatError(f"{name} takes numbers, not {_said(value)}")
    if name == "operator.pow" and not (type(args[1]) in (int, float) and abs(args[1]) <= 8):
        raise FormatError(f"operator.pow takes a literal exponent up to 8, not {_said(args[1])}")
    return NUMBER


def _said(value: object) -> str:
    return repr(value)[:60]
