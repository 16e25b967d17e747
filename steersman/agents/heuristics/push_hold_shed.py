"""`push-shed` that also holds: who can wait makes room for who cannot.

As in `push-shed`, the viable replica of least cost takes a request. But one whose promise is loose is held while even
that replica has no room to spare for strict ones, the less the longer it has waited; and one that no replica would
serve in time is held before it is shed, while it has patience left.

Formula, beside that of `push-shed`, whose z, viable and cost these are:
    w = predicted TPOT on the viable replica of least cost / strict_tpot_s
    hold if w > room(z) + urgency·(1 − patience), or if no replica is viable and patience ≥ hope
    else as push-shed
    patience     share of the TTFT target that is left
Source: this project; the prototype of `push-shed` called its relative late binding.
Inputs: those of push-shed, predicted_tpot, patience.

    steersman evaluate --policy push-hold-shed
"""

from __future__ import annotations

from numpy import ndarray

from steersman.agents.heuristics import push_shed
from steersman.agents.heuristics.push_shed import NOT_VIABLE, SHED, between, score_replicas, strictness
from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, Param

PREDICTED_TPOT, PATIENCE = COLUMN["predicted_tpot"], COLUMN["patience"]

# Behind those of push-shed, in the order in which `score` reads them.
PARAMS = push_shed.PARAMS | {
    "room_strict": Param(2.0, 0.5, 3.0),
    "room_loose": Param(0.9, 0.3, 2.0),
    "urgency": Param(0.3, 0.0, 2.0),
    "hope": Param(0.2, 0.0, 1.0),
}
FIRST = len(push_shed.PARAMS)


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    z = strictness(rows[-1], params)
    scores[-2], scores[-1] = NEVER, SHED
    best = score_replicas(rows, mask, params, z, scores)
    if best < 0 or not mask[-2]:
        return
    room_strict, room_loose, urgency, hope = params[FIRST : FIRST + 4]
    patience = rows[-2, PATIENCE]
    if scores[best] <= 0.5 * NOT_VIABLE:
        if patience >= hope:
            scores[-2] = 0.5 * SHED
    elif rows[best, PREDICTED_TPOT] > params[0] * (between(room_strict, room_loose, z) + urgency * (1.0 - patience)):
        scores[-2] = -SHED


POLICY = CompiledPolicy(
    "push-hold-shed",
    "As push-shed, but holds who can wait while there is no room to spare.",
    score,
    PARAMS,
)
