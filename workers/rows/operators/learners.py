"""The operators of ai.onnx.ml: trees, linear models and what prepares their features, a row of them at a time."""

from __future__ import annotations

from workers.rows.node import Answer, Node, rule
from workers.rows.sizes import opaque_side
from workers.rows.values import FREE, ROWS, Shape, Value

ML = "ai.onnx.ml"

#: Along its last axis a tensor's features lie: rows there are features.
_FEATURES = "the rows lie along its features"


def _features(node: Node, value: Value, shape: Shape | None) -> Value:
    if value.kind is FREE:
        return node.give(shape)
    assert value.shape is not None
    if value.axis == len(value.shape) - 1:
        return node.mixed(_FEATURES)
    assert shape is not None
    return node.give(shape, value.axis, value.outer)


@rule("Imputer", "Normalizer", "Scaler", domain=ML)
def _each(node: Node) -> Value:
    return _features(node, node.first, node.first.shape)


@rule("Binarizer", "CategoryMapper", "LabelEncoder", domain=ML)
def _elementwise(node: Node) -> Value:
    value = node.first
    return node.give(value.shape, value.axis, value.outer)


@rule("LinearRegressor", "SVMRegressor", "TreeEnsemble", "TreeEnsembleRegressor", domain=ML)
def _regressor(node: Node) -> Value:
    value = node.first
    if value.kind is ROWS and node.operator != "TreeEnsemble" and _for_all(node):
        return node.mixed("it aggregates over the rows")
    return _features(node, value, None if value.shape is None else (*value.shape[:1], opaque_side()))


def _for_all(node: Node) -> bool:
    return len(node.first.shape or ()) != 2


@rule("LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier", domain=ML)
def _classifier(node: Node) -> Answer:
    value = node.first
    if value.kind is ROWS and _for_all(node):
        return [node.mixed(_FEATURES)] * len(node.proto.output)
    shape = value.shape
    labels = _features(node, value, None if shape is None else shape[:1])
    return [labels, _features(node, value, None if shape is None else (shape[0], opaque_side()))]


@rule("ArrayFeatureExtractor", domain=ML)
def _extractor(node: Node) -> Value:
    value = node.first
    if not node.free(1):
        return node.mixed("every row is read by every other's index")
    return _features(node, value, None if value.shape is None else (*value.shape[:-1], opaque_side()))


@rule("OneHotEncoder", domain=ML)
def _one_hot(node: Node) -> Value:
    value = node.first
    return node.give(None if value.shape is None else (*value.shape, opaque_side()), value.axis, value.outer)


@rule("FeatureVectorizer", domain=ML)
def _vectorizer(node: Node) -> Value:
    values = [value for value in node.inputs if value is not None]
    if any(value.kind is ROWS and value.axis != 0 for value in values) or len({value.kind for value in values}) > 1:
        return node.mixed(_FEATURES)
    first = values[0]
    if len({(value.shape or (1,))[0] for value in values}) > 1 or any(len(value.shape or ()) != 2 for value in values):
        return node.unknown("its inputs may have different numbers of each row")
    return _features(node, first, ((first.shape or (1,))[0], opaque_side()))


@rule("ZipMap", "CastMap", "DictVectorizer", domain=ML)
def _maps(node: Node) -> Value:
    return node.mixed("it gives or takes maps, which are not parted by rows") if not node.free(0) else node.give(None)
