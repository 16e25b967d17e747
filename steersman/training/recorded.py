"""A gateway's journal in training and evaluation: its traffic played again, beside what really happened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from steersman.runtime.draw import draw
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.journal.reader import Decisions, recorded_decisions
from steersman.runtime.journal.segment import CODES, Ending
from steersman.runtime.outcomes import USAGE, Episode, Outcomes, State, Summary, summarise
from steersman.runtime.policy import CompiledPolicy, pick
from steersman.runtime.requests import REQUEST, Requests
from steersman.runtime.workload import Split, load_workload
from steersman.runtime.workload.journal import Traffic, described, read_traffic
from steersman.training.run import Run

MOST_DECISIONS = 100_000  # that policies are asked again, some 200 MB of observations with eight replicas
STATES = {
    Ending.DONE: State.DONE,
    Ending.CANCELLED: State.CANCELLED,
    Ending.LATE: State.CANCELLED,
    Ending.FAILED: State.FAILED,
    Ending.SHED: State.SHED,
    Ending.REFUSED: State.SHED,
}


def told(journal: Path) -> list[str]:
    """What the user should know of a journal, a sentence each.

    Raises:
        UserError: it cannot be read, or has nothing to play.
    """
    return described(read_traffic(journal))


def keep_journal(run: Run, journal: Path) -> Run:
    """The run with the journal's files in its own folder, since a gateway will remove them; linked where that works.

    Raises:
        UserError: they cannot be linked or copied.
    """
    folder = (run.folder / "journal").resolve()
    try:
        folder.mkdir()
        for path in read_traffic(journal).recording.paths:
            try:
                os.link(path, folder / path.name)
            except FileNotFoundError:  # removed since it was read
                continue
            except OSError:
                shutil.copy2(path, folder / path.name)
        named = {key: str(folder) for key in ("workload", "fleet") if getattr(run.config, key) == str(journal)}
        config = run.config.model_copy(update=named)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (run.folder / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: the journal cannot be kept there: {error.strerror or error}") from error
    return Run(run.folder, config)


class Agreement(NamedTuple):
    """On which share of the recorded decisions a policy would have done what was done."""

    shares: dict[str, float]  # by policy
    decisions: int
    left_out: int

    @property
    def plain(self) -> dict[str, Any]:
        return {"policies": self.shares, "decisions": self.decisions, "left_out": self.left_out}

    @property
    def text(self) -> str:
        if not self.decisions:
            return "no recorded decision to compare with"
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        newest = f"the newest {self.decisions:,}" if self.left_out else f"{self.decisions:,}"
        return f"would have done what was done, on {newest} recorded decisions: {shares}"


@dataclass(frozen=True)
class Replay:
    """A part of a journal, to be played from its beginning to its end."""

    journal: Path
    split: Split
    traffic: Traffic
    told: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, journal: Path, split: Split) -> Replay:
        """
        Raises:
            UserError: the journal cannot be read, or that part of it is empty.
        """
        traffic = read_traffic(journal)
        low, high = traffic.span_s(split)
        replay = cls(journal, split, traffic, described(traffic))
        count = int(replay._rows.sum())
        if not count:
            raise UserError(f"{journal}: no request in its {split} part; play the other one with --split")
        replay.told.append(f"played: the {split} part, {count:,} requests in {high - low:,.0f} s, caches cold at first")
        return replay

    @property
    def _rows(self) -> np.ndarray:
        low, high = self.traffic.span_s(self.split)
        return (self.traffic.time_s >= low) & (self.traffic.time_s < high)

    def episode(self, fleet: Fleet, load: float = 1.0) -> Requests:
        """The requests of the part, `load` times as fast as they came."""
        low, high = self.traffic.span_s(self.split)
        workload = load_workload(self.journal)
        return draw(workload, fleet, 0, load=load, split=self.split, duration_s=(high - low) / load)

    def summary(self) -> Summary:
        """What really happened to them, in the terms of the simulator. Nobody knows how busy the replicas were."""
        traffic, rows = self.traffic, self._rows
        recording, recorded = traffic.recording, traffic.table[rows]
        low, high = traffic.span_s(self.split)
        replicas = len(recording.fleet.names)
        table = np.zeros(len(recorded), REQUEST)
        table["arrival_s"] = traffic.time_s[rows] - low
        for name in ("tenant", "prompt_tokens", "output_tokens"):
            table[name] = recorded[name]
        states = np.zeros(len(Ending), np.int8)
        for ending, state in STATES.items():
            states[CODES[ending]] = state
        replica = np.where(recorded["replica"] < replicas, recorded["replica"], -1)
        untold = recorded["cached_tokens"] < 0
        outcomes = Outcomes(
            state=states[recorded["ending"]],
            replica=replica,
            ttft_s=recorded["ttft_s"].astype(float),
            tpot_s=recorded["tpot_s"].astype(float),
            e2e_s=recorded["e2e_s"].astype(float),
            attained=recorded["attained"].astype(bool),
            cached_tokens=np.where(untold, recorded["matched_tokens"], recorded["cached_tokens"]),
            holds=recorded["holds"],
        )
        usage = np.zeros(replicas, USAGE)
        usage["output_tokens"] = np.bincount(
            replica[replica >= 0], weights=recorded["output_tokens"][replica >= 0], minlength=replicas
        )
        requests = Requests(table, np.zeros(0, np.int64), 64, recording.tenants, high - low)
        episode = Episode(requests, outcomes, usage, high - low)
        limits = recording.fleet.table()["max_num_seqs"]
        return summarise("recorded", [episode], recording.fleet.names, limits, recording.fleet.price_per_hour)

    def agreement(self, policies: Sequence[CompiledPolicy], seed: int = 0, limit: int = MOST_DECISIONS) -> Agreement:
        """How often each policy would have done what was done, asked anew with the recorded observations."""
        asked = np.zeros(len(self.traffic.kept), np.bool_)
        asked[np.flatnonzero(self.traffic.kept)[self._rows]] = True
        decisions = recorded_decisions(self.traffic.recording, asked, limit)
        shares = {p.name: float((choices(p, decisions, seed) == decisions.choice).mean()) for p in policies}
        return Agreement(shares, len(decisions.choice), decisions.left_out)


def choices(policy: CompiledPolicy, decisions: Decisions, seed: int = 0) -> np.ndarray:
    """What `policy` chooses in each recorded situation, int64 (d,), one after the other with one memory."""
    memory, scores = policy.memory(seed), np.empty(decisions.mask.shape[1])
    chosen = np.empty(len(decisions.choice), np.int64)
    for i, (rows, mask) in enumerate(zip(decisions.rows, decisions.mask, strict=True)):
        policy.function(rows, mask, policy.values, memory, scores)
        chosen[i] = pick(scores, mask)
    return chosen
