"""NVIDIA Dynamo's KV router: prefill work less the overlap, plus memory in use.

Formula: argmin s·max(0, P − c·O) + D, ties at random; c = 1, s = 1.
    P   prompt tokens to compute: those of the replica and this prompt
    O   prompt tokens in the replica's prefix cache
    D   tokens that its active requests and this prompt hold in the KV cache
Dynamo counts P, O and D in blocks; the common factor does not change the choice, so tokens serve here.
Source: NVIDIA Dynamo, `lib/kv-router` (overlap credit, `prefill_load_scale`, `router_temperature` 0).
Inputs: prefill_ahead and prompt_tokens (P), matched_tokens (O), and kv_headroom, kv_tokens, expected_output:
D = (1 − kv_headroom)·kv_tokens − expected_output.

    steersman evaluate --policy dynamo-kv
    steersman evaluate --policy 'dynamo-kv?overlap_weight=0.5'
"""

from __future__ import annotations

from numpy import ndarray

from steersman.agents.heuristics._ties import break_ties
from steersman.runtime.compiled import njit
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy, Param

AHEAD, PROMPT, MATCHED = COLUMN["prefill_ahead"], COLUMN["prompt_tokens"], COLUMN["matched_tokens"]
HEADROOM, KV_TOKENS, EXPECTED = COLUMN["kv_headroom"], COLUMN["kv_tokens"], COLUMN["expected_output"]


@njit(SCORE)
def score(rows: ndarray, mask: ndarray, params: ndarray, memory: ndarray, scores: ndarray) -> None:
    overlap_weight, prefill_scale = params
    replicas = len(scores) - 2
    scores[replicas:] = NEVER
    for c in range(replicas):
        prefill = rows[c, AHEAD] + rows[c, PROMPT] - overlap_weight * rows[c, MATCHED]
        # Rounded, so that equal replicas stay equal: the share is float32.
        held = round((1.0 - float(rows[c, HEADROOM])) * rows[c, KV_TOKENS] - rows[c, EXPECTED])
        scores[c] = -(prefill_scale * max(0.0, prefill) + held)
    break_ties(mask, memory, scores)


POLICY = CompiledPolicy(
    "dynamo-kv",
    "Sends to the least uncached prompt work plus tokens held in the KV cache, as NVIDIA Dynamo's router.",
    score,
    {"overlap_weight": Param(1.0, 0.0, 4.0), "prefill_scale": Param(1.0, 0.0, 8.0)},
)
