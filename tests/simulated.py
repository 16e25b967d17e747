"""Small fleets, episodes and policies for tests of the simulator."""

from __future__ import annotations

import numpy as np

from steersman.runtime.compiled import njit
from steersman.runtime.fleet import Fleet
from steersman.runtime.observation import COLUMN
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy
from steersman.runtime.requests import REQUEST, Requests
from steersman.runtime.tenant import Tenant

TTFT, PATIENCE, PROMPT = COLUMN["predicted_ttft"], COLUMN["patience"], COLUMN["prompt_tokens"]


@njit(SCORE)
def _fastest(rows, mask, params, memory, scores):
    scores[-2:] = NEVER
    for c in range(len(scores) - 2):
        scores[c] = -rows[c, TTFT]


FASTEST = CompiledPolicy("fastest", "Sends to the lowest predicted TTFT.", _fastest)


@njit(SCORE)
def _patient(rows, mask, params, memory, scores):
    _fastest(rows, mask, params, memory, scores)
    if rows[-1, PROMPT] % 3 == 0 and rows[-2, PATIENCE] > 0.65:
        scores[-2] = 1.0


PATIENT = CompiledPolicy(
    "patient", "As the fastest, but lets a third of the requests wait for four pauses first.", _patient
)

TENANTS = {
    "strict": Tenant(slo={"ttft_s": 0.5, "tpot_s": 0.03}),
    "loose": Tenant(slo={"ttft_s": 5.0, "tpot_s": 0.2}, weight=2.0),
}


def fleet(*groups: dict[str, object]) -> Fleet:
    """A fleet of H100 replicas, each group with the given differences."""
    base = {
        "name": "r",
        "profile": "llama-3.1-8b-h100-bf16",
        "kv_tokens": 20000,
        "max_num_seqs": 32,
        "token_budget": 512,
    }
    made = [{**base, "name": f"r{i}", **g} for i, g in enumerate(groups)]
    return Fleet.model_validate({"description": "For tests.", "replicas": made})


def episode(
    arrival_s: object,
    prompt: object,
    output: object,
    tenant: object = 0,
    prefixes: object = None,
    block_tokens: int = 64,
    max_tokens: object = None,
) -> Requests:
    """Requests from columns. `prefixes`: a group number for each request; a group shares all its blocks.

    `max_tokens` defaults to the output's length.
    """
    arrivals = np.atleast_1d(np.asarray(arrival_s, float))
    table = np.zeros(len(arrivals), REQUEST)
    table["arrival_s"], table["tenant"] = arrivals, tenant
    table["prompt_tokens"], table["output_tokens"] = prompt, output
    table["max_tokens"] = table["output_tokens"] if max_tokens is None else max_tokens
    table["model"] = -1
    blocks: list[np.ndarray] = []
    if prefixes is not None:
        start = 0
        for row, group in zip(table, np.atleast_1d(prefixes), strict=True):
            count = int(row["prompt_tokens"]) // block_tokens
            row["block_start"], row["prompt_blocks"], row["block_count"] = start, count, count
            blocks.append(np.arange(count, dtype=np.int64) + 1_000_000 * (int(group) + 1))
            start += count
    joined = np.concatenate(blocks) if blocks else np.zeros(0, np.int64)
    return Requests(table, joined, block_tokens, TENANTS)
