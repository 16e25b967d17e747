"""Random but plausible situations, encoded by the real encoder and guard."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from steersman.runtime.bookkeeping import new_bookkeeping
from steersman.runtime.cost import profile_names
from steersman.runtime.fleet import Fleet
from steersman.runtime.guard import guard
from steersman.runtime.observation import WIDTH, encode
from steersman.runtime.tenant import Tenant, tenant_table


def _fleet(rng: np.random.Generator) -> np.ndarray:
    groups = [
        {
            "name": f"g{i}",
            "count": int(rng.integers(1, 6)),
            "profile": str(rng.choice(profile_names())),
            "kv_tokens": int(rng.integers(20_000, 400_000)),
            "max_num_seqs": int(rng.choice([32, 128, 256])),
            "token_budget": int(rng.choice([512, 2048, 8192])),
            "price_per_hour": float(rng.uniform(0, 12)),
        }
        for i in range(rng.integers(1, 4))
    ]
    return Fleet.model_validate({"description": "Random.", "replicas": groups}).table()


def _tenants(rng: np.random.Generator) -> np.ndarray:
    tenants = {
        f"t{i}": Tenant.model_validate(
            {
                "slo": {
                    "ttft_s": float(rng.lognormal(0, 1.2)),
                    "tpot_s": float(rng.lognormal(-3, 0.8)),
                    "guessed": bool(rng.random() < 0.3),
                },
                "weight": float(rng.uniform(0.5, 3)),
                "expected_output_tokens": float(rng.lognormal(5, 0.7)),
            }
        )
        for i in range(rng.integers(1, 5))
    }
    return tenant_table(tenants)


def situations(count: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs of rows (C, WIDTH) and mask (C,): fleets of 1 to 15 replicas from idle to overloaded."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        if number % 50 == 0:
            replicas, tenants = _fleet(rng), _tenants(rng)
            book = new_bookkeeping(replicas, tenants, 64)
        n, now, load = len(replicas), 100.0, rng.uniform(0, 1.3)
        inflight = rng.binomial(replicas["max_num_seqs"], np.minimum(1, load * rng.uniform(0, 1, n)))
        prefilling = rng.binomial(inflight, rng.uniform(0, 0.5, n))
        length = rng.lognormal(6, 1)
        views = book.views
        views["inflight"], views["prefilling"] = inflight, prefilling
        views["prefill_tokens"] = prefilling * length * rng.uniform(0.2, 1, n)
        views["prompt_tokens"] = prefilling * length
        views["context_tokens"] = (inflight - prefilling) * length * rng.uniform(1, 2, n)
        views["prefill_since_s"] = now - rng.uniform(0, 1, n)
        views["prefill_rate"], views["prefill_rate_at_s"] = (
            rng.uniform(0, 20_000, n),
            now - rng.uniform(0, 5, n),
        )
        views["running"], views["waiting"] = inflight - prefilling, prefilling
        views["kv_use"], views["scraped_at_s"] = rng.uniform(0, 1, n), now - rng.uniform(0, 2, n)
        shares = rng.dirichlet(np.ones(len(tenants)), n)
        book.tenant_inflight[:] = np.round(shares * inflight[:, None])
        book.tenant_views["attainment"] = rng.uniform(0.3, 1, len(tenants))
        book.fleet["rate_short"], book.fleet["rate_long"] = rng.lognormal(2, 1), rng.lognormal(2, 0.3)
        book.fleet["rate_at_s"] = now - rng.exponential(0.2)
        book.fleet["held"] = rng.integers(0, 30)

        prompt = int(np.clip(rng.lognormal(6.5, 1.2), 1, 30_000))
        matched = np.where(rng.random(n) < 0.3, np.floor(prompt * rng.uniform(0, 0.99, n)), 0.0)
        candidates = n + 2 + int(rng.integers(0, 4))
        rows = np.zeros((candidates, WIDTH), np.float32)
        mask, reasons = np.zeros(candidates, np.bool_), np.zeros(candidates, np.int8)
        replicas["up"] = rng.random(n) < 0.95
        tenant = int(rng.integers(len(tenants)))
        promise = float(tenants["ttft_slo_s"][tenant])
        waited = rng.choice([0.0, promise * rng.uniform(0, 1.2)])
        encode(now, replicas, book, tenant, prompt, 2000, matched, waited, 0, rows)
        guard(replicas, prompt, 2000, -1, 0, promise, waited, mask, reasons)
        yield rows, mask
