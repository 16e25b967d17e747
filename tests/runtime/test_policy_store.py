"""Pushed policies: kept over a restart, tested before they take a request, reloaded when they change on disk."""

from __future__ import annotations

import asyncio
import io
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from bundles import WEIGHTS, export
from simulated import TENANTS, fleet

from steersman.agents.policies import heuristic
from steersman.runtime import archive, manifest
from steersman.runtime.deployment.deployer import Deployer
from steersman.runtime.deployment.deployment import Deployment
from steersman.runtime.deployment.release import BrokenPolicy
from steersman.runtime.deployment.selftest import SelfTest
from steersman.runtime.deployment.stats import stats
from steersman.runtime.deployment.store import INDEX, KEPT, PolicyStore
from steersman.runtime.deployment.watch import BundleWatch
from steersman.runtime.errors import UserError
from steersman.runtime.observation import HIGH, LOW
from steersman.runtime.policy import Policy
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import Fallback, LiveRequest

SLOW_MACHINE_S = 10.0  # a busy machine is no reason to refuse a policy here


def named(spec: str) -> Policy:
    return heuristic(spec).bind()


def zipped(path: Path, seed: int = 0, name: str = "learned") -> bytes:
    """The bytes of a bundle's zip; seeds give different ones."""
    weights = WEIGHTS + 0.01 * seed
    return archive.pack(archive.read(export(path / f"made-{name}-{seed}", weights=weights, name=name)))


def deployer(folder: Path | None = None, configured: str = "jsed") -> Deployer:
    store = PolicyStore(folder, named)
    first, predecessors = store.begin(store.prepare_heuristic(configured))
    scheduler = Scheduler(fleet({}, {}), TENANTS, first, named("least-requests"), policy_limit_s=SLOW_MACHINE_S)
    assert scheduler.deployment is not None
    scheduler.deployment.predecessors = predecessors
    return Deployer(scheduler.deployment, store, SelfTest(scheduler))


def versions(deployment: Deployment) -> tuple[str, list[str]]:
    return deployment.current.version, [release.version for release in deployment.predecessors]


# The store


def test_a_version_is_the_name_and_the_start_of_the_digest(tmp_path: Path) -> None:
    store = PolicyStore(None, named)
    data = zipped(tmp_path, name="Größe & ../Form")
    release = store.prepare_zip(data, "it").release
    digest = manifest.parse(archive.unpack(data, "it")[archive.MANIFEST], "it").sha256
    assert release.version == f"Gr-e-..-Form-{digest[:8]}"
    assert release.policy.name == "Größe & ../Form"


def test_a_folder_and_its_zip_have_the_same_version(tmp_path: Path) -> None:
    store = PolicyStore(None, named)
    export(tmp_path / "bundle")
    shutil.make_archive(str(tmp_path / "made"), "zip", tmp_path, "bundle")
    first, second = (store.prepare_path(tmp_path / name).release.version for name in ("bundle", "made.zip"))
    assert first == second


@pytest.mark.parametrize("in_memory", [True, False])
def test_two_loads_share_no_memory(tmp_path: Path, in_memory: bool) -> None:
    store = PolicyStore(None if in_memory else tmp_path / "state", named)
    for prepared in (store.prepare_zip(zipped(tmp_path), "it"), store.prepare_heuristic("round-robin")):
        store.keep(prepared)
        first, second = (store.load(prepared.release.version) for _ in range(2))
        assert first.version == second.version == prepared.release.version
        assert first.policy is not second.policy


def test_an_unknown_version_is_refused_with_the_nearest(tmp_path: Path) -> None:
    store = PolicyStore(None, named)
    store.keep(store.prepare_heuristic("jsed"))
    with pytest.raises(UserError, match="there is no policy 'jsd'; did you mean 'jsed'"):
        store.load("jsd")


async def test_what_was_pushed_decides_after_a_restart(tmp_path: Path) -> None:
    before = deployer(tmp_path / "state")
    done = await before.push_zip(zipped(tmp_path), "current")
    after = deployer(tmp_path / "state")
    assert versions(after.deployment) == (done.version, ["jsed"])
    assert (await after.rollback()).version == "jsed"
    assert versions(deployer(tmp_path / "state").deployment) == ("jsed", [])


