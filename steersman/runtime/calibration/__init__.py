"""Calibration: drive a real engine with a short designed load, and fit its cost profile to what its clients see."""

from steersman.runtime.calibration.calibrate import Measured, calibrate, fleet_of_url, write

__all__ = ["Measured", "calibrate", "fleet_of_url", "write"]
