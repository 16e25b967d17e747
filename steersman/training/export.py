"""The learned scorer as an ONNX graph, and a bundle around it.

The graph is built node by node rather than traced: the same weights give the same bytes, and it holds nothing
but these few operators. Input `rows` float32 (candidates, WIDTH), raw observations; output `scores` float32
(candidates,).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from steersman.runtime.bundle import write_bundle
from steersman.runtime.network import NORM_WIDTH, SCALE, Architecture, split
from steersman.runtime.observation import CANDIDATE_FEATURES, FEATURES, WIDTH
from steersman.runtime.scoring import LIMIT

OPSET, IR_VERSION = 17, 8  # old enough for ONNX Runtime 1.12 and later
FAR = 8.0  # scales below zero at which float32 still has five digits of the logarithm


def onnx_graph(architecture: Architecture, weights: np.ndarray) -> bytes:
    """The scorer as a serialised ONNX model, normaliser inside, shaped for speed under ONNX Runtime.

    What depends on the request alone is computed once, from the last row. Candidates stand in columns, for operators
    are slow along short rows. Inputs must be within the ranges of the observation's schema.

    Raises:
        UserError: the number of weights does not fit the architecture, or a weight is not finite.
    """
    bilinear, *layers = split(architecture, weights)
    g, signs = _Graph(), _signs()
    _normalise_candidates(g, signs)
    unit = np.concatenate([signs, np.ones(WIDTH - CANDIDATE_FEATURES)]) / NORM_WIDTH
    bilinear = bilinear * unit[:CANDIDATE_FEATURES, None]
    request = list(range(CANDIDATE_FEATURES, WIDTH)) if layers else architecture.gate_columns
    if request:
        _normalise_request(g, request)
    gated = g.constant("bilinear", bilinear[:, :1].T)
    if architecture.gates:
        by_gate = np.zeros((len(request), CANDIDATE_FEATURES))
        gates = architecture.gate_columns
        by_gate[[request.index(f) for f in gates]] = (bilinear[:, 1:] * unit[gates]).T
        gated = g.add("Gemm", ["request", g.constant("by_gate", by_gate), gated], "gated")  # (1, features)
    terms = g.add("MatMul", [gated, "candidates"], "terms")  # (1, candidates)

    inputs = "candidates"
    for i in range(len(architecture.hidden)):
        weight, common = layers[2 * i], g.constant(f"bias{i}", layers[2 * i + 1][:, None])
        if i == 0:  # the request's part is a bias that all candidates have in common
            weight = weight * unit[:, None]
            own = g.constant("request_weight", weight[CANDIDATE_FEATURES:].T)
            common = g.add("Gemm", [own, "request", common], "request_part", transB=1)
            weight = weight[:CANDIDATE_FEATURES]
        g.add("Gemm", [g.constant(f"weight{i}", weight.T), inputs, common], f"linear{i}")  # (units, candidates)
        inputs = g.add("Tanh", [f"linear{i}"], f"hidden{i}")
    if layers:
        terms = g.add("Gemm", [g.constant("output", layers[-1][None]), inputs, terms], "both")
    g.add("Squeeze", [terms, g.constant("first", np.array([0]))], "scores")
    return g.serialised()


def _signs() -> np.ndarray:
    """Signs (CANDIDATE_FEATURES,) with which each feature is large only where it is positive.

    Log is a ninth as expensive as Asinh, but log(x + √(x² + 1)) loses digits where x is far below zero.
    """
    signs = np.ones(CANDIDATE_FEATURES)
    for f, feature in enumerate(FEATURES[:CANDIDATE_FEATURES]):
        if -feature.low > FAR * SCALE[f]:
            signs[f] = -1.0
            assert feature.high <= FAR * SCALE[f], f"{feature.name} may be far on both sides of zero"
    return signs


def _normalise_candidates(g: _Graph, signs: np.ndarray) -> None:
    """`candidates` (features, C): asinh(sign · raw / scale), clipped; the division by width is in the weights."""
    picked = np.zeros((CANDIDATE_FEATURES, WIDTH))
    np.fill_diagonal(picked, signs / SCALE[:CANDIDATE_FEATURES])
    g.add("Gemm", [g.constant("picked", picked), "rows"], "scaled", transB=1)
    g.add("Mul", ["scaled", "scaled"], "square")
    g.add("Add", ["square", g.constant("one", 1.0)], "more")
    g.add("Sqrt", ["more"], "root")
    g.add("Add", ["scaled", "root"], "sum")
    g.add("Log", ["sum"], "unclipped")
    g.add("Min", ["unclipped", g.constant("limits", LIMIT * NORM_WIDTH[:CANDIDATE_FEATURES, None])], "candidates")


def _normalise_request(g: _Graph, columns: list[int]) -> None:
    """`request` (1, len(columns)): asinh(raw / scale), clipped; the division by width is in the weights."""
    picked, limits = np.zeros((WIDTH, len(columns))), LIMIT * NORM_WIDTH[columns]
    picked[columns, np.arange(len(columns))] = 1.0 / SCALE[columns]
    g.add("Gather", ["rows", g.constant("last", np.array([-1]))], "row", axis=0)
    g.add("MatMul", ["row", g.constant("request_picked", picked)], "request_scaled")
    g.add("Asinh", ["request_scaled"], "request_unclipped")
    if any(FEATURES[f].low < 0 for f in columns):
        g.add("Max", ["request_unclipped", g.constant("request_low", -limits)], "request_below")
        g.add("Min", ["request_below", g.constant("request_high", limits)], "request")
    else:
        g.add("Min", ["request_unclipped", g.constant("request_high", limits)], "request")


class _Graph:
    """Nodes and constants, in the order in which they are added."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray | float) -> str:
        """Float32, or int64 where it is an array of integers. Returns the name."""
        array = np.asarray(value)
        kind = np.int64 if array.dtype.kind == "i" else np.float32
        self._constants.append(numpy_helper.from_array(array.astype(kind), name))
        return name

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Returns the name of the output."""
        self._nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def serialised(self) -> bytes:
        """The model, from `rows` to `scores`."""
        graph = helper.make_graph(
            self._nodes,
            "steersman-scorer",
            [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["candidates", WIDTH])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["candidates"])],
            self._constants,
        )
        model = helper.make_model(
            graph,
            producer_name="steersman",
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )
        onnx.checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString(deterministic=True))


def export_bundle(path: Path, *, architecture: Architecture, weights: np.ndarray, name: str, **facts: Any) -> None:
    """Write the scorer as a policy bundle; `facts` as for `runtime.bundle.write_bundle`.

    path: a folder, or a file ending in `.zip`.

    Raises:
        UserError: the weights do not fit or are not finite, or `path` cannot be written.
    """
    graph = onnx_graph(architecture, weights)
    write_bundle(path, graph=graph, architecture=architecture, weights=weights, name=name, **facts)
