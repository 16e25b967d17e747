"""The fit behind `llmd-latency`."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import fleet

from steersman.agents.heuristics.llmd_latency import CONTEXT, TERMS
from steersman.agents.policies import resolve
from steersman.runtime.configs import find_config
from steersman.runtime.observation import COLUMN, WIDTH
from steersman.runtime.workload import load_workload
from steersman.training.latency_fit import fit, fit_both, sample, spec


def random_rows(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = np.zeros((count, WIDTH), np.float32)
    for name, high in (
        ("kv_use", 1),
        ("prompt_tokens", 8000),
        ("waiting", 30),
        ("running", 100),
        ("context_tokens", 1e5),
    ):
        rows[:, COLUMN[name]] = rng.uniform(0, high, count)
    rows[:, COLUMN["matched_tokens"]] = rows[:, COLUMN["prompt_tokens"]] * rng.uniform(0, 1, count)
    return rows


def test_a_line_is_found_again() -> None:
    rows = random_rows(500)
    b = np.array([0.02, 0.5, 1e-4, 0.03, 1e-3, -0.2, 2e-6])
    match = rows[:, COLUMN["matched_tokens"]] / rows[:, COLUMN["prompt_tokens"]]
    columns = [rows[:, COLUMN[n]] for n in ("kv_use", "prompt_tokens", "waiting", "running")]
    x = np.column_stack([np.ones(500), *columns, match, rows[:, CONTEXT]])
    line = fit(rows, CONTEXT, x @ b)
    assert line.coefficients == pytest.approx(b, rel=1e-3)
    assert line.explained == pytest.approx(1.0)


def test_a_term_that_never_varies_gets_no_weight() -> None:
    rows = random_rows(100)
    rows[:, COLUMN["waiting"]] = 3.0
    line = fit(rows, CONTEXT, np.asarray(rows[:, COLUMN["running"]], float))
    assert line.coefficients[TERMS.index("waiting")] == 0.0
    assert np.isfinite(line.coefficients).all()


def test_what_is_fitted_is_a_policy_that_predicts_better_than_the_mean() -> None:
    workload = load_workload(find_config("workloads", "smoke"))
    samples = sample(workload, fleet({}, {"profile": "llama-3.1-8b-l40s-bf16"}), dispatchers=("random",), loads=(1, 40))
    ttft, tpot = fit_both(samples)
    assert 0.0 < ttft.explained <= 1.0
    assert 0.0 < tpot.explained <= 1.0
    policy = resolve(spec(ttft, tpot))
    assert policy.values[:7] == pytest.approx(ttft.coefficients, rel=1e-3)
    assert policy.values[7:14] == pytest.approx(tpot.coefficients, rel=1e-3)