async def test_a_gateway_started_with_another_policy_starts_with_that(tmp_path: Path) -> None:
    before = deployer(tmp_path / "state")
    pushed = (await before.push_zip(zipped(tmp_path), "current")).version
    after = deployer(tmp_path / "state", "least-tokens")
    assert versions(after.deployment) == ("least-tokens", ["jsed", pushed])


async def test_a_policy_of_another_schema_falls_back_after_an_upgrade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = deployer(tmp_path / "state")
    await before.push_zip(zipped(tmp_path), "current")
    monkeypatch.setattr("steersman.runtime.observation.SCHEMA_HASH", "0" * 16)
    after = deployer(tmp_path / "state").deployment
    assert "least-requests decides for learned-" in after.events[-1].sentence
    with pytest.raises(Exception, match="trained on observation schema") as caught:
        after.current.policy.score(np.zeros((4, 1), np.float32), np.ones(4, bool))
    assert caught.value.reason is Fallback.SCHEMA  # type: ignore[attr-defined]


async def test_a_bundle_that_was_damaged_on_disk_falls_back(tmp_path: Path) -> None:
    before = deployer(tmp_path / "state")
    version = (await before.push_zip(zipped(tmp_path), "current")).version
    (tmp_path / "state" / f"{version}.zip").write_bytes(b"PK")
    after = deployer(tmp_path / "state")
    assert after.deployment.current.version == version
    with pytest.raises(UserError, match="not a bundle's zip"):
        await after.activate(version, "current")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', '{"format": 1, "curent": ""}'])
def test_an_index_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match=r"policies\.json: "):
        PolicyStore(tmp_path, named)


def test_old_policies_go_but_not_those_in_use(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path / "state", named)
    store.begin(store.prepare_zip(zipped(tmp_path), "it"))
    first = store.index.current
    for weight in range(KEPT + 5):
        store.keep(store.prepare_heuristic(f"jsed?decode_weight={weight}"), {"jsed?decode_weight=0"})
    kept = list(store.index.policies)
    assert len(kept) == KEPT + 2
    assert kept[:3] == [first, "jsed?decode_weight=0", "jsed?decode_weight=5"]
    assert [p.name for p in (tmp_path / "state").glob("*.zip")] == [f"{first}.zip"]


# The self-test


class Fixed:
    """A policy that gives the same scores, or raises them."""

    name = "fixed"

    def __init__(self, scores: object) -> None:
        self.scores = scores

    def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if isinstance(self.scores, Exception):
            raise self.scores
        return np.array(self.scores, float)


@pytest.fixture(scope="module")
def self_test() -> SelfTest:
    fallback = named("least-requests")
    return SelfTest(Scheduler(fleet({}, {}, {}), TENANTS, named("jsed"), fallback, policy_limit_s=SLOW_MACHINE_S))


