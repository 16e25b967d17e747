"""Asking a policy that may do anything: raise, or give something else than one finite score a candidate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from steersman.runtime.compiled import entry
from steersman.runtime.deployment.judge import NOT_FINITE, judge
from steersman.runtime.deployment.release import Unusable, told_by
from steersman.runtime.ticket import Fallback

_judge = entry(judge)
Score = Callable[[np.ndarray, np.ndarray], object]


class Asked(NamedTuple):
    """What came of it."""

    candidate: int  # below 0: none
    scores: np.ndarray | None  # float64, whatever their shape
    failure: Fallback | None
    said: str  # by its exception


def ask(score: Score, shown: tuple[np.ndarray, np.ndarray], rows: np.ndarray, mask: np.ndarray) -> Asked:
    """What `score` chooses among the candidates of `rows` float32 (C, WIDTH), `mask` bool (C,).

    shown: the rows and mask that it is called with; copies, for a policy that must not change what others see.
    """
    scores = None
    try:
        scores = np.ascontiguousarray(score(*shown), np.float64)
        if scores.shape != mask.shape:
            return Asked(-1, scores, Fallback.SHAPE, "")
        candidate = _judge(rows, mask, scores)
        if candidate >= 0:
            return Asked(candidate, scores, None, "")
        return Asked(-1, scores, Fallback.NOT_FINITE if candidate == NOT_FINITE else Fallback.RANGE, "")
    except Unusable as error:
        return Asked(-1, scores, error.reason, str(error))
    except Exception as error:  # whatever a policy throws, requests go on
        return Asked(-1, scores, Fallback.ERROR, told_by(error))
