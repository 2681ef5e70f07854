"""Gymnasium environments: the imagined Bridge and its ground-truth twin.

Importing this package only registers the ids; torch and mujoco are imported when an env is made.
"""

from gymnasium import register

register(
    id="WorldModel-Bridge-v0",
    entry_point="envs.world_model_bridge:WorldModelBridgeEnv",
    vector_entry_point="envs.world_model_bridge:WorldModelBridgeVectorEnv",
    kwargs={"task": "put_carrot_on_plate"},
)
register(
    id="MujocoBridge-v0",
    entry_point="envs.mujoco_bridge:MujocoBridgeEnv",
    vector_entry_point="envs.mujoco_bridge:MujocoBridgeVectorEnv",
    kwargs={"task": "put_carrot_on_plate"},
)
