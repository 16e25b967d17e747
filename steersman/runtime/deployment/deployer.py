"""What an operator does with policies: push, activate, promote, roll back. Keeps deployment and store in step.

Loading, testing and writing happen in a thread, while requests go on; the change itself is one step between two
decisions. Rolling back and promoting wait for no push.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from steersman.runtime.deployment.canary import CanaryBounds
from steersman.runtime.deployment.deployment import Deployment
from steersman.runtime.deployment.release import BrokenPolicy, Release
from steersman.runtime.deployment.selftest import SelfTest
from steersman.runtime.deployment.store import PolicyStore, Prepared, Trials
from steersman.runtime.errors import UserError

Place = Literal["current", "shadow", "canary"]
SHARE = 0.1


class Done(NamedTuple):
    """What an operation did."""

    version: str
    sentence: str  # what there is to tell about it


class Listed(NamedTuple):
    """A policy of the store."""

    version: str
    name: str
    summary: str
    pushed: str
    places: tuple[str, ...]  # where it is deployed: current, canary, shadow, previous


class Deployer:
    """Operations on one deployment, one after the other."""

    def __init__(
        self,
        deployment: Deployment,
        store: PolicyStore,
        self_test: SelfTest,
        bounds: CanaryBounds | None = None,
    ) -> None:
        self.deployment = deployment
        self.store = store
        self._self_test = self_test
        self._bounds = bounds or CanaryBounds()
        self._turn = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._restored = False
        policy = deployment.current.policy
        if isinstance(policy, BrokenPolicy):
            deployment.say("refused", f"{deployment.fallback.version} decides for {policy.name}: {policy.sentence}")

    async def push_zip(self, data: bytes, place: Place, share: float = SHARE) -> Done:
        """A bundle, as the bytes of a zip, takes its place.

        Raises:
            UserError: it was refused; the sentence says why, and is counted.
        """
        return await self._push(lambda: self.store.prepare_zip(data, "the pushed bundle"), place, share)

    async def push_heuristic(self, spec: str, place: Place, share: float = SHARE) -> Done:
        """A heuristic takes its place. Errors as `push_zip`."""

        def prepare() -> Prepared:
            if ":" in spec:  # that would import a module of the sender's choice
                raise UserError(f"policy {spec!r}: only heuristics that the gateway knows by name can be pushed")
            return self.store.prepare_heuristic(spec)

        return await self._push(prepare, place, share)

    async def activate(self, version: str, place: Place, share: float = SHARE) -> Done:
        """A policy of the store takes its place. Errors as `push_zip`."""
        async with self._turn:
            try:
                release = await asyncio.to_thread(self.store.load, version)
                await asyncio.to_thread(self._self_test.check, release.policy, version)
                return await self._deploy(release, place, share)
            except UserError as error:
                self.deployment.say("refused", str(error))
                raise

    async def reload(self, path: Path) -> None:
        """The bundle at `path` has changed: it becomes the current policy. A bad one does not: counted and said."""
        try:
            async with self._turn:
                prepared = await asyncio.to_thread(self.store.prepare_path, path)
                if self._decides_already(prepared.release.version):
                    return
                await self._keep(prepared)
                await asyncio.to_thread(self.store.configured, prepared.release.version)
                await self._deploy(prepared.release, "current", SHARE)
        except UserError as error:
            goes_on = f"{self.deployment.current.version} goes on, a changed bundle is refused"
            self.deployment.say("refused", f"{goes_on}: {error}")

    async def rollback(self) -> Done:
        """The predecessor decides again.

        Raises:
            UserError: there is none.
        """
        return await self._remembered(self.deployment.rollback().version)

    async def promote(self) -> Done:
        """The canary becomes the current policy.

        Raises:
            UserError: there is none.
        """
        return await self._remembered(self.deployment.promote().version)

    async def stop(self, place: Literal["shadow", "canary"]) -> Done:
        """A shadow or canary is deployed no more.

        Raises:
            UserError: there is none.
        """
        stop: Callable[[], Release] = self.deployment.stop_shadow if place == "shadow" else self.deployment.stop_canary
        return await self._remembered(stop().version)

    async def restore(self) -> None:
        """The shadow and the canary of a gateway that ended in order go on, counted anew. What does not is said."""
        trials, why_not = self.store.index.trials, self.store.interrupted
        tried: tuple[tuple[Place, str], ...] = (("shadow", trials.shadow), ("canary", trials.canary))
        await self._trying(trials, orderly=False)  # one that takes the process down here must not at the next start
        for place, version in tried:
            if not version:
                continue
            try:
                if why_not:
                    raise UserError(f"{why_not}; push it again")
                release = await asyncio.to_thread(self.store.load, version)
                await asyncio.to_thread(self._self_test.check, release.policy, version)
                self._try(release, place, trials.share)
            except UserError as error:
                self.deployment.say("not_restored", f"the {place} {version} does not go on: {error}")
        if trials.shadow or trials.canary:
            await self._remembered("")
        self._restored = True

    async def end(self) -> None:
        """The gateway ends in order: what is tried now goes on at its next start."""
        if self._restored:
            await self._remembered("", orderly=True)
        elif not self.store.interrupted:  # what was to go on still is
            await self._trying(self.store.index.trials, orderly=True)

    async def _trying(self, trials: Trials, *, orderly: bool) -> None:
        """Write down what is to go on, where something is. Where that cannot be done, the next change says it."""
        if trials.shadow or trials.canary:
            deployment = self.deployment
            predecessors = [release.version for release in deployment.predecessors]
            with contextlib.suppress(UserError):
                await asyncio.to_thread(
                    self.store.remember, deployment.current.version, predecessors, trials, orderly=orderly
                )

    def listed(self) -> list[Listed]:
        """Every policy of the store, the last pushed first."""
        places: dict[str, list[str]] = {}
        for place, version in self._placed():
            places.setdefault(version, []).append(place)
        return [
            Listed(version, entry.name, entry.summary, entry.pushed, tuple(places.get(version, ())))
            for version, entry in reversed(self.store.index.policies.items())
        ]

    def _placed(self) -> Iterator[tuple[str, str]]:
        """Places and the versions there."""
        deployment = self.deployment
        yield "current", deployment.current.version
        if deployment.canary is not None:
            yield "canary", deployment.canary.release.version
        if deployment.shadow is not None:
            yield "shadow", deployment.shadow.release.version
        if deployment.predecessors:
            yield "previous", deployment.predecessors[-1].version

    async def _push(self, prepare: Callable[[], Prepared], place: Place, share: float) -> Done:
        async with self._turn:
            try:
                prepared = await asyncio.to_thread(prepare)
                await self._keep(prepared)
                return await self._deploy(prepared.release, place, share)
            except UserError as error:
                self.deployment.say("refused", str(error))
                raise

    async def _keep(self, prepared: Prepared) -> None:
        release = prepared.release
        await asyncio.to_thread(self._self_test.check, release.policy, release.version)
        await asyncio.to_thread(self.store.keep, prepared, {version for _, version in self._placed()})

    async def _deploy(self, release: Release, place: Place, share: float) -> Done:
        if place != "current":
            self._try(release, place, share)
        elif self._decides_already(release.version):
            return Done(release.version, f"{release.version} decides already")
        else:
            self.deployment.activate(release)
        return await self._remembered(release.version)

    def _try(self, release: Release, place: Place, share: float) -> None:
        if place == "shadow":
            self.deployment.start_shadow(release)
        else:
            self.deployment.start_canary(release, share, self._bounds)

    def _decides_already(self, version: str) -> bool:
        current = self.deployment.current
        return current.version == version and not isinstance(current.policy, BrokenPolicy)

    async def _remembered(self, version: str, *, orderly: bool = False) -> Done:
        """Write down what has just changed. The change stands, also where it cannot be written down."""
        deployment = self.deployment
        sentence = deployment.events[-1].sentence if deployment.events else ""
        async with self._writing:  # the last one to write sees all changes
            predecessors = [release.version for release in deployment.predecessors]
            try:
                await asyncio.to_thread(
                    self.store.remember, deployment.current.version, predecessors, self._trials(), orderly=orderly
                )
            except UserError as error:
                sentence = f"{sentence}, but a restart will not know it: {error}"
                deployment.say("not_remembered", sentence)
        return Done(version, sentence)

    def _trials(self) -> Trials:
        shadow, canary = self.deployment.shadow, self.deployment.canary
        return Trials(
            shadow="" if shadow is None or shadow.off else shadow.release.version,
            canary="" if canary is None else canary.release.version,
            share=0.0 if canary is None else canary.share,
        )
