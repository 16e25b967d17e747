"""A policy under the name by which it is deployed."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import numpy as np

from steersman.runtime.policy import Policy
from steersman.runtime.ticket import Fallback


class Release(NamedTuple):
    """A policy and its version: of a bundle its name and the start of its SHA-256, of a heuristic what it was named by.

    The policy is this release's own: it may keep memory between decisions, so that no two share one.
    """

    policy: Policy
    version: str
    summary: str = ""


def release_of(policy: Policy | Release) -> Release:
    """`policy` as it is, or under its name."""
    return policy if isinstance(policy, Release) else Release(policy, policy.name)


class Unusable(Exception):
    """A policy that is known not to work; `reason` is what its fallbacks are counted as."""

    def __init__(self, reason: Fallback, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def told_by(error: Exception) -> str:
    """What a policy's exception says, on one short line, whatever kind of exception it is."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "?"
    return f"{type(error).__name__}: {text}"[:200]


class BrokenPolicy:
    """Stands for a policy that could not be loaded when the gateway started: the fallback decides for it."""

    def __init__(self, name: str, reason: Fallback, sentence: str) -> None:
        self.name = name
        self.sentence = sentence
        self._reason = reason

    def score(self, rows: np.ndarray, mask: np.ndarray) -> NoReturn:
        raise Unusable(self._reason, self.sentence)
