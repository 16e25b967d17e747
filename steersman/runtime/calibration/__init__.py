"""Calibration: drive a real engine with a short designed load, and fit its cost profile to what its clients see."""
