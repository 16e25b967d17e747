"""Workload files, the merge of tenants into episodes, and the shipped workloads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steersman.runtime import plugins
from steersman.runtime.configs import config_files, find_config
from steersman.runtime.errors import UserError
from steersman.runtime.requests import Requests
from steersman.runtime.workload import Workload, load_workload
from steersman.runtime.workload._source import SOURCES

SHIPPED = {path.stem: path for path in config_files("workloads")}
NEED_NO_TRACE = [name for name in sorted(SHIPPED) if name not in ("azure", "mooncake")]

SOURCE = {
    "kind": "synthetic",
    "rate_rps": 5,
    "prompt_tokens": {"lognormal": {"median": 300, "sigma": 1, "max": 5000}},
    "output_tokens": {"quantiles": {0: 1, 0.5: 50, 1: 900}},
}


def workload(**tenants: dict) -> Workload:
    base = {"slo": {"ttft_s": 1, "tpot_s": 0.1}, "source": SOURCE}
    return Workload.model_validate(
        {"description": "For tests.", "tenants": {k: {**base, **v} for k, v in tenants.items()}}
    )


def prompt_prefixes(requests: Requests) -> list[tuple[int, ...]]:
    return [tuple(requests.blocks[q["block_start"] : q["block_start"] + q["block_count"]]) for q in requests.table]


def same(a: Requests, b: Requests) -> bool:
    return a.table.tobytes() == b.table.tobytes() and a.blocks.tobytes() == b.blocks.tobytes()


def check_invariants(requests: Requests, duration_s: float) -> None:
    q = requests.table
    assert np.all(np.diff(q["arrival_s"]) >= 0)
    assert np.all((q["arrival_s"] >= 0) & (q["arrival_s"] < duration_s))
    assert np.all(q["prompt_tokens"] >= 1)
    assert np.all((q["output_tokens"] >= 1) & (q["output_tokens"] <= q["max_tokens"]))
    assert np.all(q["prompt_blocks"] == q["prompt_tokens"] // requests.block_tokens)
    assert np.all(q["block_count"] >= q["prompt_blocks"])
    known = (q["prompt_tokens"].astype(int) + q["output_tokens"]) // requests.block_tokens
    assert np.all(q["block_count"] <= known)
    assert np.all(q["block_start"] + q["block_count"] <= len(requests.blocks))
    assert requests.blocks.dtype == np.int64
    # An identity has one predecessor: equal identities mean equal prefixes.
    before: dict[int, int] = {}
    for chain in prompt_prefixes(requests):
        assert all(before.setdefault(b, a) == a for a, b in zip((-1, *chain), chain, strict=False))


@pytest.mark.parametrize("name", NEED_NO_TRACE)
def test_shipped_workloads_keep_the_invariants_of_requests(name):
    source = load_workload(SHIPPED[name])
    for seed in range(3):
        check_invariants(source.sample(seed), source.duration_s)


def test_all_shipped_workloads_load_and_say_what_they_are():
    assert {"default", "steady", "azure", "mooncake", "smoke"} <= set(SHIPPED)
    for path in SHIPPED.values():
        assert load_workload(path).description.endswith(".")


def test_the_default_workload_offers_24_requests_a_second():
    source = load_workload(SHIPPED["default"])
    assert source.offered_rps == pytest.approx(24)
    rates = [len(source.sample(seed)) / source.duration_s for seed in range(30)]
    assert np.mean(rates) == pytest.approx(24, rel=0.08)


def test_smoke_fits_a_context_of_2048_tokens():
    source = load_workload(SHIPPED["smoke"])
    for seed in range(50):
        q = source.sample(seed).table
        assert len(q)
        assert (q["prompt_tokens"] + q["max_tokens"]).max() <= 2048


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    first, again, other = (load_workload(SHIPPED["default"]).sample(s, duration_s=20) for s in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)


def test_load_multiplies_the_rate():
    source = load_workload(SHIPPED["default"])
    low, high = (sum(len(source.sample(s, load=x)) for s in range(20)) for x in (0.5, 2.0))
    assert high / low == pytest.approx(4, rel=0.1)


def test_a_tenants_stream_does_not_depend_on_the_other_tenants():
    alone, together = workload(b={}).sample(1).table, workload(a={}, b={}, c={}).sample(1).table
    mine = together[together["tenant"] == 1]
    for column in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert np.array_equal(alone[column], mine[column])


def test_tenants_and_episodes_share_no_blocks():
    first, second = workload(a={}, b={}).sample(1), workload(a={}, b={}).sample(2)
    assert len(np.unique(first.blocks)) == len(first.blocks)
    assert not np.intersect1d(first.blocks, second.blocks).size


def test_model_regions_and_priority_reach_the_requests():
    source = workload(a={"model": "m2", "regions": ["eu", "us"], "priority": 3}, b={})
    q = source.sample(0, models=["m1", "m2"], regions=["ap", "eu", "us"]).table
    a, b = q[q["tenant"] == 0], q[q["tenant"] == 1]
    assert set(a["model"]) == {1}
    assert set(a["regions"]) == {0b110}
    assert set(a["priority"]) == {3}
    assert set(b["model"]) == {-1}
    assert set(b["regions"]) == {0}


def test_an_episode_without_arrivals_is_empty():
    requests = workload(a={}).sample(0, load=1e-6)
    assert len(requests) == 0
    assert len(requests.blocks) == 0


@pytest.mark.parametrize(
    ("tenant", "message"),
    [
        (
            {"model": "m9"},
            "tenant 'a' asks for model 'm9', which no replica of the fleet serves; known: m1",
        ),
        (
            {"regions": ["eu-west"]},
            "tenant 'a' keeps its data in eu-west, but the fleet has no replica there",
        ),
    ],
)
def test_a_fleet_that_cannot_serve_a_tenant_is_named(tenant, message):
    with pytest.raises(UserError) as error:
        workload(a=tenant).sample(0, models=["m1"], regions=["ap"])
    assert message in str(error.value)


@pytest.mark.parametrize("load", [0, -1, float("nan"), float("inf")])
def test_a_load_must_be_positive(load):
    with pytest.raises(UserError, match="must be a positive number"):
        workload(a={}).sample(0, load=load)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "tenants.chat.source.kind=syntetic",
            "there is no workload source 'syntetic'; did you mean 'synthetic'?",
        ),
        ("tenants.chat.source={}", "'kind' is required and must be one of: azure, journal, mooncake, synthetic"),
        ("tenants.chat.source.rate=3", "unknown key 'rate'; did you mean 'rate_rps'?"),
        ("tenants.chat.source.rate_rps=-3", "'rate_rps': input should be greater than 0 (got -3)"),
        ("tenants.chat.source.rate_rps=.nan", "'rate_rps'"),
        ("tenants.chat.source.kind=pathlib:Path", "'pathlib:Path' is not a subclass of Source"),
        ("tenants.chat.source.kind=nowhere:SOURCE", "cannot be imported"),
        ("tenants.chat.slo.ttft=3", "unknown key 'tenants.chat.slo.ttft'; did you mean 'ttft_s'?"),
        ("tenants.chat.source.prompt_tokens.quantiles={0: 5, 1: 2}", "lengths must not fall"),
        ("tenants.chat.source.prompt_tokens.quantiles={0: 5, .nan: 6, 1: 7}", "quantiles"),
        ("tenants.chat.source.prompt_tokens.quantiles={0.1: 5, 1: 7}", "must rise from 0 to 1"),
        ("tenants.chat.source.prompt_tokens={}", "exactly one of quantiles and lognormal is needed"),
        ("tenants.chat.source.arrivals.bursts.every_s=12", "0 < low <= high < every_s 12"),
        ("tenants.agent.source.prefix.turns=[3, 2]", "1 <= low <= high"),
        ("block_tokens=100", "'block_tokens': input should be a multiple of 16 (got 100)"),
        ("tenants={}", "'tenants'"),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence_that_names_it(setting, message):
    with pytest.raises(UserError) as error:
        load_workload(SHIPPED["default"], [setting])
    assert message in str(error.value)
    assert "default.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_sources_are_the_modules_of_the_package():
    assert plugins.names(SOURCES) == ["azure", "journal", "mooncake", "synthetic"]


def test_a_source_of_another_package_is_named_by_module_and_attribute(tmp_path, monkeypatch):
    (tmp_path / "my_source.py").write_text(
        "from steersman.runtime.workload.synthetic import Synthetic\nclass Mine(Synthetic):\n    extra: int\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = workload(a={"source": {**SOURCE, "kind": "my_source:Mine", "extra": 1}})
    assert len(made.sample(0)) > 0


def test_the_workload_survives_a_round_trip_through_json():
    source = load_workload(SHIPPED["default"])
    again = Workload.model_validate_json(source.model_dump_json())
    assert same(source.sample(1, duration_s=10), again.sample(1, duration_s=10))


def test_the_folder_of_traces_comes_from_the_argument_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("STEERSMAN_TRACES", str(tmp_path / "environment"))
    with pytest.raises(UserError, match="environment"):
        load_workload(SHIPPED["azure"]).sample(0)
    with pytest.raises(UserError, match="argument"):
        load_workload(SHIPPED["azure"], traces=tmp_path / "argument").sample(0)


def test_without_a_folder_of_traces_the_error_says_how_to_name_one(monkeypatch):
    monkeypatch.delenv("STEERSMAN_TRACES", raising=False)
    with pytest.raises(UserError, match="pass --traces DIR or set STEERSMAN_TRACES"):
        load_workload(SHIPPED["azure"]).sample(0)


def test_a_relative_path_is_read_as_yaml(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text(Path(SHIPPED["smoke"]).read_text())
    assert len(load_workload(path).sample(0)) > 0


def test_a_warm_workload_has_requests_before_its_episode():
    cold = load_workload(find_config("workloads", "default"))
    warm = load_workload(find_config("workloads", "default"), ["warm_s=30"])
    requests = warm.sample(3, duration_s=20)
    assert (requests.before["arrival_s"] < 0).all()
    assert requests.before["arrival_s"].min() > -30
    assert len(requests.before) == pytest.approx(1.5 * len(requests), rel=0.3)
    assert ((requests.table["arrival_s"] >= 0) & (requests.table["arrival_s"] < 20)).all()
    assert len(cold.sample(3).before) == 0


def test_clients_leave_as_the_workload_says_without_another_change():
    plain = load_workload(find_config("workloads", "steady"))
    name = next(iter(plain.tenants))
    changed = [f"tenants.{name}.leaving.share=0.3", f"tenants.{name}.leaving.mean_s=5"]
    left = load_workload(find_config("workloads", "steady"), changed).sample(1, duration_s=3000).table
    cancels = left["cancel_s"] > 0
    assert cancels.mean() == pytest.approx(0.3, abs=0.03)
    assert left["cancel_s"][cancels].mean() == pytest.approx(5, rel=0.1)
    before = plain.sample(1, duration_s=3000).table
    assert all((left[n] == before[n]).all() for n in left.dtype.names if n != "cancel_s")
