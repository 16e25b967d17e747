"""A journal as a workload: what was recorded comes again, and what nobody knows is drawn and said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from journals import BLOCK, FLEET, Asked, mixed, prompt, record
from simulated import TENANTS, fleet

from steersman.runtime.configs import find_config
from steersman.runtime.draw import draw
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import load_fleet
from steersman.runtime.journal import Ending
from steersman.runtime.requests import Requests
from steersman.runtime.workload import Workload, load_workload
from steersman.runtime.workload._statistics import cached_tokens
from steersman.runtime.workload.journal import described, read_traffic


def part(folder: Path, split: str = "train", **options: float) -> Requests:
    """A whole part of the recorded time."""
    low, high = read_traffic(folder).span_s(split)  # type: ignore[arg-type]
    load = options.get("load", 1.0)
    return draw(load_workload(folder), load_fleet(folder), 0, split=split, load=load, duration_s=(high - low) / load)  # type: ignore[arg-type]


def whole(folder: Path) -> Requests:
    """Both parts, one after the other: only the columns are joined."""
    parts = [part(folder, split) for split in ("train", "held-out")]
    return Requests(np.concatenate([p.table for p in parts]), parts[0].blocks, parts[0].block_tokens, TENANTS)


def test_the_folder_is_a_workload_and_a_fleet_by_name(tmp_path: Path) -> None:
    record(tmp_path, mixed())
    assert find_config("workloads", tmp_path) == find_config("fleets", tmp_path) == tmp_path
    workload, replicas = load_workload(tmp_path), load_fleet(tmp_path)
    assert list(workload.tenants) == list(TENANTS)
    assert workload.tenants["loose"].weight == 2.0
    assert workload.block_tokens == BLOCK
    assert replicas.table().tobytes() == FLEET.table().tobytes()
    assert workload.offered_rps == pytest.approx(5, rel=0.01)


def test_keys_may_be_set_as_in_a_file(tmp_path: Path) -> None:
    record(tmp_path, mixed())
    assert load_workload(tmp_path, ["tenants.strict.slo.ttft_s=9"]).tenants["strict"].slo.ttft_s == 9
    assert load_fleet(tmp_path, ["replicas.0.max_num_seqs=8"]).table()["max_num_seqs"][0] == 8


def test_the_parts_are_the_recorded_requests_in_order(tmp_path: Path) -> None:
    asked = mixed()
    record(tmp_path, asked)
    first, second = part(tmp_path), part(tmp_path, "held-out")
    assert (len(first), len(second)) == (42, 18)
    assert first.table["arrival_s"] == pytest.approx([one.at_s for one in asked[:42]], abs=1e-5)
    table = whole(tmp_path).table
    assert table["prompt_tokens"].tolist() == [one.request.prompt_tokens for one in asked]
    assert table["tenant"].tolist() == [one.request.tenant for one in asked]
    done = np.array([one.ending is Ending.DONE for one in asked])
    assert table["output_tokens"][done].tolist() == [one.output for one in asked if one.ending is Ending.DONE]
    assert (table["max_tokens"] == 100).all()


def test_a_load_compresses_time(tmp_path: Path) -> None:
    record(tmp_path, mixed())
    assert part(tmp_path, load=2.0).table["arrival_s"] == pytest.approx(part(tmp_path).table["arrival_s"] / 2)


def test_prefixes_are_shared_as_recorded(tmp_path: Path) -> None:
    groups = [0, 1, 0, 1, 2, 0, 0, 0]
    asked = [Asked(i * 0.5, prompt(0, 640 + 64 * i, group)) for i, group in enumerate(groups)]
    record(tmp_path, asked)
    seen = [0 if group not in groups[:i] else 4 * BLOCK for i, group in enumerate(groups)]
    assert cached_tokens(part(tmp_path)).tolist() == seen[: len(part(tmp_path))]


def test_prefixes_are_shared_though_the_gateway_knew_the_length_of_its_blocks_ever_better(tmp_path: Path) -> None:
    """60, 61, … tokens a key; the blocks of the episode are others, and 20 shared keys still share that much."""
    asked = [Asked(i * 0.5, prompt(0, 1800 + i, 0, shared=20, block_tokens=60 + i)) for i in range(10)]
    record(tmp_path, asked)
    requests = part(tmp_path)
    assert requests.block_tokens == 64
    assert set(cached_tokens(requests)[1:].tolist()) == {20 * 64}  # a key has 64.5 tokens in the median


def test_windows_of_all_tenants_are_the_same_stretch_of_time(tmp_path: Path) -> None:
    asked = mixed(200)
    record(tmp_path, asked)
    requests = load_workload(tmp_path).sample(3, duration_s=6.0)
    prompts = [one.request.prompt_tokens for one in asked]
    first = prompts.index(int(requests.table["prompt_tokens"][0]))
    assert requests.table["prompt_tokens"].tolist() == prompts[first : first + len(requests)]
    assert len(requests) in (29, 30, 31)


def test_training_and_held_out_windows_share_no_request(tmp_path: Path) -> None:
    record(tmp_path, [Asked(i * 0.2, prompt(0, 300 + i)) for i in range(100)])
    workload = load_workload(tmp_path)
    for seed in range(5):
        assert workload.sample(seed, duration_s=30.0).table["prompt_tokens"].max() < 371
        assert workload.sample(seed, duration_s=30.0, split="held-out").table["prompt_tokens"].min() > 368


def test_a_client_that_left_leaves_again_and_its_answer_would_have_been_longer(tmp_path: Path) -> None:
    lengths = [10, 20, 30, 40, 50, 60, 70, 80]
    asked = [Asked(i * 0.5, prompt(0, 300 + i), n) for i, n in enumerate(lengths)]
    record(tmp_path, [*asked, Asked(4.0, prompt(0, 999), 90, Ending.CANCELLED)])
    (row,) = part(tmp_path, "held-out").table[-1:]
    assert row["prompt_tokens"] == 999
    assert row["cancel_s"] == pytest.approx(1.8, abs=0.2)  # when half its answer was there
    assert row["output_tokens"] in (50, 60, 70, 80)


def test_unknown_lengths_are_drawn_from_the_tenant_s_own_and_said(tmp_path: Path) -> None:
    asked = [Asked(i * 0.1, prompt(i % 2, 300 + i), 10 + 50 * (i % 2)) for i in range(40)]
    record(tmp_path, [*asked, *(Asked(4 + i / 10, prompt(1, 300), 90, Ending.FAILED) for i in range(10))])
    assert set(whole(tmp_path).table["output_tokens"][40:].tolist()) == {60}
    assert any(
        "20.0% of them did not end well (10 failed)" in sentence for sentence in described(read_traffic(tmp_path))
    )


def test_what_no_replica_could_take_is_left_out_but_not_what_met_a_failure_of_the_fleet(tmp_path: Path) -> None:
    asked = [Asked(i * 0.5, prompt(0, 300 + i)) for i in range(8)]
    asked += [Asked(4.0, prompt(0, 10**6)), Asked(4.5, prompt(0, 777), down=(0, 1))]
    record(tmp_path, asked)
    assert 777 in whole(tmp_path).table["prompt_tokens"]
    assert len(whole(tmp_path)) == 9
    assert "left out: 1 that no replica could take" in described(read_traffic(tmp_path))


def test_models_regions_and_priorities_are_looked_up_in_the_fleet_by_name(tmp_path: Path) -> None:
    on = fleet({"model": "b", "region": "eu"}, {"model": "c", "region": "us"})
    asked = [Asked(i * 0.5, prompt(0, 300 + i, model=i % 2, regions=1 + i % 2, priority=i)) for i in range(8)]
    record(tmp_path, asked, on=on)
    workload = load_workload(tmp_path)
    assert part(tmp_path).table["model"].tolist() == [0, 1, 0, 1, 0, 1]
    other = fleet({"model": "a", "region": "asia"}, {"model": "c", "region": "us"}, {"model": "b", "region": "eu"})
    table = draw(workload, other, 0, duration_s=2.0).table
    assert (table["model"] == np.where(table["prompt_tokens"] % 2, 2, 1)).all()  # the even ones asked for b, in eu
    assert (table["regions"] == np.where(table["prompt_tokens"] % 2, 4, 2)).all()
    with pytest.raises(UserError, match="'b', which no replica of the fleet serves"):
        draw(workload, fleet({"model": "c", "region": "eu"}), 0, duration_s=2.0)


def test_data_goes_only_where_it_might_have_gone(tmp_path: Path) -> None:
    groups = [{"region": "eu", "data_classes": ["health"]}, {"region": "eu"}, {"region": "us"}]
    on = fleet(*groups)
    healthy, european = on.zone_mask([], "health"), on.zone_mask(["eu"], None)
    asked = [Asked(i * 0.5, prompt(0, 300 + i, regions=(0, healthy, european)[i % 3])) for i in range(9)]
    record(tmp_path, asked, on=on)
    assert part(tmp_path).table["regions"][:6].tolist() == [0, healthy, european] * 2
    other = fleet({"region": "us", "data_classes": ["health"]}, {"region": "eu", "data_classes": ["a", "health"]})
    assert draw(load_workload(tmp_path), other, 0, duration_s=2.0).table["regions"].max() == other.zone_mask(
        ["eu"], None
    )
    with pytest.raises(UserError, match="no replica there that may see health"):
        draw(load_workload(tmp_path), fleet({"region": "eu"}), 0, duration_s=2.0)


def test_a_journal_may_stand_beside_other_sources(tmp_path: Path) -> None:
    record(tmp_path, mixed())
    source = {"kind": "journal", "folder": str(tmp_path), "tenant": "strict"}
    workload = Workload.model_validate(
        {"description": "d", "tenants": {"mine": {"slo": {"ttft_s": 1, "tpot_s": 1}, "source": source}}}
    )
    assert len(workload.sample(0, duration_s=5.0)) > 5
    lost = {**source, "tenant": "stritc"}
    with pytest.raises(UserError, match="did you mean 'strict'"):
        Workload.model_validate(
            {"description": "d", "tenants": {"mine": {"slo": {"ttft_s": 1, "tpot_s": 1}, "source": lost}}}
        ).sample(0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([Asked(0.0, prompt()), Asked(0.5, prompt())], "must span at least one second"),
        ([Asked(i * 1.0, prompt(), ending=Ending.FAILED) for i in range(5)], "no output length is known"),
    ],
)
def test_a_journal_that_cannot_be_played_is_one_sentence(tmp_path: Path, asked: list[Asked], message: str) -> None:
    record(tmp_path, asked)
    with pytest.raises(UserError, match=message):
        load_workload(tmp_path)
