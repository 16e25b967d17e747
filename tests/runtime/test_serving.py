"""The graph under ONNX Runtime, as the gateway runs it."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.runtime.bundle import probes
from steersman.runtime.network import Architecture, compiled_policy, parameters
from steersman.runtime.observation import COLUMN
from steersman.runtime.serving import OnnxPolicy
from steersman.training.export import onnx_graph

ARCHITECTURES = [
    Architecture(),
    Architecture(gates=()),
    Architecture(hidden=(8, 4)),
    Architecture(gates=(), hidden=(8,)),
]


def weights_of(architecture: Architecture) -> np.ndarray:
    return np.random.default_rng(0).normal(size=parameters(architecture)).astype(np.float32).astype(float)


def policy(architecture: Architecture = ARCHITECTURES[0]) -> OnnxPolicy:
    return OnnxPolicy("learned", onnx_graph(architecture, weights_of(architecture)), "here")


def allowed(rows: np.ndarray) -> np.ndarray:
    return np.ones(len(rows), np.bool_)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_every_part_of_the_formula_is_in_the_graph(architecture: Architecture) -> None:
    served, compiled = policy(architecture), compiled_policy(architecture, weights_of(architecture), "learned").bind()
    for rows in probes():
        expected = compiled.score(rows, allowed(rows))
        assert served.score(rows, allowed(rows)) == pytest.approx(expected, abs=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("column", ["inflight", "ttft_slack", "kv_headroom"])
def test_a_nan_of_a_replica_spoils_its_score_wherever_it_stands(column: str) -> None:
    rows, served = probes()[-3], policy()
    for c in range(len(rows) - 1):
        spoilt = rows.copy()
        spoilt[c, COLUMN[column]] = np.nan
        assert np.flatnonzero(np.isnan(served.score(spoilt, allowed(rows)))).tolist() == [c]


def test_an_array_that_is_filled_anew_is_scored_anew() -> None:
    served, (first, second) = policy(), (probes()[6].copy(), probes()[7])
    before = served.score(first, allowed(first))
    expected = policy().score(second, allowed(second))
    first[:] = second
    assert served.score(first, allowed(first)).tolist() == expected.tolist()
    assert before.tolist() != expected.tolist()


def test_arrays_of_other_sizes_layouts_and_types_take_turns() -> None:
    served, rows = policy(), probes()[6]
    expected = served.score(rows, allowed(rows)).tolist()
    for other in (rows.copy(), np.asfortranarray(rows), rows.astype(np.float64), rows[::-1][::-1]):
        assert served.score(probes()[0], allowed(probes()[0])).shape == (2,)
        assert served.score(other, allowed(rows)).tolist() == expected
        other[:, COLUMN["inflight"]] = 0.0
        assert served.score(other, allowed(rows)).tolist() != expected
