"""The learned scorer as a compiled function. Its formula stands in `network.py`.

`params`, one flat vector made by `network.pack`:
    version, header's length, gates, layers, widest layer, number of weights,
    column of each gate, units of each layer,
    1 / scale (WIDTH,), 1 / width (WIDTH,),
    the bilinear weights, (1 + gates, PADDED), 0 at the end of each; the others in the order of `Architecture.shapes`

Features and bilinear parts are float32, as in the graph: twice as many fit into a vector instruction. Sums have a fixed
order, so that they are the same whatever the processor's vectors.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.observation import CANDIDATE_FEATURES, WIDTH
from steersman.runtime.policy import NEVER, SCORE

HEADER = 6  # numbers before the gates' columns
LIMIT = 10.0
LANES = 8  # partial sums of a candidate's score; `_sum` says what adds to what
PADDED = -(-CANDIDATE_FEATURES // LANES) * LANES  # columns of a row that are scored, those of the request by 0
_SINGLES = 3 * WIDTH + 2 * PADDED  # float32 numbers of scratch
SCRATCH = 1 + (_SINGLES + 1) // 2  # float64 numbers of memory, the seed's among them, before those of the MLP
_ZERO, _ONE, _LIMIT = np.float32(0.0), np.float32(1.0), np.float32(LIMIT)


# Inlined: called, they would take half of a decision. Over slices, so that indices start at zero and the loops become
# vector instructions.
@njit(forceinline=True)
def _squash(z: np.float32) -> np.float32:
    """z / (1 + z²)^⅜, clipped; NaN stays NaN."""
    root = np.sqrt(np.sqrt(_ONE + z * z))
    y = z / (root * np.sqrt(root))
    y = _LIMIT if y > _LIMIT else y
    return -_LIMIT if y < -_LIMIT else y


@njit(forceinline=True)
def _normalise(raw: ndarray, inverse_scale: ndarray, inverse_width: ndarray, normalised: ndarray) -> None:
    for j in range(len(raw)):
        normalised[j] = _squash(raw[j] * inverse_scale[j]) * inverse_width[j]


@njit(forceinline=True)
def _copy(source: ndarray, target: ndarray) -> None:
    for j in range(len(source)):
        target[j] = source[j]


@njit(forceinline=True)
def _scale(factors: ndarray, target: ndarray) -> None:
    for j in range(len(factors)):
        target[j] *= factors[j]


@njit(forceinline=True)
def _add(factor: float, source: ndarray, target: ndarray) -> None:
    for j in range(len(source)):
        target[j] += factor * source[j]


@njit(forceinline=True)
def _sum(terms: ndarray) -> np.float32:
    """Of PADDED terms."""
    a = b = c = d = e = f = g = h = _ZERO
    for j in range(0, PADDED, LANES):
        a += terms[j]
        b += terms[j + 1]
        c += terms[j + 2]
        d += terms[j + 3]
        e += terms[j + 4]
        f += terms[j + 5]
        g += terms[j + 6]
        h += terms[j + 7]
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@njit
def _add_layers(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    """Add what the MLP says to the scores, after the bilinear part, whose features of the request are in `memory`."""
    length, gates, layers, widest = int(params[1]), int(params[2]), int(params[3]), int(params[4])
    hidden, k = params[HEADER + gates : HEADER + gates + layers], CANDIDATE_FEATURES
    mlp = params[length + PADDED * (1 + gates) :]
    single, scratch = memory[1:SCRATCH].view(np.float32), memory[SCRATCH:]
    inverse_scale, inverse_width = single[:WIDTH], single[WIDTH : 2 * WIDTH]
    features = single[2 * WIDTH : 3 * WIDTH]
    first, odd, even = scratch[:widest], scratch[widest : 2 * widest], scratch[2 * widest : 3 * widest]

    units = int(hidden[0])
    _copy(mlp[WIDTH * units : (WIDTH + 1) * units], first)
    for f in range(k, WIDTH):  # the request's part of the first layer
        _add(features[f], mlp[f * units : (f + 1) * units], first)
    for c in range(len(scores)):
        if not mask[c]:
            continue
        units = int(hidden[0])
        _normalise(rows[c, :k], inverse_scale[:k], inverse_width[:k], features[:k])
        _copy(first[:units], odd)
        for f in range(k):
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
            scores[c] += np.tanh(odd[j]) * rest[j]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    """Score the candidates that the mask allows. `params` from `pack`, `memory` of `memory_size` or more."""
    length, gates = int(params[1]), int(params[2])
    weights, k = params[length:], CANDIDATE_FEATURES
    single = memory[1:SCRATCH].view(np.float32)
    inverse_scale, inverse_width = single[:WIDTH], single[WIDTH : 2 * WIDTH]
    features = single[2 * WIDTH : 3 * WIDTH]
    gated = single[3 * WIDTH : 3 * WIDTH + PADDED]
    products = single[3 * WIDTH + PADDED : 3 * WIDTH + 2 * PADDED]
    _copy(params[length - 2 * WIDTH : length - WIDTH], inverse_scale)
    _copy(params[length - WIDTH : length], inverse_width)

    # What depends on the request alone is computed once: what each candidate feature weighs.
    _normalise(rows[-1, k:], inverse_scale[k:], inverse_width[k:], features[k:])
    _copy(weights[:PADDED], gated)
    for g in range(gates):
        _add(features[int(params[HEADER + g])], weights[(1 + g) * PADDED : (2 + g) * PADDED], gated)
    _scale(inverse_width[:PADDED], gated)

    for c in range(len(scores)):
        if not mask[c]:
            scores[c] = NEVER
            continue
        row = rows[c]
        for j in range(PADDED):
            raw = row[j]
            products[j] = _squash((raw if j < k else _ZERO) * inverse_scale[j]) * gated[j]
        scores[c] = _sum(products)
    if params[3] > 0:
        _add_layers(rows, mask, params, memory, scores)
