"""What one engine iteration costs: the profile of a (model, hardware, precision), as versioned data files.

An iteration takes, with B decoding sequences whose contexts hold C tokens in all, and prefill chunks of n tokens
behind p computed ones:

    overhead + decode_a + decode_b·B + decode_c·C  + (decode_many if B > 1)                              (decodes only)
    overhead + decode_b·B + decode_c·C + prefill_a + Σ (prefill_d + prefill_b·n + prefill_c·n·(p + n/2))  (with prefill)

One intercept, not two: a mixed iteration reads the weights once (and takes no less than its decodes alone would).
Against the mixed steps of aiconfigurator-core 0.12.0 this errs by 3–10 % (dense models), less than summing both.
decode_many and prefill_d are 0 but for engines on a CPU, where one row is multiplied by other code than several are,
and chunks of different lengths are computed one after the other. For a fixed batch the time of the n-th iteration is
linear in n.
"""

from __future__ import annotations

import functools
from pathlib import Path

from pydantic import Field

from steersman.runtime.compiled import inner
from steersman.runtime.config import Model, read_yaml, validate
from steersman.runtime.errors import UserError
from steersman.runtime.plugins import nearest

PROFILES = Path(__file__).parent / "profiles"


class CostProfile(Model):
    """Step-time coefficients in seconds, with where they come from."""

    description: str
    version: int = 1
    model: str
    hardware: str
    precision: str = Field(description="weights and KV cache, e.g. bf16 or fp8_w_fp8_kv")
    source: str
    error: str = Field(description="how far the fit is off, as its source states it")
    overhead_s: float = Field(ge=0, description="CPU time of the engine between iterations")
    decode_a_s: float = Field(gt=0)
    decode_b_s_per_sequence: float = Field(ge=0)
    decode_c_s_per_token: float = Field(ge=0)
    prefill_a_s: float = Field(gt=0)
    prefill_b_s_per_token: float = Field(gt=0)
    prefill_c_s_per_token2: float = Field(ge=0)
    decode_many_s: float = Field(default=0.0, ge=0, description="beyond decode_a_s, where more than one decodes")
    prefill_d_s_per_chunk: float = Field(default=0.0, ge=0)
    latency_s: float = Field(default=0.0, ge=0, description="what a client waits beyond the engine: HTTP, tokenising")


@functools.cache
def load_profile(name: str) -> CostProfile:
    """A shipped profile by name, or one from a file ending in `.yaml`.

    Raises:
        UserError: there is no such profile, or the file is not one.
    """
    path = Path(name) if name.endswith(".yaml") else PROFILES / f"{name}.yaml"
    if not path.exists() and path.parent == PROFILES:
        raise UserError(f"there is no cost profile {name!r}; {nearest(name, profile_names())}")
    return validate(CostProfile, read_yaml(path), str(path))


def profile_names() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


@inner(inline=True)
def chunk_s(replica, tokens, before):
    """Seconds that a prefill chunk of `tokens` behind `before` computed ones adds to an iteration."""
    return replica.prefill_d_s + tokens * (replica.prefill_b_s + replica.prefill_c_s * (before + 0.5 * tokens))


@inner(inline=True)
def iteration_s(replica, decoding, context_tokens, prefill_s):
    """Seconds of an iteration of a REPLICA row; `prefill_s` is the sum of its chunks' `chunk_s`."""
    base = replica.decode_a_s
    if decoding > 1:
        base += replica.decode_many_s
    if prefill_s > 0.0:
        with_prefill = replica.prefill_a_s + prefill_s
        base = max(base, with_prefill) if decoding > 0 else with_prefill
    return replica.overhead_s + base + replica.decode_b_s * decoding + replica.decode_c_s * context_tokens


@inner(inline=True)
def growth_s(replica, decoding, chunk):
    """Seconds by which each iteration is longer than the last, while the same sequences decode beside full chunks.

    Every context grows by a token; the next chunk, of `chunk` tokens, stands behind one more.
    """
    return replica.decode_c_s * decoding + replica.prefill_c_s * chunk * chunk
