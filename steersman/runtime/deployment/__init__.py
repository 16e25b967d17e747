"""Which policies decide: the current one, a canary beside it, a shadow behind them, and the fallback under all.

Modules: `deployment` (who decides a request), `arm` and `canary` and `shadow` (what each is counted by), `judge` (what
makes a choice valid); for those who change it: `store` (bundles that were pushed), `selftest`, `deployer` (push,
activate, promote, roll back) and `watch` (a bundle that changes on disk). Only the first four run at a decision.
"""

from __future__ import annotations

from steersman.runtime.deployment.canary import CanaryBounds
from steersman.runtime.deployment.deployment import Deployment
from steersman.runtime.deployment.release import Release

__all__ = ["CanaryBounds", "Deployment", "Release"]
