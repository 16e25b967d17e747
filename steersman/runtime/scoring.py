"""The learned scorer as a compiled function. Its formula stands in `network.py`.

`params`, one flat vector made by `network.pack`:
    version, header's length, gates, layers, widest layer, number of weights,
    column of each gate, units of each layer,
    1 / scale (WIDTH,), 1 / width (WIDTH,),
    the weights in the order of `Architecture.shapes`
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.observation import CANDIDATE_FEATURES, WIDTH
from steersman.runtime.policy import NEVER, SCORE

HEADER = 6  # numbers before the gates' columns
LIMIT = 10.0


# Over slices, so that indices start at zero and the loops become vector instructions.
@njit
def _normalise(raw: ndarray, inverse_scale: ndarray, inverse_width: ndarray, normalised: ndarray) -> None:
    """squash(raw / scale) / width of each; NaN stays NaN."""
    for j in range(len(raw)):
        z = raw[j] * inverse_scale[j]
        root = np.sqrt(np.sqrt(1.0 + z * z))
        y = z / (root * np.sqrt(root))
        y = LIMIT if y > LIMIT else y
        y = -LIMIT if y < -LIMIT else y
        normalised[j] = y * inverse_width[j]


@njit
def _copy(source: ndarray, target: ndarray) -> None:
    for j in range(len(source)):
        target[j] = source[j]


@njit
def _add(factor: float, source: ndarray, target: ndarray) -> None:
    for j in range(len(source)):
        target[j] += factor * source[j]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    """Score the candidates that the mask allows. `params` from `pack`, `memory` of `memory_size` or more."""
    length, gates, layers, widest = int(params[1]), int(params[2]), int(params[3]), int(params[4])
    columns = params[HEADER : HEADER + gates]
    hidden = params[HEADER + gates : HEADER + gates + layers]
    inverse_scale = params[length - 2 * WIDTH : length - WIDTH]
    inverse_width = params[length - WIDTH : length]
    weights = params[length:]
    features = memory[1 : 1 + WIDTH]
    gated = memory[1 + WIDTH : 1 + WIDTH + CANDIDATE_FEATURES]
    scratch = memory[1 + WIDTH + CANDIDATE_FEATURES :]
    first, odd, even = scratch[:widest], scratch[widest : 2 * widest], scratch[2 * widest : 3 * widest]
    shed = len(scores) - 1

    # What depends on the request alone is computed once: the gated weights, and its part of the first layer.
    k = CANDIDATE_FEATURES
    _normalise(rows[shed, k:], inverse_scale[k:], inverse_width[k:], features[k:])
    for f in range(CANDIDATE_FEATURES):
        at = f * (1 + gates)
        gated[f] = weights[at]
        for g in range(gates):
            gated[f] += weights[at + 1 + g] * features[int(columns[g])]
    mlp = weights[CANDIDATE_FEATURES * (1 + gates) :]
    if layers > 0:
        units = int(hidden[0])
        _copy(mlp[WIDTH * units : (WIDTH + 1) * units], first)
        for f in range(CANDIDATE_FEATURES, WIDTH):
            _add(features[f], mlp[f * units : (f + 1) * units], first)

    for c in range(shed + 1):
        if not mask[c]:
            scores[c] = NEVER
            continue
        _normalise(rows[c, :k], inverse_scale[:k], inverse_width[:k], features[:k])
        total = 0.0
        for f in range(k):
            total += gated[f] * features[f]
        if layers > 0:
            units = int(hidden[0])
            _copy(first[:units], odd)
            for f in range(CANDIDATE_FEATURES):
                if features[f] != 0.0:
                    _add(features[f], mlp[f * units : (f + 1) * units], odd)
            rest = mlp[(WIDTH + 1) * units :]
            for layer in range(1, layers):
                inputs, units = units, int(hidden[layer])
                _copy(rest[inputs * units : (inputs + 1) * units], even)
                for i in range(inputs):
                    _add(np.tanh(odd[i]), rest[i * units : (i + 1) * units], even)
                _copy(even[:units], odd)
                rest = rest[(inputs + 1) * units :]
            for j in range(units):
                total += np.tanh(odd[j]) * rest[j]
        scores[c] = total
