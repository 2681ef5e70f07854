"""Actions and proprioception: the only place that knows their layout, units, limits and conversions.

The project's convention, everywhere inside: an action is float32 (dx, dy, dz, droll, dpitch, dyaw, gripper), metres
and radians per control step in the robot-base frame, the rotation about the current end-effector position, the
gripper an absolute target in [0, 1] with 1 = open. `agent_pos` is float32 (x, y, z, roll, pitch, yaw, gripper) of the
end effector in the base frame; R = Rz(yaw) Ry(pitch) Rx(roll) and the gripper pointing straight down is (0, 0, 0).

Source: BridgeData V2 (Walke et al., CoRL 2023), control and recording conventions.
"""

import numpy as np

CONTROL_HZ = 5
ACTION_DIM = 7
AGENT_POS_DIM = 7
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
AGENT_POS_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
MAX_TRANSLATION = 0.05  # m per control step
MAX_ROTATION = 0.25  # rad per control step

ACTION_LOW = np.array([-MAX_TRANSLATION] * 3 + [-MAX_ROTATION] * 3 + [0.0], dtype=np.float32)
ACTION_HIGH = np.array([MAX_TRANSLATION] * 3 + [MAX_ROTATION] * 3 + [1.0], dtype=np.float32)


def to_physical(normalised: np.ndarray) -> np.ndarray:
    """Map actions from the Gymnasium box [-1, 1] to physical units.

    Args:
        normalised: (..., 7) float, values in [-1, 1].

    Returns:
        (..., 7) float32 in m, rad and gripper openness.

    Raises:
        ValueError: the last dimension is not 7.
    """
    return _affine(normalised, (ACTION_HIGH - ACTION_LOW) / 2, (ACTION_HIGH + ACTION_LOW) / 2)


def to_normalised(physical: np.ndarray) -> np.ndarray:
    """Invert `to_physical`: (..., 7) physical units to float32 in [-1, 1] (values beyond the limits stay beyond).

    Raises:
        ValueError: the last dimension is not 7.
    """
    half, centre = (ACTION_HIGH - ACTION_LOW) / 2, (ACTION_HIGH + ACTION_LOW) / 2
    return _affine(physical, 1 / half, -centre / half)


def hold_action(gripper: float) -> np.ndarray:
    """Return the (7,) float32 physical action that keeps the pose and holds the gripper at `gripper` in [0, 1]."""
    return np.array([0, 0, 0, 0, 0, 0, gripper], dtype=np.float32)


def _affine(action: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    action = np.asarray(action, dtype=np.float32)
    if action.shape[-1:] != (ACTION_DIM,):
        raise ValueError(f"an action must have shape (..., {ACTION_DIM}), got {action.shape}")
    return (action * scale + offset).astype(np.float32)
