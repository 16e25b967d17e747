"""Rewards, one module each: `REWARD` is a `steersman.envs.reward.Reward`."""
