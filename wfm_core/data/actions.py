"""Actions and proprioception: the only place that knows their layout, units, limits and conversions.

The project's convention, everywhere inside: an action is float32 (dx, dy, dz, droll, dpitch, dyaw, gripper), metres
and radians per control step in the robot-base frame, the rotation about the current end-effector position, the
gripper an absolute target in [0, 1] with 1 = open. `agent_pos` is float32 (x, y, z, roll, pitch, yaw, gripper) of the
end effector in the base frame; R = Rz(yaw) Ry(pitch) Rx(roll) and the gripper pointing straight down is (0, 0, 0).

Source: BridgeData V2 (Walke et al., CoRL 2023), control and recording conventions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

TRAVEL_SCALE = (0.2, 0.2, 0.2, 1.0, 1.0, 1.0)  # m and rad; brings the commanded travel of an episode to about [-1, 1]
QUANTILE = 0.01
"""Share of a robot's actions below, and above, the bounds that are read off its data."""


@dataclass(frozen=True)
class ActionSpace:
    """How a model reads actions; by default those of this project's convention.

    Attributes:
        low: of each dimension, what becomes -1.
        high: of each dimension, what becomes 1.
        travel_scale: of each leading dimension that is a step, all of which add up to where the arm is now, what brings
            the sum of an episode to about [-1, 1]; none where actions are targets.
    """

    low: tuple[float, ...] = tuple(ACTION_LOW.tolist())
    high: tuple[float, ...] = tuple(ACTION_HIGH.tolist())
    travel_scale: tuple[float, ...] = TRAVEL_SCALE

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or not all(a < b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(f"low must lie below high in each dimension, got {self.low} and {self.high}")
        if len(self.travel_scale) > len(self.low) or not all(scale > 0 for scale in self.travel_scale):
            raise ValueError(f"travel_scale must be positive, of at most {len(self.low)}, got {self.travel_scale}")

    @property
    def dim(self) -> int:
        """Dimensions of an action, A."""
        return len(self.low)

    @property
    def travel_dim(self) -> int:
        """Leading dimensions that add up."""
        return len(self.travel_scale)


BRIDGE_ACTIONS = ActionSpace()


def action_space_of(episodes: Sequence[np.ndarray], num_steps: int = 0) -> ActionSpace:
    """Read bounds off recorded actions: their quantiles, so that a few outliers do not squeeze all others.

    Args:
        episodes: (T, A) actions of each episode, in whatever units.
        num_steps: how many of the leading dimensions are steps that add up; 0 where actions are targets.

    Raises:
        ValueError: the episodes have different dimensions, fewer than `num_steps`, or actions that are not finite.
    """
    dims = {actions.shape[1] for actions in episodes}
    if len(dims) != 1 or num_steps > min(dims):
        raise ValueError(f"actions must have one number of dimensions, at least {num_steps}, got {sorted(dims)}")
    actions = np.concatenate(list(episodes)).astype(np.float64)
    if not np.isfinite(actions).all():
        raise ValueError("actions must be finite to have bounds; those of some episodes are not known")
    low, high = np.quantile(actions, [QUANTILE, 1 - QUANTILE], axis=0)
    still = np.maximum(1e-3, 1e-3 * np.abs(low)) > high - low  # a dimension that is not used reads 0
    low, high = np.where(still, low - 0.5, low), np.where(still, high + 0.5, high)
    travels = np.concatenate([np.abs(np.cumsum(each[:, :num_steps], axis=0)) for each in episodes])
    scale = np.quantile(travels, 1 - QUANTILE, axis=0) if num_steps else np.zeros(0)
    return ActionSpace(tuple(low.tolist()), tuple(high.tolist()), tuple(np.maximum(scale, 1e-3).tolist()))


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


def from_scaled(scaled: np.ndarray) -> np.ndarray:
    """Convert actions that were scaled for a tokenizer: m x 35, rad x 5.6, gripper -1 = open and +1 = closed.

    Args:
        scaled: (..., 7) float; further trailing dimensions must be cut off before.

    Returns:
        (..., 7) float32 in the project's convention.

    Raises:
        ValueError: the last dimension is not 7.

    Source: RT-1 (Brohan et al., 2022) action ranges, as used by Bridge clips in circulation.
    """
    return _affine(scaled, 1 / _SCALED, _SCALED_OFFSET)


def to_scaled(action: np.ndarray) -> np.ndarray:
    """Invert `from_scaled`, clipped to +-1.74 and +-1.39 as the source does: (..., 7) physical to (..., 7) float32."""
    limit = np.array([1.74] * 3 + [1.39] * 3 + [1.0], dtype=np.float32)
    return np.clip(_affine(action, _SCALED, -_SCALED_OFFSET * _SCALED), -limit, limit)


_SCALED = np.array([35.0] * 3 + [5.6] * 3 + [-2.0], dtype=np.float32)
_SCALED_OFFSET = np.array([0, 0, 0, 0, 0, 0, 0.5], dtype=np.float32)


def wrap_angle(angle: np.ndarray) -> np.ndarray:
    """Return the angles' representatives in [-pi, pi), rad."""
    return (np.asarray(angle) + np.pi) % (2 * np.pi) - np.pi


def euler_to_matrix(euler: np.ndarray) -> np.ndarray:
    """Convert (..., 3) roll, pitch, yaw (rad) to (..., 3, 3) float64 rotations Rz(yaw) Ry(pitch) Rx(roll)."""
    (sr, sp, sy), (cr, cp, cy) = (np.moveaxis(f(np.asarray(euler, dtype=np.float64)), -1, 0) for f in (np.sin, np.cos))
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_euler(rotation: np.ndarray) -> np.ndarray:
    """Convert (..., 3, 3) rotations to (..., 3) float64 roll, pitch, yaw, rad; pitch in [-pi/2, pi/2]."""
    pitch = np.arctan2(-rotation[..., 2, 0], np.hypot(rotation[..., 0, 0], rotation[..., 1, 0]))
    roll = np.arctan2(rotation[..., 2, 1], rotation[..., 2, 2])
    yaw = np.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])
    return np.stack([roll, pitch, yaw], axis=-1)


