"""Directions of learning the scorer's weights: a step along any of them changes its decisions alike.

The features of candidates are large and small, and go together: steps of one size in all weights mostly move the score
along the few directions in which features differ most, and hardly ever along the others. So steps are drawn in the
space of scores and turned into weights by the root of the inverse covariance of what the weights multiply: the metric
of the natural gradient (Amari, 1998), at the start of the search. PPO steps along them as well, those of the
decisions that it learns from.
"""

from __future__ import annotations

import numpy as np
import torch

from steersman.agents.scorer import Scorer, candidates
from steersman.runtime.network import Architecture, behind
from steersman.runtime.observation import COLUMN
from steersman.training.imitate import record
from steersman.training.job import TRAINING, Job

RIDGE = 0.01  # times the largest variance: directions in which features differ by less are not stretched to match
DECISIONS = 6000


def directions(job: Job, start: np.ndarray, guessed: bool = False) -> np.ndarray:
    """What turns the numbers z of a search, near 0, into weights `start` + directions @ z: (P, Z).

    Z weights of P are searched: those that count only where SLOs are guesses, or with `guessed` no others. The
    decisions are those that the scorer with weights `start` meets. Where each z has the standard deviation sigma,
    scores change as much, in the mean square, as if each weight changed by sigma typical weights.
    """
    config = job.config
    rows, _ = record(job.learned(start, "start"), job.fleet, job.episodes(TRAINING, len(config.loads)))
    rows = some(rows, config.seed)
    rows[..., COLUMN["slo_guessed"]] = guessed
    spread = covariance(rows, config.architecture)
    kept = behind(config.architecture, "slo_guessed")
    searched = kept if guessed else ~kept
    bilinear = np.flatnonzero(searched[: len(spread)])
    found = np.eye(len(start))  # an MLP's weights are searched as they are
    found[np.ix_(bilinear, bilinear)] = whitening(spread[np.ix_(bilinear, bilinear)])
    return float(np.sqrt(np.mean(start[~kept] ** 2))) * found[:, searched]


def alike(rows: np.ndarray, architecture: Architecture, seed: int) -> np.ndarray:
    """For the bilinear weights, of decisions (D, C, WIDTH): (B, B). Weights that make no difference are let be."""
    spread = covariance(some(rows, seed), architecture)
    found, never = whitening(spread), np.flatnonzero(np.diagonal(spread) == 0)
    found[never], found[:, never] = 0.0, 0.0
    found[never, never] = 1.0
    return found


def some(rows: np.ndarray, seed: int) -> np.ndarray:
    """A copy of as many of the decisions as a covariance needs."""
    drawn = np.random.default_rng(seed).permutation(len(rows))[:DECISIONS]
    return rows[np.sort(drawn)]


def covariance(rows: np.ndarray, architecture: Architecture) -> np.ndarray:
    """Of what the bilinear weights multiply, between the candidates of a decision: (B, B) from rows (D, C, WIDTH)."""
    with torch.no_grad():
        seen = torch.from_numpy(rows)
        real = candidates(seen)[..., None]
        inputs = Scorer(architecture).inputs(seen).double() * real
        centred = (inputs - inputs.sum(1, keepdim=True) / real.sum(1, keepdim=True)) * real
        flat = centred.flatten(0, 1)
        return np.asarray((flat.T @ flat / real.sum()).numpy())


def whitening(covariance: np.ndarray) -> np.ndarray:
    """The root of its inverse, (B, B), with a ridge; scaled to keep the mean square of scores."""
    variances, axes = np.linalg.eigh(covariance)
    if variances[-1] <= 0:
        return np.eye(len(covariance))
    root = (axes / np.sqrt(np.maximum(variances, 0) + RIDGE * variances[-1])) @ axes.T
    scale = np.sqrt(np.trace(covariance) / np.trace(root @ covariance @ root))
    return np.asarray(scale * root)
