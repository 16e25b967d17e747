"""Gymnasium environments over a runtime. `gymnasium.make("Steersman/Dispatch-v0")` needs no import of this package."""
