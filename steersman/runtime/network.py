"""The learned scorer: one small network applied to every candidate.

With x the F normalised candidate features, r the normalised request features, and G gates g = [1, some of r]:

    score = Σ_fg W[f, g]·x_f·g_g + MLP([x, r])          MLP: tanh layers and a linear output; none by default
    normalised = squash(raw / scale) / width                         squash(z) = z / (1 + z²)^⅜, clipped to ±LIMIT

On the shed row every x is zero and so is its bilinear part: the weights of `is_replica`, times the gates, are
a threshold for shedding that depends on the request. On the hold row only `is_hold` and `patience` are not zero. No
feature is shifted by a mean, which would break this.
The MLP has no output bias: one would add the same number to every candidate.

The network stands in three forms: compiled (`scoring.py`), torch (`agents/scorer.py`) and ONNX
(`training/export.py`). Tests hold them to the same choices.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from pydantic import Field, field_validator

from steersman.runtime.config import Model
from steersman.runtime.errors import UserError
from steersman.runtime.observation import CANDIDATE_FEATURES, COLUMN, FEATURES, REQUEST, WIDTH
from steersman.runtime.plugins import nearest
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.scoring import HEADER, LIMIT, PADDED, SCRATCH, score


class Range(NamedTuple):
    """How to normalise a feature: linear below `scale`, by its fourth root far beyond, and 1 at `typical`."""

    scale: float
    typical: float


_SLACK, _CHANCE, _NEAR_ONE = Range(0.25, 1.0), Range(0.5, 1.0), Range(1.0, 1.0)
# A part of the bundle's format: with other numbers the weights of old bundles mean something else, so that a
# change needs a new `manifest.FORMAT`.
NORMALISER = {
    "is_replica": Range(1.0, 1.0),
    "inflight": Range(8.0, 32.0),
    "prefilling": Range(2.0, 8.0),
    "prefill_ahead": Range(1000.0, 4000.0),
    "context_tokens": Range(10_000.0, 40_000.0),
    "running": Range(8.0, 32.0),
    "waiting": Range(2.0, 8.0),
    "kv_use": Range(0.25, 0.5),
    "metrics_age": Range(0.5, 1.0),
    "matched_tokens": Range(1000.0, 2000.0),
    "uncached_tokens": Range(1000.0, 2000.0),
    "kv_tokens": Range(100_000.0, 200_000.0),
    "max_num_seqs": Range(64.0, 256.0),
    "prefill_speed": Range(10_000.0, 20_000.0),
    "decode_step": Range(0.02, 0.03),
    "prefill_time": Range(0.02, 0.1),
    "predicted_ttft": Range(0.05, 0.5),
    "predicted_tpot": Range(0.02, 0.03),
    "ttft_slack": _SLACK,
    "tpot_slack": _SLACK,
    "ttft_chance": _CHANCE,
    "tpot_chance": _CHANCE,
    "kv_headroom": Range(0.25, 0.75),
    "prefill_load": Range(0.25, 0.5),
    "others_harmed": Range(2.0, 8.0),
    "others_lost": Range(2.0, 8.0),
    "price": Range(1.0, 2.0),
    "is_hold": Range(1.0, 1.0),
    "patience": Range(0.5, 1.0),
    "prompt_tokens": Range(1000.0, 2000.0),
    "expected_output": Range(100.0, 300.0),
    "waited": Range(0.1, 1.0),
    "ttft_slo": Range(0.5, 2.0),
    "tpot_slo": Range(0.03, 0.1),
    "tenant_weight": Range(1.0, 1.0),
    "tenant_attainment": _NEAR_ONE,
    "worst_attainment": _NEAR_ONE,
    "priority": Range(1.0, 1.0),
    "burst": Range(1.0, 1.0),
    "best_ttft_slack": _SLACK,
    "best_tpot_slack": _SLACK,
    "mean_ttft_slack": _SLACK,
    "occupancy": Range(0.25, 0.5),
    "held": Range(4.0, 32.0),
    "slo_guessed": Range(1.0, 1.0),
}


def squash(z: ndarray) -> ndarray:
    """z / (1 + z²)^⅜, clipped: much like a logarithm, of operations that are fast for many numbers at once."""
    return np.clip(z / (1.0 + z * z) ** 0.375, -LIMIT, LIMIT)


SCALE = np.array([NORMALISER[f.name].scale for f in FEATURES])
NORM_WIDTH = squash(np.array([NORMALISER[f.name].typical for f in FEATURES]) / SCALE)


class Architecture(Model):
    """The scorer's shape."""

    gates: tuple[str, ...] = Field(
        default=("ttft_slo", "tpot_slo", "prompt_tokens", "slo_guessed"),
        description="request features that the weights of the candidate features depend on",
    )
    hidden: tuple[int, ...] = Field(default=(), max_length=4, description="units of the MLP's layers; [] for none")

    @field_validator("gates")
    @classmethod
    def _known(cls, gates: tuple[str, ...]) -> tuple[str, ...]:
        known = [feature.name for feature in REQUEST]
        for i, name in enumerate(gates):
            if name not in known:
                raise ValueError(f"{name!r} is no request feature; {nearest(name, known)}")
            if name in gates[:i]:
                raise ValueError(f"{name!r} stands twice")
        return gates

    @field_validator("hidden")
    @classmethod
    def _sane(cls, hidden: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 1 <= size <= 1024 for size in hidden):
            raise ValueError("each layer must have 1 to 1024 units")
        return hidden

    @property
    def gate_columns(self) -> list[int]:
        return [COLUMN[name] for name in self.gates]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the weights, in order: W (F, G); (inputs, units) and (units,) a layer; the output's (units,)."""
        shapes: list[tuple[int, ...]] = [(CANDIDATE_FEATURES, 1 + len(self.gates))]
        inputs = WIDTH
        for units in self.hidden:
            shapes += [(inputs, units), (units,)]
            inputs = units
        return [*shapes, (inputs,)] if self.hidden else shapes


