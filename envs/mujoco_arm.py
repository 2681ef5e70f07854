"""WidowX 250s: forward kinematics, inverse kinematics and Bridge's control semantics (no objects, no rendering)."""

from pathlib import Path

import numpy as np

from envs.mujoco_gl import mujoco
from wfm_core.data.actions import ACTION_DIM, ACTION_HIGH, ACTION_LOW

ARM_XML = Path(__file__).parent / "assets" / "widowx250s.xml"
INITIAL_QPOS = np.array(
    [-0.0184, 0.0399, 0.2224, -0.0046, 1.3652, 0.0015]
)  # rad, end effector near (.292, -.006, .135)
NUM_JOINTS = 6
FINGER_CLOSED, FINGER_OPEN = 0.015, 0.037  # m, travel of each finger joint
FINGER_SQUEEZE = 0.010  # m, commanded when fully closed: beyond the stop, so that a closed gripper keeps pressing
MIN_EE_HEIGHT = 0.011  # m, of a target: the finger tips reach 10 mm below the end-effector point
MAX_JOINT_STEP = np.pi * 0.2  # rad: the published 3.1416 rad/s for one control step; what needs more counts as failed

POINTING_DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
"""Rotation of the end-effector link that Bridge calls (0, 0, 0); R_state = R_link @ POINTING_DOWN.T."""


def openness(finger: float) -> float:
    """Map a finger joint position (m) to Bridge's openness in [0, 1], 1 = open."""
    return float(np.clip((finger - 0.010) / (0.035 - 0.010), 0.0, 1.0))


def finger_target(gripper: float) -> float:
    """Map a commanded openness in [0, 1] to the finger joint's target (m)."""
    return FINGER_SQUEEZE + float(np.clip(gripper, 0.0, 1.0)) * (FINGER_OPEN - FINGER_SQUEEZE)


def euler_to_matrix(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Return the (3, 3) rotation Rz(yaw) Ry(pitch) Rx(roll)."""
    (cr, cp, cy), (sr, sp, sy) = np.cos((roll, pitch, yaw)), np.sin((roll, pitch, yaw))
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def matrix_to_euler(rotation: np.ndarray) -> np.ndarray:
    """Invert `euler_to_matrix`: (3,) roll, pitch, yaw in rad."""
    roll = np.arctan2(rotation[2, 1], rotation[2, 2])
    pitch = np.arctan2(-rotation[2, 0], np.hypot(rotation[0, 0], rotation[1, 0]))
    yaw = np.arctan2(rotation[1, 0], rotation[0, 0])
    return np.array([roll, pitch, yaw])


class ArmKinematics:
    """Kinematics of the arm alone, on its own small MuJoCo model."""

    def __init__(self) -> None:
        """Compile the arm."""
        self._model = mujoco.MjModel.from_xml_path(str(ARM_XML))
        self._data = mujoco.MjData(self._model)
        self._site = self._model.site("ee").id
        self._low, self._high = self._model.jnt_range[:NUM_JOINTS].T.copy()
        self._jac = np.zeros((6, self._model.nv))

    def forward(self, qpos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the end effector's position (3,), m, and rotation (3, 3), Bridge's convention, at (6,) joints, rad."""
        self._data.qpos[:NUM_JOINTS] = qpos
        mujoco.mj_kinematics(self._model, self._data)
        rotation = self._data.site_xmat[self._site].reshape(3, 3) @ POINTING_DOWN.T
        return self._data.site_xpos[self._site].copy(), rotation

    def inverse(self, position: np.ndarray, rotation: np.ndarray, start: np.ndarray) -> np.ndarray | None:
        """Solve for the joints by damped least squares.

        Args:
            position: (3,) target, m.
            rotation: (3, 3) target, Bridge's convention.
            start: (6,) joints to start from, rad.

        Returns:
            (6,) joints within 0.5 mm and 5 mrad of the target, or None where none was found within the joint limits.
        """
        qpos = np.clip(start, self._low, self._high)
        error = np.zeros(6)
        for _ in range(40):
            reached, orientation = self.forward(qpos)
            error[:3] = position - reached
            error[3:] = 0.5 * np.cross(orientation.T, rotation.T).sum(axis=0)
            if np.abs(error[:3]).max() < 5e-4 and np.abs(error[3:]).max() < 5e-3:
                return qpos
            mujoco.mj_comPos(self._model, self._data)
            mujoco.mj_jacSite(self._model, self._data, self._jac[:3], self._jac[3:], self._site)
            jac = self._jac[:, :NUM_JOINTS]
            step = jac.T @ np.linalg.solve(jac @ jac.T + 1e-5 * np.eye(6), error)
            qpos = np.clip(qpos + step * min(1.0, 0.4 / (np.abs(step).max() + 1e-9)), self._low, self._high)
        return None


class BridgeController:
    """Turn Bridge actions into joint targets, one per 0.2 s control step.

    The delta applies to the previous *target*, not to the measured pose, and rotates about the current end-effector
    position in world axes. A target without a solution is dropped: the arm does not move in that step.
    """

    def __init__(self, kinematics: ArmKinematics) -> None:
        """Start at the initial joint position."""
        self._kinematics = kinematics
        self.reset(INITIAL_QPOS)

    def reset(self, qpos: np.ndarray) -> None:
        """Make the pose at `qpos`, (6,) rad, the target."""
        self.joints = np.array(qpos, dtype=np.float64)
        self.position, self.rotation = self._kinematics.forward(self.joints)
        self.gripper = 1.0

    def advance(self, action: np.ndarray, ee_pos: np.ndarray) -> bool:
        """Integrate one action.

        Args:
            action: (7,) in m, rad and openness; clipped to Bridge's limits.
            ee_pos: (3,) measured end-effector position, m: the centre of the rotation.

        Returns:
            Whether the arm follows (False: no solution, the target stays).

        Raises:
            ValueError: the action has another shape or is not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(f"an action must be {ACTION_DIM} finite numbers, got shape {action.shape}: {action}")
        action = np.clip(action, ACTION_LOW, ACTION_HIGH)
        self.gripper = float(action[6])
        turn = euler_to_matrix(*action[3:6])
        position = ee_pos + turn @ (self.position - ee_pos) + action[:3]
        position[2] = max(position[2], MIN_EE_HEIGHT)
        rotation = turn @ self.rotation
        joints = self._kinematics.inverse(position, rotation, self.joints)
        if joints is None or np.abs(joints - self.joints).max() > MAX_JOINT_STEP:
            return False
        self.position, self.rotation, self.joints = position, rotation, joints
        return True