def relabel(agent_pos: np.ndarray) -> np.ndarray:
    """Return the actions that describe what was reached ("relabelled" convention, command lag 0).

    Args:
        agent_pos: (T + 1, 7) end-effector poses.

    Returns:
        (T, 7) float32: displacement, rotation from one pose to the next about the base axes, and the next gripper
        state clipped to [0, 1].
    """
    rotation = euler_to_matrix(agent_pos[:, 3:6])
    turn = matrix_to_euler(rotation[1:] @ np.swapaxes(rotation[:-1], -1, -2))
    gripper = np.clip(agent_pos[1:, 6:], 0, 1)
    return np.concatenate([np.diff(agent_pos[:, :3], axis=0), turn, gripper], axis=1).astype(np.float32)


def integrate(start: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Return the poses that actions lead through if each is reached: the inverse of `relabel`.

    Args:
        start: (7,) pose at first.
        actions: (T, 7) physical actions.

    Returns:
        (T + 1, 7) float32 poses, of which the first is `start`.
    """
    poses = [np.asarray(start, dtype=np.float64)]
    for action in np.asarray(actions, dtype=np.float64):
        position, rotation = poses[-1][:3] + action[:3], euler_to_matrix(action[3:6]) @ euler_to_matrix(poses[-1][3:6])
        poses.append(np.concatenate([position, matrix_to_euler(rotation), action[6:]]))
    return np.stack(poses).astype(np.float32)


def to_gripper_frame(actions: np.ndarray, agent_pos: np.ndarray) -> np.ndarray:
    """Convert to relative poses in the gripper's own frame, as IRASim and Cosmos store them (unscaled).

    Args:
        actions: (T, 7) physical actions.
        agent_pos: (T, 7) or (T + 1, 7) poses before each action.

    Returns:
        (T, 7) float32: translation (m) and rotation (rad) seen from the gripper frame of that data (its roll is ours
        less pi), and the gripper as they feed it, 0 = open and 1 = closed.
    """
    frame = _irasim_frame(agent_pos[: len(actions)])
    move = np.einsum("tji,tj->ti", frame, actions[:, :3])
    turn = np.swapaxes(frame, -1, -2) @ euler_to_matrix(actions[:, 3:6]) @ frame
    return np.concatenate([move, matrix_to_euler(turn), 1 - actions[:, 6:]], axis=1).astype(np.float32)


def from_gripper_frame(relative: np.ndarray, agent_pos: np.ndarray) -> np.ndarray:
    """Invert `to_gripper_frame`: (T, 7) relative poses and (T or T + 1, 7) poses to (T, 7) float32 physical actions."""
    frame = _irasim_frame(agent_pos[: len(relative)])
    move = np.einsum("tij,tj->ti", frame, relative[:, :3])
    turn = frame @ euler_to_matrix(relative[:, 3:6]) @ np.swapaxes(frame, -1, -2)
    return np.concatenate([move, matrix_to_euler(turn), 1 - relative[:, 6:]], axis=1).astype(np.float32)


def from_irasim_state(state: np.ndarray, closedness: np.ndarray) -> np.ndarray:
    """Convert IRASim and Cosmos proprioception.

    Args:
        state: (..., >= 6) x, y, z, roll - pi, pitch, yaw.
        closedness: (...) their continuous gripper state, 0 = open and 1 = closed.

    Returns:
        (..., 7) float32 agent_pos.
    """
    state = np.asarray(state, dtype=np.float64)
    roll = wrap_angle(state[..., 3:4] + np.pi)
    gripper = 1 - np.asarray(closedness, dtype=np.float64)[..., None]
    return np.concatenate([state[..., :3], roll, state[..., 4:6], gripper], axis=-1).astype(np.float32)


def to_irasim_state(agent_pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Invert `from_irasim_state`: (..., 7) agent_pos to their state (..., 6) and gripper closedness (...), float32."""
    agent_pos = np.asarray(agent_pos, dtype=np.float64)
    roll = wrap_angle(agent_pos[..., 3:4] - np.pi)
    state = np.concatenate([agent_pos[..., :3], roll, agent_pos[..., 4:6]], axis=-1)
    return state.astype(np.float32), np.clip(1 - agent_pos[..., 6], 0, 1).astype(np.float32)


def _irasim_frame(agent_pos: np.ndarray) -> np.ndarray:
    return euler_to_matrix(agent_pos[:, 3:6] - np.array([np.pi, 0, 0]))
