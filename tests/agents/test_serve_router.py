"""The request router for Ray Serve, in a real app: three replicas of different speed, against power of two."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

serve = pytest.importorskip("ray.serve")

from ray.serve.config import RequestRouterConfig  # noqa: E402
from served import Model  # noqa: E402

FLEET = {
    "description": "Three replicas, each slower than the one before.",
    "replicas": [
        {"name": name, "profile": profile, "kv_tokens": 100000, "max_num_seqs": 8, "token_budget": 2048}
        for name, profile in (
            ("fast", "llama-3.1-8b-h100-bf16"),
            ("middle", "llama-3.1-8b-a100-bf16"),
            ("slow", "llama-3.1-8b-l40s-bf16"),
        )
    ],
}
CALLS, AT_ONCE = 60, 3


@pytest.fixture(scope="module")
def instance(ray_cluster: Any) -> Iterator[None]:
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()


def played(name: str, **router: Any) -> tuple[Counter[str], list[float]]:
    """Who answered, and the latencies (s), when `AT_ONCE` clients call one after another."""
    deployment = serve.deployment(
        Model,
        num_replicas=3,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config=RequestRouterConfig(**router),
    )
    handle = serve.run(deployment.bind(), name=name, route_prefix=None)
    body = {"prompt": "a " * 50, "max_tokens": 20}
    answers: Counter[str] = Counter()
    latencies: list[float] = []
    flying: list[tuple[float, Any]] = []
    handle.remote(body).result()  # the router is made with the first call
    for _ in range(CALLS):
        if len(flying) == AT_ONCE:
            began, response = flying.pop(0)
            answers[response.result()] += 1
            latencies.append(time.monotonic() - began)
        flying.append((time.monotonic(), handle.remote(body)))
    for began, response in flying:
        answers[response.result()] += 1
        latencies.append(time.monotonic() - began)
    serve.delete(name)
    return answers, latencies


@pytest.mark.filterwarnings("ignore")  # Ray Serve's own
def test_it_sends_less_to_the_slow_replica_than_power_of_two(instance: None, tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(FLEET))
    ours, _ = played(
        "ours",
        request_router_class="steersman.agents.serve_router:PolicyRouter",
        request_router_kwargs={"policy": "jsed", "fleet": str(tmp_path / "fleet.yaml")},
    )
    theirs, _ = played("theirs")
    assert sum(ours.values()) == sum(theirs.values()) == CALLS
    assert ours["slow"] < theirs["slow"]
    assert ours["fast"] > theirs["fast"]
