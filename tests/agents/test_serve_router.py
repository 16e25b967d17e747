"""The request router for Ray Serve, in a real app: three replicas of different speed, against power of two."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from steersman.runtime.network import Architecture, parameters
from steersman.runtime.observation import COLUMN
from steersman.training.export import export_bundle

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
CALLS, AT_ONCE = 40, 3


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


def bundle(folder: Path) -> Path:
    """A scorer that wants a short time per token, and few requests before it."""
    architecture = Architecture(gates=())
    weights = np.zeros(parameters(architecture))
    weights[COLUMN["predicted_tpot"]], weights[COLUMN["inflight"]] = -1.0, -4.0
    facts: dict[str, Any] = {"fleet": {}, "workload": {}, "command": "", "seeds": {}, "scorecard": {}}
    export_bundle(folder, architecture=architecture, weights=weights, name="quickest", **facts)
    return folder


@pytest.mark.filterwarnings("ignore")  # Ray Serve's own
def test_a_bundle_is_quicker_than_power_of_two(instance: None, tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(FLEET))
    ours, latencies_s = played(
        "ours",
        request_router_class="steersman.agents.serve_router:PolicyRouter",
        request_router_kwargs={"policy": str(bundle(tmp_path / "bundle")), "fleet": str(tmp_path / "fleet.yaml")},
    )
    theirs, their_latencies_s = played("theirs")
    assert sum(ours.values()) == sum(theirs.values()) == CALLS
    assert ours["slow"] < theirs["slow"]
    assert ours["fast"] > theirs["fast"]
    assert np.mean(latencies_s) < np.mean(their_latencies_s)
