"""Heuristic policies, one module each: `round_robin.POLICY` is the policy `round-robin`."""
