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
from steersman.runtime.observation import CANDIDATE_FEATURES, WIDTH
from steersman.runtime.scoring import LIMIT

OPSET, IR_VERSION = 17, 8  # old enough for ONNX Runtime 1.12 and later


def onnx_graph(architecture: Architecture, weights: np.ndarray) -> bytes:
    """The scorer as a serialised ONNX model, normaliser inside, shaped for speed under ONNX Runtime.

    The gates, which depend on the request alone, are from the last row. Candidates stand in columns, for operators are
    slow along short rows. Inputs must be within the ranges of the observation's schema.

    Raises:
        UserError: the number of weights does not fit the architecture, or a weight is not finite.
    """
    bilinear, *layers = split(architecture, weights)
    g, gates = _Graph(), architecture.gate_columns
    columns = [*range(CANDIDATE_FEATURES), *(range(CANDIDATE_FEATURES, WIDTH) if layers else gates)]
    g.add("Gemm", [g.constant("picked", np.diag(1.0 / SCALE)[columns]), "rows"], "scaled", transB=1)
    _squash(g, "scaled", "features")  # (columns, candidates); the division by the widths is in the weights
    bilinear = bilinear / NORM_WIDTH[:CANDIDATE_FEATURES, None]
    own = np.zeros((1, len(columns)))
    own[0, :CANDIDATE_FEATURES] = bilinear[:, 0]
    gated = g.constant("bilinear", own)
    if gates:
        by_gate = np.zeros((len(columns), len(columns)))
        by_gate[[columns.index(f) for f in gates], :CANDIDATE_FEATURES] = (bilinear[:, 1:] / NORM_WIDTH[gates]).T
        g.add("Gather", ["features", g.constant("last", np.array([-1]))], "request", axis=1)  # (columns, 1)
        gated = g.add("Gemm", ["request", g.constant("by_gate", by_gate), gated], "gated", transA=1)  # (1, columns)
    terms = g.add("MatMul", [gated, "features"], "terms")  # (1, candidates)

    inputs = "features"
    for i in range(len(architecture.hidden)):
        weight, bias = layers[2 * i], g.constant(f"bias{i}", layers[2 * i + 1][:, None])
        if i == 0:
            weight = weight / NORM_WIDTH[:, None]
        g.add("Gemm", [g.constant(f"weight{i}", weight.T), inputs, bias], f"linear{i}")  # (units, candidates)
        inputs = g.add("Tanh", [f"linear{i}"], f"hidden{i}")
    if layers:
        terms = g.add("Gemm", [g.constant("output", layers[-1][None]), inputs, terms], "both")
    g.add("Squeeze", [terms, g.constant("first", np.array([0]))], "scores")
    return g.serialised()


def _squash(g: _Graph, z: str, output: str) -> None:
    """`network.squash`; the nodes between are named after `z`."""
    more = g.add("Add", [g.add("Mul", [z, z], f"{z}_square"), g.constant(f"{z}_one", 1.0)], f"{z}_more")
    root = g.add("Sqrt", [g.add("Sqrt", [more], f"{z}_root")], f"{z}_fourth_root")
    divisor = g.add("Mul", [root, g.add("Sqrt", [root], f"{z}_eighth_root")], f"{z}_divisor")
    limits = [g.constant(f"{z}_low", -LIMIT), g.constant(f"{z}_high", LIMIT)]
    g.add("Clip", [g.add("Div", [z, divisor], f"{z}_unclipped"), *limits], output)


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