def parameters(architecture: Architecture) -> int:
    """How many trainable weights there are."""
    return sum(math.prod(shape) for shape in architecture.shapes)


def behind(architecture: Architecture, gate: str) -> ndarray:
    """Which weights count only where the request feature `gate` is not zero: bool (parameters,); none of an MLP's."""
    found = np.zeros(parameters(architecture), bool)
    if gate in architecture.gates:
        split(architecture, found)[0][:, 1 + architecture.gates.index(gate)] = True
    return found


def normalise(rows: ndarray) -> ndarray:
    """Raw observations (…, WIDTH) as the network sees them, float64."""
    return squash(rows / SCALE) / NORM_WIDTH


def split(architecture: Architecture, weights: ndarray) -> list[ndarray]:
    """The vector of weights as arrays of `architecture.shapes`; views of it.

    Raises:
        UserError: it has another length, or a weight is not finite.
    """
    vector = np.asarray(weights)
    if vector.shape != (parameters(architecture),):
        raise UserError(
            f"a scorer of this architecture has {parameters(architecture)} weights, but the array "
            f"given has the shape {vector.shape}; give the architecture that it was trained with"
        )
    if not np.isfinite(vector).all():
        raise UserError(f"{(~np.isfinite(vector)).sum()} of {len(vector)} weights are not finite; train again")
    arrays, at = [], 0
    for shape in architecture.shapes:
        arrays.append(vector[at : at + math.prod(shape)].reshape(shape))
        at += math.prod(shape)
    return arrays


VERSION = 2  # of the layout of `params`


@functools.lru_cache(maxsize=64)
def _header(architecture: Architecture) -> ndarray:
    """Everything in `params` before the weights."""
    sizes = [*architecture.gate_columns, *architecture.hidden]
    length = HEADER + len(sizes) + 2 * WIDTH
    counts = [len(architecture.gates), len(architecture.hidden), max(architecture.hidden, default=0)]
    header = [VERSION, length, *counts, parameters(architecture), *sizes]
    packed = np.concatenate([np.array(header, float), 1.0 / SCALE, 1.0 / NORM_WIDTH])
    packed.flags.writeable = False
    return packed


def pack(architecture: Architecture, weights: ndarray) -> ndarray:
    """`params` of the compiled function, float64: the header, then the weights, the bilinear ones gate by gate. Cheap.

    Raises:
        UserError: the number of weights does not fit the architecture.
    """
    header = _header(architecture)
    if len(weights) != header[5]:
        split(architecture, weights)
    vector, shape = np.asarray(weights, np.float64), architecture.shapes[0]
    bilinear = math.prod(shape)
    padded = np.zeros((shape[1], PADDED))
    padded[:, :CANDIDATE_FEATURES] = vector[:bilinear].reshape(shape).T
    return np.concatenate([header, padded.ravel(), vector[bilinear:]])


def unpack(params: ndarray) -> tuple[Architecture, ndarray]:
    """The architecture and the weights that `pack` made `params` from.

    Raises:
        UserError: `params` have the layout of another version.
    """
    version, length, gates, layers = (int(value) for value in params[:4])
    if version != VERSION:
        raise UserError(f"packed weights of layout {version}, but this version reads {VERSION}; train again")
    columns = params[HEADER : HEADER + gates].astype(int)
    hidden = params[HEADER + gates : HEADER + gates + layers].astype(int)
    architecture = Architecture(gates=tuple(FEATURES[i].name for i in columns), hidden=tuple(hidden.tolist()))
    rest = length + (1 + gates) * PADDED
    bilinear = params[length:rest].reshape(1 + gates, PADDED)[:, :CANDIDATE_FEATURES]
    return architecture, np.concatenate([bilinear.T.ravel(), params[rest:]])


def memory_size(architecture: Architecture) -> int:
    """Scratch of the compiled function: the seed, what is single precision, and three layers."""
    return SCRATCH + 3 * max(architecture.hidden, default=0)


def compiled_policy(
    architecture: Architecture, weights: ndarray, name: str, summary: str = "The learned scorer."
) -> CompiledPolicy:
    """The scorer as a policy, for the simulator's compiled loop.

    Raises:
        UserError: the number of weights does not fit the architecture.
    """
    values = pack(architecture, weights)
    return CompiledPolicy(name, summary, score, memory_size=memory_size(architecture), values=values)
