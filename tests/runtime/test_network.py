"""Facts about the learned scorer's compiled form and its packing."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from encoded import situations
from pydantic import ValidationError

from steersman.runtime import manifest
from steersman.runtime.errors import UserError
from steersman.runtime.network import (
    NORM_WIDTH,
    NORMALISER,
    SCALE,
    Architecture,
    behind,
    compiled_policy,
    normalise,
    pack,
    parameters,
    split,
    unpack,
)
from steersman.runtime.observation import CANDIDATE_FEATURES, COLUMN, FEATURES, WIDTH
from steersman.runtime.policy import NEVER

SHAPES = [
    Architecture(),
    Architecture(gates=()),
    Architecture(hidden=(32,)),
    Architecture(hidden=(64, 16, 8)),
]


def reference(architecture: Architecture, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The formula, as plainly as numpy allows."""
    z = rows.astype(float) / SCALE
    y = np.clip(z / (1 + z * z) ** 0.375, -10, 10) / NORM_WIDTH
    bilinear, *layers = split(architecture, weights)
    gates = np.column_stack([np.ones(len(rows)), *(y[:, COLUMN[name]] for name in architecture.gates)])
    scores = np.einsum("cf,fg,cg->c", y[:, :CANDIDATE_FEATURES], bilinear, gates)
    if layers:
        hidden = y
        for weight, bias in zip(layers[0:-1:2], layers[1:-1:2], strict=True):
            hidden = np.tanh(hidden @ weight + bias)
        scores += hidden @ layers[-1]
    return scores


def random_weights(architecture: Architecture, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=parameters(architecture))


@pytest.mark.parametrize("architecture", SHAPES, ids=str)
def test_weights_behind_a_gate_count_only_where_it_is_not_zero(architecture: Architecture) -> None:
    weights, column = random_weights(architecture), COLUMN["slo_guessed"]
    others = np.where(behind(architecture, "slo_guessed"), 7.0, weights)
    assert (others != weights).sum() == (CANDIDATE_FEATURES if architecture.gates else 0)
    for rows, _ in situations(20):
        shut, open_ = rows.copy(), rows.copy()
        shut[:, column], open_[:, column] = 0, 1
        assert (reference(architecture, weights, shut) == reference(architecture, others, shut)).all()
        if architecture.gates:
            assert (reference(architecture, weights, open_) != reference(architecture, others, open_)).any()


@pytest.mark.parametrize("architecture", SHAPES, ids=str)
def test_the_compiled_scorer_computes_the_formula(architecture: Architecture) -> None:
    weights = random_weights(architecture)
    bound = compiled_policy(architecture, weights, "learned").bind()
    for rows, mask in situations(200):
        scores = bound.score(rows, mask)
        expected = reference(architecture, weights, rows)
        np.testing.assert_allclose(scores[mask], expected[mask], rtol=1e-5, atol=1e-4)  # it is in float32
        assert (scores[~mask] == NEVER).all()


def test_the_bilinear_score_of_shed_is_zero() -> None:
    bound = compiled_policy(Architecture(), random_weights(Architecture()), "learned").bind()
    assert all(bound.score(rows, mask)[-1] == 0.0 for rows, mask in situations(100))


def test_a_decision_leaves_the_seed_alone_and_no_trace_in_later_ones() -> None:
    policy = compiled_policy(SHAPES[-1], random_weights(SHAPES[-1]), "learned")
    used = policy.bind(seed=7)
    for rows, mask in situations(20):
        assert (used.score(rows, mask) == policy.bind(seed=7).score(rows, mask)).all()
    assert used.memory[0] == 7


def test_a_nan_in_a_replica_spoils_only_its_own_score() -> None:
    bound = compiled_policy(SHAPES[2], random_weights(SHAPES[2]), "learned").bind()
    rows, _ = next(situations(1))
    mask = np.ones(len(rows), np.bool_)
    rows[0, COLUMN["predicted_ttft"]] = np.nan
    assert np.isnan(bound.score(rows, mask)).tolist() == [True] + [False] * (len(rows) - 1)


@pytest.mark.parametrize("architecture", SHAPES, ids=str)
def test_unpacking_gives_back_what_was_packed(architecture: Architecture) -> None:
    weights = random_weights(architecture)
    found, values = unpack(pack(architecture, weights))
    assert found == architecture
    assert (values == weights).all()


def test_the_wrong_number_of_weights_is_refused() -> None:
    with pytest.raises(UserError, match=r"has 145 weights, but the array given has the shape \(3,\)"):
        pack(Architecture(), np.zeros(3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gates": ["ttft_sloo"]}, "did you mean 'ttft_slo'"),
        ({"gates": ["inflight"]}, "is no request feature"),
        ({"gates": ["burst", "burst"]}, "stands twice"),
        ({"hidden": [0]}, "1 to 1024"),
        ({"depth": 2}, "Extra inputs"),
    ],
)
def test_an_impossible_architecture_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Architecture.model_validate(wrong)


def test_every_feature_is_normalised_to_the_order_of_one() -> None:
    rows = np.concatenate([rows[:-1][mask[:-1]] for rows, mask in situations(500)])
    size = np.abs(normalise(rows))
    present = size.max(axis=0) > 0
    typical = np.array([np.median(column[column > 0]) for column in size[:, present].T])
    names = np.array([f.name for f in FEATURES])[present]
    assert present.sum() > WIDTH - 4
    assert not dict(zip(names[typical > 2.5], typical[typical > 2.5], strict=True))
    assert not dict(zip(names[typical < 0.05], typical[typical < 0.05], strict=True))


def test_the_normaliser_is_that_of_the_bundle_format() -> None:
    # Where a number in NORMALISER was changed on purpose: raise manifest.FORMAT, then adapt this digest. Features that
    # are added or removed change the observation schema, by which old bundles are refused: adapt the digest only.
    digest = hashlib.sha256(repr(sorted(NORMALISER.items())).encode()).hexdigest()[:16]
    assert (manifest.FORMAT, digest) == (2, "6215d8b5412560c9")
