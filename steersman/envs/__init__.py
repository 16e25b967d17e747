"""Gymnasium environments over a runtime. Importing this package registers them:

import gymnasium as gym
import steersman.envs

env = gym.make("Steersman/Dispatch-v0", workload="default", fleet="default")
envs = gym.make_vec("Steersman/Dispatch-v0", num_envs=64)
"""

from gymnasium.envs.registration import register

register(
    id="Steersman/Dispatch-v0",
    entry_point="steersman.envs.dispatch:DispatchEnv",
    vector_entry_point="steersman.envs.vector:DispatchVectorEnv",
    # Our tests run Gymnasium's checker. At every step, it would cost more than the environment does.
    disable_env_checker=True,
    order_enforce=False,
)
