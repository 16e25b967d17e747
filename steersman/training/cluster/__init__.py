"""Simulated episodes on a Ray cluster (docs/cluster.md).

connect   a cluster of this machine or a running one, as a context
cluster   long-lived workers, one a core: work handed out, and again when a worker is lost
worker    what runs on each of them
arena     `training.objective.Arena`, whose episodes are played by workers
"""
