"""Tenants: who sends requests, and what was promised to them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from steersman.runtime.config import Model

TENANT = np.dtype(
    [
        ("ttft_slo_s", "f8"),
        ("tpot_slo_s", "f8"),
        ("slo_guessed", "f8"),  # 1: the two are a guess
        ("weight", "f8"),
        ("expected_output_tokens", "f8"),  # prior mean, until the bookkeeping has seen outputs
    ],
    align=True,
)


class Slo(Model):
    """A promise: time to first token, and time per output token after it, both in seconds."""

    ttft_s: float = Field(gt=0)
    tpot_s: float = Field(gt=0)
    guessed: bool = Field(
        default=False, description="nobody promised this, it is what to go by: policies may keep a margin"
    )


class Tenant(Model):
    """A tenant's promise and its worth."""

    slo: Slo
    weight: float = Field(default=1.0, gt=0, description="worth of one good request of this tenant")
    expected_output_tokens: float = Field(
        default=200.0, gt=0, description="prior mean output length, until outputs were seen"
    )


def tenant_table(tenants: Mapping[str, Tenant]) -> np.ndarray:
    """`tenants` as a TENANT array, (tenants,), in the mapping's order."""
    table = np.zeros(len(tenants), TENANT)
    for row, tenant in zip(table, tenants.values(), strict=True):
        row["ttft_slo_s"], row["tpot_slo_s"] = tenant.slo.ttft_s, tenant.slo.tpot_s
        row["slo_guessed"] = tenant.slo.guessed
        row["weight"], row["expected_output_tokens"] = tenant.weight, tenant.expected_output_tokens
    return table
