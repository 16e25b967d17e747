"""How many tokens a fleet could compute at most."""

from __future__ import annotations

import numpy as np

from steersman.runtime.cost import iteration_s
from steersman.runtime.fleet import Fleet


def ceiling_tokens_per_s(fleet: Fleet) -> float:
    """Tokens per second that no schedule exceeds, by the cost model.

    An iteration of a replica computes n output tokens, n ≤ max_num_seqs, and m prompt tokens, n + m ≤ token_budget.
    It takes at least what `iteration_s` says of empty contexts and of a prefill without attention, prefill_b·m. The
    ceiling is Σ over replicas of max over n and m of (n + m) / iteration_s. Real contexts are not empty, so no policy
    comes near it: it is a measure that policies have in common. Prompt tokens from a prefix cache are not computed,
    and count as nothing.
    """
    total = 0.0
    for row in fleet.table().view(np.recarray):
        best = 0.0
        for decoding in range(int(row.max_num_seqs) + 1):
            for chunk in {0, int(row.token_budget) - decoding}:
                if decoding + chunk > 0:
                    prefill_s = row.prefill_d_s + row.prefill_b_s * chunk if chunk else 0.0
                    best = max(best, (decoding + chunk) / iteration_s.py_func(row, decoding, 0.0, prefill_s))
        total += best
    return total
