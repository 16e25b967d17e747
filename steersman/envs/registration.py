"""Tells Gymnasium, through its entry point for plugins, which environments there are."""

from __future__ import annotations


def register() -> None:
    """Called by Gymnasium when it is imported; so nothing heavy is imported here."""
    from gymnasium.envs.registration import register as add

    add(
        id="Steersman/Dispatch-v0",
        entry_point="steersman.envs.dispatch:DispatchEnv",
        vector_entry_point="steersman.envs.vector:DispatchVectorEnv",
        # The observation is checked by our own tests; the passive checker would cost more than the environment.
        disable_env_checker=True,
        order_enforce=False,
    )
