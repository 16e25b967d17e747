"""vLLM's data-parallel load balancer: queued requests count four times.

Formula: argmin w·Q + R, the first of equals; w = 4.
    Q   requests waiting inside the engine
    R   sequences in its batch
Source: vLLM, `vllm/v1/engine/core_client.py` (`DPLBAsyncMPClient`: `score = waiting * 4 + running`).
vLLM also adds its own sends between two reports of an engine; here the columns are as fresh as the scrape.
Inputs: waiting, running.

    steersman evaluate --policy vllm-data-parallel
    steersman evaluate --policy 'vllm-data-parallel?waiting_weight=8'
"""

from __future__ import annotations

from numpy import ndarray

from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, Param

WAITING, RUNNING = COLUMN["waiting"], COLUMN["running"]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    for c in range(replicas):
        scores[c] = -(params[0] * rows[c, WAITING] + rows[c, RUNNING])


POLICY = CompiledPolicy(
    "vllm-data-parallel",
    "Sends to the engine with the least of four times its queue plus its batch, as vLLM balances its ranks.",
    score,
    {"waiting_weight": Param(4.0, 0.0, 32.0)},
)
