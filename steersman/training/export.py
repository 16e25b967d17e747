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


def onnx_graph(architecture: Architecture, weights: np.ndarray) -> bytes:
    """The scorer as a serialised ONNX model, normaliser inside.

    It is shaped for speed under ONNX Runtime, whose Asinh is slow and whose broadcasting is slow along short rows:

    - What depends on the request alone is computed once, from the last row.
    - Candidates stand in columns. One product with constants selects their features and scales them; a feature that
      can be negative appears twice, with either sign. Hence asinh(x) = log(x + √(x² + 1)) for x ≥ 0 alone, where it
      loses no digits, and 0 for the half that is negative.

    Inputs must be within the ranges of the observation's schema.

    Raises:
        UserError: the number of weights does not fit the architecture, or a weight is not finite.
    """
    bilinear, *layers = split(architecture, weights)
    sides = [(f, sign) for sign in (1.0, -1.0) for f in range(CANDIDATE_FEATURES) if sign > 0 or FEATURES[f].low < 0]
    columns, signs = np.array([f for f, _ in sides]), np.array([sign for _, sign in sides])
    scaled = np.zeros((len(sides), WIDTH))
    scaled[np.arange(len(sides)), columns] = signs / SCALE[columns]
    # Of the weights of a feature that appears twice, one has the other sign.
    unit = signs / NORM_WIDTH[columns]
    g = _Graph()
    g.add("Gemm", [g.constant("scaled", scaled), "rows"], "signed", transB=1)  # (sides, candidates)
    g.add("Relu", ["signed"], "raw")
    g.add("Mul", ["raw", "raw"], "square")
    g.add("Add", ["square", g.constant("one", 1.0)], "more")
    g.add("Sqrt", ["more"], "root")
    g.add("Add", ["raw", "root"], "sum")
    g.add("Log", ["sum"], "unclipped")
    g.add("Min", ["unclipped", g.constant("limits", LIMIT * NORM_WIDTH[columns, None])], "features")

    request = list(range(CANDIDATE_FEATURES, WIDTH)) if layers else architecture.gate_columns
    gated = ungated = g.constant("bilinear", bilinear[columns, 0][None] * unit)
    if request:
        picked = np.zeros((WIDTH, len(request)))
        picked[request, np.arange(len(request))] = 1.0 / SCALE[request]
        g.add("Gather", ["rows", g.constant("last", np.array([-1]))], "row", axis=0)
        g.add("MatMul", ["row", g.constant("picked", picked)], "request_scaled")
        g.add("Asinh", ["request_scaled"], "request_compressed")
        g.add("Mul", ["request_compressed", g.constant("request_unit", 1.0 / NORM_WIDTH[request])], "request_unclipped")
        g.add("Clip", ["request_unclipped", g.constant("low", -LIMIT), g.constant("high", LIMIT)], "request")
    if architecture.gates:
        by_gate = np.zeros((len(request), len(sides)))
        by_gate[[request.index(f) for f in architecture.gate_columns]] = bilinear[columns, 1:].T * unit
        gated = g.add("Gemm", ["request", g.constant("by_gate", by_gate), ungated], "gated")  # (1, sides)
    inputs = "features"
    for i in range(len(architecture.hidden)):
        weight, common = layers[2 * i], g.constant(f"bias{i}", layers[2 * i + 1][:, None])
        if i == 0:  # the request's part is a bias that all candidates have in common
            own = g.constant("request_weight", weight[CANDIDATE_FEATURES:].T)
            common = g.add("Gemm", [own, "request", common], "request_part", transB=1)
            weight = weight[columns] * unit[:, None]
        g.add("Gemm", [g.constant(f"weight{i}", weight.T), inputs, common], f"linear{i}")  # (units, candidates)
        inputs = g.add("Tanh", [f"linear{i}"], f"hidden{i}")
    if layers:
        g.add("MatMul", [gated, "features"], "terms")
        g.add("Gemm", [g.constant("output", layers[-1][None]), inputs, "terms"], "row_of_scores")
    else:
        g.add("MatMul", [gated, "features"], "row_of_scores")  # (1, candidates)
    g.add("Squeeze", ["row_of_scores", g.constant("first", np.array([0]))], "scores")
    return g.serialised()


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
