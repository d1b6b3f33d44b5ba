"""The one table of operators: a row an ONNX operator, by families."""

from __future__ import annotations

from rarefy.models.onnx import arithmetic, indexing, layers, pooling, reductions, shapes
from rarefy.models.onnx.step import Row

FAMILIES = (arithmetic, layers, pooling, reductions, shapes, indexing)
ROWS: dict[str, Row] = {kind: row for family in FAMILIES for kind, row in family.ROWS.items()}

# What there can be no row for, and the way out.
_CUT = (
    "cut the file before that node: onnx.utils.extract_model('model.onnx', 'cut.onnx', [inputs], [outputs before it])"
)
_FLOAT = "rarefy starts from float models: give the file from before it was quantised"
REFUSED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("If", "Loop", "Scan"), ("chooses by values what is computed", _CUT)),
    **dict.fromkeys(
        ("NonMaxSuppression", "NonZero", "Unique", "Compress", "RoiAlign", "MaxRoiPool"),
        ("yields as much as the values say", _CUT),
    ),
    **dict.fromkeys(
        ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
         "MatMulInteger"),
        ("is of a model in few bits", _FLOAT),
    ),
    **dict.fromkeys(
        ("StringNormalizer", "TfIdfVectorizer", "StringConcat", "StringSplit", "RegexFullMatch", "LabelEncoder"),
        ("works on texts", _CUT),
    ),
    **dict.fromkeys(
        ("SequenceConstruct", "SequenceAt", "SequenceEmpty", "SequenceInsert", "SplitToSequence", "ConcatFromSequence",
         "SequenceLength", "SequenceErase", "SequenceMap", "Optional", "OptionalGetElement", "OptionalHasElement"),
        ("works on lists of tensors", _CUT),
    ),
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
        ("is drawn at random", _CUT),
    ),
}  # fmt: skip
