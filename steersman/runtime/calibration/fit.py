"""The fit of a cost profile's coefficients to measured steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ROUNDS = 8  # of reweighting
OUTLIER = 0.15  # relative errors beyond this count less and less: another program took the processor
FLOOR_S = 1e-6  # a profile's intercepts are positive


class Error(NamedTuple):
    """How far predicted seconds are off, as fractions."""

    median: float  # of a step, without its sign
    total: float  # of all steps together: above 0, too slow

    def __str__(self) -> str:
        return f"{100 * self.median:.0f} % a step (median), {100 * self.total:+.0f} % in all"


def terms(steps: np.ndarray) -> dict[str, np.ndarray]:
    """What each coefficient of a `CostProfile` is multiplied with, by its name; (S,) each, of STEP (S,)."""
    prefills, decoding = steps["chunks"] > 0, steps["decoding"]
    return {
        "decode_a_s": ~prefills * 1.0,
        "decode_many_s": (~prefills & (decoding > 1)) * 1.0,
        "decode_b_s_per_sequence": decoding * 1.0,
        "decode_c_s_per_token": steps["context_tokens"],
        "prefill_a_s": prefills * steps["iterations"] * 1.0,
        "prefill_b_s_per_token": steps["prefill_tokens"],
        "prefill_c_s_per_token2": steps["prefill_tokens2"],
        "prefill_d_s_per_chunk": steps["chunks"] * 1.0,
        "latency_s": steps["idle"] * 1.0,
    }


def fit(steps: np.ndarray) -> dict[str, float]:
    """The coefficients, none negative, that explain the seconds of STEP (S,) best.

    Least squares on relative errors, those of the model's own seconds: weighting by measured ones would favour those
    that came out short.
    """
    columns, seconds = terms(steps), steps["seconds"]
    matrix = np.stack(list(columns.values()), axis=1)
    weights = 1 / seconds
    for _ in range(ROUNDS):
        found = non_negative(matrix * weights[:, None], seconds * weights)
        expected = np.maximum(matrix @ found, 0.1 * seconds)
        off = np.abs(seconds / expected - 1)
        weights = np.sqrt(np.minimum(1, OUTLIER / np.maximum(off, OUTLIER))) / expected
    coefficients = dict(zip(columns, found.tolist(), strict=True))
    for name in ("decode_a_s", "prefill_a_s", "prefill_b_s_per_token"):
        coefficients[name] = max(FLOOR_S, coefficients[name])
    return {name: float(f"{value:.4g}") for name, value in coefficients.items()}


def non_negative(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares with coefficients ≥ 0: terms that come out negative are dropped, worst first."""
    kept = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(matrix[:, kept], values, rcond=None)[0]
        if found.min() >= 0:
            result = np.zeros(matrix.shape[1])
            result[kept] = found
            return result
        del kept[int(np.argmin(found))]


def error(coefficients: dict[str, float], steps: np.ndarray) -> Error:
    """The error of coefficients on STEP (S,)."""
    predicted = np.sum([column * coefficients[name] for name, column in terms(steps).items()], axis=0)
    seconds = steps["seconds"]
    return Error(float(np.median(np.abs(predicted / seconds - 1))), float(predicted.sum() / seconds.sum() - 1))
