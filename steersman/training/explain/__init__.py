"""What a policy does and why, for people: `steersman explain`."""
