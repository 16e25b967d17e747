"""Requests as columns: what a workload produces and the simulator plays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from steersman.runtime.tenant import Tenant, tenant_table

REQUEST = np.dtype(
    [
        ("arrival_s", "f8"),  # from the start of the episode, never falling
        ("tenant", "i4"),  # index into the workload's tenants
        ("prompt_tokens", "i4"),
        ("output_tokens", "i4"),  # hidden from every policy until the request ends
        ("max_tokens", "i4"),  # the client's limit on the output
        ("block_start", "i8"),  # first of its prefix blocks in `Requests.blocks`
        ("prompt_blocks", "i4"),  # full blocks of the prompt
        ("block_count", "i4"),  # prompt_blocks, and the blocks that its output will fill where they are known
        ("priority", "i4"),  # higher is more urgent
        ("model", "i4"),  # index into the fleet's models; -1: any
        ("cancel_s", "f8"),  # its client leaves this long after it arrived; 0: never
        ("regions", "i8"),  # bit mask over the fleet's zones that may hold its data; 0: any
    ],
    align=True,
)


@dataclass(frozen=True)
class Requests:
    """One episode of arrivals, in order of arrival.

    `table` is a REQUEST array, (requests,). `blocks` holds int64 identities of prefix blocks of `block_tokens`
    tokens: a block's identity stands for the whole prompt up to its end, so equal identities mean equal prefixes.
    """

    table: np.ndarray
    blocks: np.ndarray
    block_tokens: int
    tenants: Mapping[str, Tenant]  # as schedulers are told of them
    duration_s: float = 0.0  # length of the arrival window, over which rates are taken; 0: up to the last arrival
    # REQUEST: served before the episode, oldest first, so that their prompts are cached when it starts.
    before: np.ndarray = field(default_factory=lambda: np.zeros(0, REQUEST))
    judged: Mapping[str, Tenant] | None = None  # whose SLOs count, where they are others than schedulers are told

    @property
    def tenant_table(self) -> np.ndarray:
        return tenant_table(self.tenants)

    @property
    def window_s(self) -> float:
        """The length of the arrival window in seconds."""
        return self.duration_s or (float(self.table["arrival_s"][-1]) if len(self.table) else 0.0)

    def __len__(self) -> int:
        return len(self.table)
