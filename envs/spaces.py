"""The observation and action spaces both twins share, written once."""

import numpy as np
from gymnasium import spaces

from wfm_core.data.actions import ACTION_DIM, AGENT_POS_DIM

FRAME_SHAPE = (128, 128, 3)
"""(H, W, C) of a camera frame, uint8."""

# A WidowX reaches 0.65 m from its base; angles are Euler angles and the gripper an openness, so every bound is finite.
AGENT_POS_LOW = np.array([-1.0, -1.0, -1.0, -np.pi, -np.pi, -np.pi, 0.0], dtype=np.float32)
AGENT_POS_HIGH = np.array([1.0, 1.0, 1.0, np.pi, np.pi, np.pi, 1.0], dtype=np.float32)


def action_space() -> spaces.Box:
    """Return the box [-1, 1] of shape (7,), float32; `wfm_core.data.actions.to_physical` gives it units."""
    return spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)


def agent_pos_space() -> spaces.Box:
    """Return the box of `agent_pos` (7,) float32: x, y, z in m, roll, pitch, yaw in rad, gripper openness in [0, 1]."""
    assert AGENT_POS_LOW.shape == (AGENT_POS_DIM,)
    return spaces.Box(AGENT_POS_LOW, AGENT_POS_HIGH, dtype=np.float32)


def pixels_observation_space(frame_shape: tuple[int, int, int] = FRAME_SHAPE) -> spaces.Dict:
    """Return the space of `{"pixels": uint8 (H, W, 3), "agent_pos": float32 (7,)}`.

    Args:
        frame_shape: (H, W, 3) of a frame.
    """
    return spaces.Dict({"pixels": spaces.Box(0, 255, frame_shape, np.uint8), "agent_pos": agent_pos_space()})


def latents_observation_space(latent_shape: tuple[int, int, int]) -> spaces.Dict:
    """Return the space of `{"latents": float32 (h, w, C), "agent_pos": float32 (7,)}`, for agents that need no pixels.

    Args:
        latent_shape: (h, w, C) of one frame's latents.
    """
    return spaces.Dict(
        {"latents": spaces.Box(-np.inf, np.inf, latent_shape, np.float32), "agent_pos": agent_pos_space()}
    )
