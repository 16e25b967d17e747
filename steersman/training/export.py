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
    """The scorer as a serialised ONNX model, normaliser inside.

    Raises:
        UserError: the number of weights does not fit the architecture, or a weight is not finite.
    """
    bilinear, *layers = split(architecture, weights)
    gates = 1 + len(architecture.gates)
    # One matrix product gives both sides of the bilinear form: what each gate multiplies, and the gates
    # themselves, picked by ones.
    both = np.zeros((WIDTH, 2 * gates))
    both[:CANDIDATE_FEATURES, :gates] = bilinear
    both[architecture.gate_columns, np.arange(gates + 1, 2 * gates)] = 1.0
    constant = np.zeros(2 * gates)
    constant[gates] = 1.0
    constants: dict[str, np.ndarray] = {
        "scale": SCALE,
        "width": NORM_WIDTH,
        "low": np.array(-LIMIT),
        "high": np.array(LIMIT),
        "bilinear": both,
        "constant": constant,
    }
    nodes = [
        helper.make_node("Div", ["rows", "scale"], ["scaled"]),
        helper.make_node("Asinh", ["scaled"], ["compressed"]),
        helper.make_node("Div", ["compressed", "width"], ["unclipped"]),
        helper.make_node("Clip", ["unclipped", "low", "high"], ["features"]),
        helper.make_node("Gemm", ["features", "bilinear", "constant"], ["both"]),
        helper.make_node("Split", ["both"], ["candidate", "gates"], axis=1),
        helper.make_node("Mul", ["candidate", "gates"], ["products"]),
    ]
    summed, inputs = "products", "features"
    if layers:
        for i in range(len(architecture.hidden)):
            constants[f"weight{i}"], constants[f"bias{i}"] = layers[2 * i], layers[2 * i + 1]
            nodes.append(helper.make_node("Gemm", [inputs, f"weight{i}", f"bias{i}"], [f"linear{i}"]))
            nodes.append(helper.make_node("Tanh", [f"linear{i}"], [f"hidden{i}"]))
            inputs = f"hidden{i}"
        constants["output"] = layers[-1]
        nodes.append(helper.make_node("Mul", [inputs, "output"], ["weighted"]))
        nodes.append(helper.make_node("Concat", ["products", "weighted"], ["terms"], axis=1))
        summed = "terms"
    nodes.append(helper.make_node("ReduceSum", [summed, "axes"], ["scores"], keepdims=0))
    initialisers = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()]
    graph = helper.make_graph(
        nodes,
        "steersman-scorer",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["candidates", WIDTH])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["candidates"])],
        [*initialisers, numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    model = helper.make_model(
        graph,
        producer_name="steersman",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def export_bundle(path: Path, *, architecture: Architecture, weights: np.ndarray, name: str, **facts: Any) -> None:
    """Write the scorer as a policy bundle; `facts` as for `runtime.bundle.write_bundle`.

    path: a folder, or a file ending in `.zip`.

    Raises:
        UserError: the weights do not fit or are not finite, or `path` cannot be written.
    """
    graph = onnx_graph(architecture, weights)
    write_bundle(path, graph=graph, architecture=architecture, weights=weights, name=name, **facts)