def test_its_situations_are_of_the_fleet_and_in_range(self_test: SelfTest) -> None:
    for rows, mask in self_test.situations:
        assert len(rows) == len(mask) == 5
        assert ((rows >= LOW) & (rows <= HIGH))[mask].all()
    masks = {tuple(mask[:3]) for _, mask in self_test.situations}
    assert len(masks) > 1
    loads = [rows[0, 1] for rows, _ in self_test.situations]
    assert min(loads) == 0
    assert max(loads) > 20


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (ValueError("no\nway"), r"it: fails its self-test on this fleet \(ValueError: no way\); not deployed"),
        ([1.0, 2.0], r"scores of shape \(2,\) for 5 candidates"),
        ([math.nan] * 5, "a score of 5 candidates is not finite"),
    ],
)
def test_a_policy_that_cannot_decide_is_refused(self_test: SelfTest, scores: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        self_test.check(Fixed(scores), "it")


def test_a_policy_that_takes_too_long_is_refused(self_test: SelfTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "limit_s", -1.0)
    with pytest.raises(UserError, match=r"it: takes .* ms for a decision of 5 candidates, but the limit is"):
        self_test.check(Fixed([0.0] * 5), "it")


@pytest.mark.parametrize("name", ["round-robin", "llmd-latency", "push-hold-shed"])
def test_shipped_heuristics_pass(self_test: SelfTest, name: str) -> None:
    self_test.check(named(name), name)


# Operations


async def test_a_pushed_bundle_decides(tmp_path: Path) -> None:
    it = deployer()
    done = await it.push_zip(zipped(tmp_path), "current")
    assert versions(it.deployment) == (done.version, ["jsed"])
    assert done.sentence == f"{done.version} decides, in place of jsed"


async def test_a_bundle_can_look_on_first_then_decide_some_then_all(tmp_path: Path) -> None:
    it = deployer()
    version = (await it.push_zip(zipped(tmp_path), "shadow")).version
    assert (await it.stop("shadow")).sentence == f"the shadow {version} was stopped"
    await it.activate(version, "canary", 0.2)
    assert it.deployment.canary is not None
    assert it.deployment.canary.share == 0.2
    assert (await it.promote()).version == version
    assert versions(it.deployment) == (version, ["jsed"])
    assert [(p.version, p.places) for p in it.listed()] == [(version, ("current",)), ("jsed", ("previous",))]


async def test_what_decides_already_is_not_deployed_again(tmp_path: Path) -> None:
    it = deployer()
    data = zipped(tmp_path)
    version = (await it.push_zip(data, "current")).version
    assert (await it.push_zip(data, "current")).sentence == f"{version} decides already"
    assert versions(it.deployment) == (version, ["jsed"])


async def test_a_policy_that_could_not_be_loaded_is_replaced_by_a_push(tmp_path: Path) -> None:
    data = zipped(tmp_path)  # once: a bundle says when it was made
    version = (await deployer(tmp_path / "state").push_zip(data, "current")).version
    (tmp_path / "state" / f"{version}.zip").unlink()
    it = deployer(tmp_path / "state")
    assert await it.push_zip(data, "current") == (version, f"{version} decides, in place of {version}")
    assert not isinstance(it.deployment.current.policy, BrokenPolicy)


async def test_a_heuristic_can_be_pushed_by_name() -> None:
    it = deployer()
    assert (await it.push_heuristic("jsed?decode_weight=0", "current")).version == "jsed?decode_weight=0"
    with pytest.raises(UserError, match="there is no policy 'jsd'"):
        await it.push_heuristic("jsd", "current")
    with pytest.raises(UserError, match="only heuristics that the gateway knows by name"):
        await it.push_heuristic("os:system", "current")
    assert it.deployment.changes["refused"] == 2


async def test_a_bad_bundle_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    it = deployer(tmp_path / "state")
    data = zipped(tmp_path)
    broken = io.BytesIO()
    with zipfile.ZipFile(broken, "w") as file:
        file.writestr("policy.json", archive.unpack(data, "it")["policy.json"])
        file.writestr("policy.onnx", b"\x08\x08 not a graph")
    for bad in (b"", data[:-20], broken.getvalue()):
        with pytest.raises(UserError, match="the pushed bundle"):
            await it.push_zip(bad, "current")
    assert versions(it.deployment) == ("jsed", [])
    assert stats(it.deployment).changes == {"refused": 3}
    assert [p.name for p in (tmp_path / "state").iterdir()] == [INDEX]


async def test_a_policy_that_fails_its_self_test_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = deployer(tmp_path / "state")

    def refuse(policy: Policy, where: str) -> None:
        raise UserError(f"{where}: fails its self-test")

    monkeypatch.setattr(it._self_test, "check", refuse)
    with pytest.raises(UserError, match="fails its self-test"):
        await it.push_zip(zipped(tmp_path), "canary")
    assert list(it.store.index.policies) == ["jsed"]
    assert it.deployment.canary is None


async def test_a_full_disk_refuses_a_push_but_no_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = deployer(tmp_path / "state")
    await it.push_zip(zipped(tmp_path), "current")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        await it.push_zip(zipped(tmp_path, 1), "current")
    done = await it.rollback()
    assert "jsed decides again" in done.sentence
    assert "but a restart will not know it" in done.sentence
    assert versions(it.deployment) == ("jsed", [])


# A bundle that changes on disk


class Watched:
    """A watch, and how often it saw a change."""

    def __init__(self, path: Path) -> None:
        self.changes = 0
        self.watch = BundleWatch(path, self._changed)

    async def _changed(self, path: Path) -> None:
        self.changes += 1

    async def look(self, times: int = 3) -> int:
        for _ in range(times):
            await self.watch.look()
        return self.changes


async def test_a_change_counts_once_when_the_files_have_come_to_rest(tmp_path: Path) -> None:
    watched = Watched(export(tmp_path / "bundle"))
    assert await watched.look() == 0
    export(tmp_path / "bundle", weights=WEIGHTS + 1)
    assert await watched.look(1) == 0
    assert await watched.look() == 1
    assert await watched.look() == 1


async def test_files_that_were_only_touched_are_no_change(tmp_path: Path) -> None:
    watched = Watched(export(tmp_path / "bundle"))
    (tmp_path / "bundle" / "policy.json").touch()
    assert await watched.look() == 0


async def test_a_run_folders_bundle_is_watched(tmp_path: Path) -> None:
    export(tmp_path / "run" / "bundle")
    watched = Watched(tmp_path / "run")
    export(tmp_path / "run" / "bundle", weights=WEIGHTS + 1)
    assert await watched.look() == 1


async def test_a_change_that_cannot_be_handled_does_not_end_the_watch(tmp_path: Path) -> None:
    path, seen = export(tmp_path / "bundle"), asyncio.Queue[Path]()

    async def changed(path: Path) -> None:
        seen.put_nowait(path)
        raise MemoryError

    watching = asyncio.create_task(BundleWatch(path, changed).run(0.0))
    for step in (1, 2):
        export(path, weights=WEIGHTS + step)
        async with asyncio.timeout(10):
            assert await seen.get() == path
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_changed_bundle_is_loaded_and_a_bad_one_is_said_once(tmp_path: Path) -> None:
    it = deployer()
    path = export(tmp_path / "bundle")
    watch = BundleWatch(path, it.reload)
    export(path, weights=WEIGHTS + 1)
    for _ in range(3):
        await watch.look()
    good = it.deployment.current.version
    assert good.startswith("learned-")
    (path / "policy.onnx").write_bytes(b"broken")
    for _ in range(5):
        await watch.look()
    assert it.deployment.current.version == good
    assert it.deployment.changes == {"activated": 1, "refused": 1}
    assert f"{good} goes on, a changed bundle is refused: {path}/policy.onnx" in it.deployment.events[-1].sentence
    shutil.rmtree(path)
    for _ in range(5):
        await watch.look()
    assert it.deployment.changes["refused"] == 2


async def test_a_reloaded_bundle_does_not_undo_later_pushes_at_a_restart(tmp_path: Path) -> None:
    path, store = export(tmp_path / "bundle"), tmp_path / "state"

    def started() -> Deployer:
        it = PolicyStore(store, named)
        first, predecessors = it.begin(it.prepare_path(path))
        scheduler = Scheduler(fleet({}, {}), TENANTS, first, named("jsed"), policy_limit_s=SLOW_MACHINE_S)
        assert scheduler.deployment is not None
        scheduler.deployment.predecessors = predecessors
        return Deployer(scheduler.deployment, it, SelfTest(scheduler))

    before = started()
    export(path, weights=WEIGHTS + 1)
    await before.reload(path)
    reloaded = before.deployment.current.version
    await before.push_heuristic("least-tokens", "current")
    after = started()
    assert after.deployment.current.version == "least-tokens"
    assert (await after.rollback()).version == reloaded


def test_a_bundles_policy_decides_in_the_scheduler(tmp_path: Path) -> None:
    store = PolicyStore(None, named)
    release, _ = store.begin(store.prepare_path(export(tmp_path / "bundle")))
    s = Scheduler(fleet({}, {}), TENANTS, release, named("jsed"), policy_limit_s=SLOW_MACHINE_S)
    decision = s.decide(s.arrive(LiveRequest(tenant=0, prompt_tokens=100, max_tokens=10)))
    assert (decision.policy, decision.version, decision.fallback) == ("learned", release.version, None)


# What is tried, after a restart


async def tried(folder: Path) -> Deployer:
    """A gateway that tries a shadow and a canary."""
    it = deployer(folder)
    await it.restore()
    await it.push_heuristic("least-tokens", "shadow")
    await it.push_heuristic("round-robin", "canary", 0.25)
    return it


def on_trial(deployment: Deployment) -> tuple[str, str, float]:
    shadow, canary = deployment.shadow, deployment.canary
    return (
        "" if shadow is None else shadow.release.version,
        "" if canary is None else canary.release.version,
        0.0 if canary is None else canary.share,
    )


async def test_what_is_tried_goes_on_after_an_orderly_restart(tmp_path: Path) -> None:
    await (await tried(tmp_path)).end()
    after = deployer(tmp_path)
    assert on_trial(after.deployment) == ("", "", 0.0)
    await after.restore()
    assert versions(after.deployment) == ("jsed", [])
    assert on_trial(after.deployment) == ("least-tokens", "round-robin", 0.25)


async def test_what_was_tried_when_the_gateway_crashed_does_not_go_on_and_that_is_said(tmp_path: Path) -> None:
    await tried(tmp_path)
    after = deployer(tmp_path)
    await after.restore()
    assert on_trial(after.deployment) == ("", "", 0.0)
    assert after.deployment.changes["not_restored"] == 2
    assert after.deployment.events[-1].sentence == (
        "the canary round-robin does not go on: the gateway did not end in order, and this policy may be why; "
        "push it again"
    )


async def test_what_was_lost_is_said_once(tmp_path: Path) -> None:
    await tried(tmp_path)
    await deployer(tmp_path).restore()
    again = deployer(tmp_path)
    await again.restore()
    assert not again.deployment.events


async def test_a_crash_after_the_restart_ends_what_is_tried(tmp_path: Path) -> None:
    await (await tried(tmp_path)).end()
    await deployer(tmp_path).restore()
    after = deployer(tmp_path)
    await after.restore()
    assert on_trial(after.deployment) == ("", "", 0.0)


class Crash(BaseException):
    """The end of the process."""


def crashes(*_: object) -> None:
    raise Crash


async def test_a_crash_while_it_is_restored_ends_what_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await (await tried(tmp_path)).end()
    crashing = deployer(tmp_path)
    monkeypatch.setattr(crashing.store, "load", crashes)
    with pytest.raises(Crash):
        await crashing.restore()
    after = deployer(tmp_path)
    await after.restore()
    assert on_trial(after.deployment) == ("", "", 0.0)


async def test_a_start_that_was_cut_short_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await (await tried(tmp_path)).end()
    cut_short = deployer(tmp_path)
    monkeypatch.setattr(cut_short.store, "load", crashes)
    with pytest.raises(Crash):
        await cut_short.restore()
    await cut_short.end()
    after = deployer(tmp_path)
    await after.restore()
    assert on_trial(after.deployment) == ("least-tokens", "round-robin", 0.25)


async def test_a_start_that_failed_loses_nothing(tmp_path: Path) -> None:
    await (await tried(tmp_path)).end()
    await deployer(tmp_path).end()  # its replicas did not start, say
    after = deployer(tmp_path)
    await after.restore()
    assert on_trial(after.deployment) == ("least-tokens", "round-robin", 0.25)


async def test_beside_another_policy_nothing_goes_on(tmp_path: Path) -> None:
    await (await tried(tmp_path)).end()
    after = deployer(tmp_path, configured="least-requests")
    await after.restore()
    assert on_trial(after.deployment) == ("", "", 0.0)
    assert "was started with another policy than before" in after.deployment.events[-1].sentence


async def test_a_canary_that_cannot_be_loaded_any_more_is_said(tmp_path: Path) -> None:
    before = deployer(tmp_path / "store")
    await before.restore()
    version = (await before.push_zip(zipped(tmp_path), "canary")).version
    await before.end()
    (tmp_path / "store" / f"{version}.zip").write_bytes(b"nonsense")
    after = deployer(tmp_path / "store")
    await after.restore()
    assert on_trial(after.deployment) == ("", "", 0.0)
    assert f"the canary {version} does not go on: " in after.deployment.events[-1].sentence


@pytest.mark.parametrize("end", ["stop", "promote"])
async def test_what_is_tried_no_more_does_not_come_back(end: str, tmp_path: Path) -> None:
    before = await tried(tmp_path)
    await (before.stop("canary") if end == "stop" else before.promote())
    await before.end()
    after = deployer(tmp_path)
    await after.restore()
    assert on_trial(after.deployment) == ("least-tokens", "", 0.0)
