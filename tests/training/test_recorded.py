"""Training and evaluating from a gateway's journal, at the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from journals import Asked, mixed, prompt, record
from simulated import TENANTS
from test_train import TRAINING, only_run, steersman

from steersman.agents.policies import resolve
from steersman.runtime.bundle import open_bundle
from steersman.runtime.journal import store
from steersman.runtime.journal.reader import read_journal, recorded_decisions
from steersman.training.recorded import Replay, choices

PUSH_SHED = resolve("push-shed")


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decided by push-shed: 203 requests in 41 s, in several files."""
    folder = tmp_path_factory.mktemp("journal")
    record(folder, mixed(203), policy=PUSH_SHED, segment_decisions=50)
    return folder


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, object]:
    assert steersman("evaluate", *arguments, "--json") == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_simulated_and_live_lie_side_by_side(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, "--journal", journal, "--policy", "push-shed", "--policy", "round-robin")
    rows = {row["policy"]: row for row in found["policies"]}  # type: ignore[index, attr-defined]
    assert list(rows) == ["push-shed", "round-robin", "recorded"]
    assert {row["arrived"] for row in rows.values()} == {60}
    assert rows["recorded"]["failed"] > 0
    assert 0 < rows["recorded"]["attainment"] < 1
    assert rows["recorded"]["ttft_s"]["p50"] > 0
    assert any("played: the held-out part, 60 requests" in sentence for sentence in found["journal"])  # type: ignore[attr-defined]
    assert steersman("evaluate", "--journal", journal, "--policy", "jsed", "--split", "train") == 0
    out = capsys.readouterr().out
    assert "recorded" in out
    assert "143 requests" in out
    assert "would have done what was done, on 143 recorded decisions: jsed" in out


def test_the_policy_that_decided_agrees_with_itself(journal: Path) -> None:
    replay = Replay.of(journal, "train")
    agreement = replay.agreement([PUSH_SHED, resolve("round-robin")])
    assert agreement.shares["push-shed"] == 1.0
    assert agreement.shares["round-robin"] < 1.0
    assert (agreement.decisions, agreement.left_out) == (143, 0)


def test_a_policy_with_a_memory_is_asked_in_the_order_of_the_decisions(tmp_path: Path) -> None:
    """It begins anew: which replica was first in turn is not recorded."""
    record(tmp_path, mixed(), policy=resolve("round-robin"), segment_decisions=16)
    decisions = recorded_decisions(read_journal(tmp_path), np.ones(60, np.bool_), 100)
    for chosen in (decisions.choice, choices(resolve("round-robin"), decisions)):
        assert (np.diff(chosen) != 0).all()


def test_only_the_newest_decisions_are_asked_again(journal: Path) -> None:
    agreement = Replay.of(journal, "train").agreement([PUSH_SHED], limit=30)
    assert (agreement.decisions, agreement.left_out) == (30, 113)
    assert "the newest 30" in agreement.text


def test_another_fleet_may_play_the_traffic(journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = {"name": "a", "profile": "llama-3.1-8b-h200-bf16", "kv_tokens": 20000, "max_num_seqs": 16}
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({"description": "One.", "replicas": [group]}))
    found = evaluated(capsys, "--journal", journal, "--policy", "jsed", "--fleet", path)
    assert [len(row["replicas"]) for row in found["policies"]] == [1, 2]  # type: ignore[index, attr-defined]


def test_a_run_trains_on_a_journal_and_keeps_it(
    journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gateway removes its files meanwhile: the run goes on with its own."""
    folder, config = tmp_path / "live", tmp_path / "small.yaml"
    shutil.copytree(journal, folder)
    config.write_text(yaml.safe_dump(TRAINING | {"algorithms": ["ars"], "tune": [], "episode_s": 8}))
    assert steersman("train", config, "--journal", folder, "--runs", tmp_path / "runs") == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "203 requests of 2 tenants in 41 s" in out
    assert "did not end well" in out
    run = only_run(tmp_path / "runs")
    shutil.rmtree(folder)
    assert len(store.segment_paths(run / "journal")) == 5
    manifest = open_bundle(run).manifest
    assert list(manifest.workload["tenants"]) == list(TENANTS)
    assert [group["name"] for group in manifest.fleet["replicas"]] == ["r0", "r1"]
    assert steersman("train", "--resume", run) == 0
    capsys.readouterr()
    found = evaluated(capsys, "--policy", run, "--journal", run / "journal")
    assert len(found["policies"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--journal", "EMPTY"), "holds no file of a journal"),
        (("evaluate", "--journal", "/nowhere"), "cannot be read: No such file or directory"),
        (("evaluate", "--journal", "JOURNAL", "--workload", "default"), "leave out --workload"),
        (("train", "--journal", "EMPTY"), "holds no file of a journal"),
        (("train", "--journal", "JOURNAL", "--set", "fleet=nowhere"), "no shipped one of that name"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], message: str, journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"EMPTY": tmp_path, "JOURNAL": journal}
    where = ("--runs", tmp_path / "runs") if arguments[0] == "train" else ()
    assert steersman(*(named.get(a, a) for a in arguments), *where) == 2
    told = capsys.readouterr().err
    assert told.startswith("steersman: ")
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_part_without_a_request_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, [Asked(i / 10, prompt()) for i in range(20)] + [Asked(60.0, prompt(tokens=10**6))])
    assert steersman("evaluate", "--journal", tmp_path) == 2
    assert "no request in its held-out part; play the other one with --split" in capsys.readouterr().err
