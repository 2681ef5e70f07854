"""Scripted skills: waypoints for the gripper, computed from where things are, and the servo that follows them.

A skill is a generator that yields the next `Goal` and reads the scene anew whenever it is resumed, so one control step
is one `next`. Skills ask the scene only for `Thing`s and `holding`, never how the scene knows: from the simulator's
state (`policies.scripted`) or from pixels (`policies.scripted_vision`).
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from wfm_core.data.actions import AGENT_POS_DIM, MAX_ROTATION, MAX_TRANSLATION

TRAVEL_HEIGHT = 0.09  # m, of the gripper above what it shall grasp, or of a carried object above the target
PUSH_GAP = 0.035  # m, between a pushed object's face and the gripper before contact
FINGER_REACH = 0.012  # m, from the end-effector point to the face of the closed fingers
CLOSING_STEPS = 3
CRUISE, CAREFUL = 0.032, 0.02  # m per step
LOWEST_GRIP = 0.012  # m, height of the end effector over the table at which the fingertips nearly touch it


@dataclass(frozen=True)
class Thing:
    """What a skill knows of an object: centre (m), yaw (rad) and full extent (m), robot-base frame."""

    position: np.ndarray
    yaw: float
    size: tuple[float, float, float]


@dataclass(frozen=True)
class Goal:
    """Where the gripper shall be: position (m), yaw (rad), openness in [0, 1], and the speed limit (m per step)."""

    position: np.ndarray
    yaw: float
    gripper: float
    speed: float = CRUISE


class Scene(Protocol):
    """What a skill may look at; `agent_pos` is (7,), see `wfm_core.data.actions`."""

    agent_pos: np.ndarray

    def thing(self, name: str) -> Thing:
        """Return the object as it is now (to the scene's knowledge)."""
        ...

    def holding(self, name: str) -> bool:
        """Tell whether the object is between the closed fingers (to the scene's knowledge)."""
        ...


Skill = Generator[Goal, None, bool]
"""Yields goals; returns whether it did what it is for."""


def wrap(angle: float, period: float = 2 * math.pi) -> float:
    """Return the angle's representative in [-period / 2, period / 2)."""
    return (angle + period / 2) % period - period / 2


class Servo:
    """Turn goals into Bridge actions.

    Bridge adds a delta to the previous *target*, which the arm reaches late, so the servo integrates its own commands
    (closing the loop on the late measurement would overshoot) and removes what error remains slowly.
    """

    def __init__(self, agent_pos: np.ndarray) -> None:
        """Start from the measured (7,) pose."""
        self._target = np.array(agent_pos, dtype=np.float64)
        self._bias = np.zeros(3)
        self._last = self._target[:3].copy()

    def act(self, goal: Goal, agent_pos: np.ndarray) -> np.ndarray:
        """Return the (7,) float32 physical action towards `goal` from the measured (7,) pose; call `sent` with it."""
        agent_pos = np.asarray(agent_pos, dtype=np.float64)
        if np.linalg.norm(self._target[:3] - agent_pos[:3]) > 0.06:  # a command had no effect: start from what is
            self._target[:6], self._bias = agent_pos[:6], np.zeros(3)
        miss = goal.position + self._bias - self._target[:3]
        settled = np.linalg.norm(agent_pos[:3] - self._last) < 0.003
        self._last = agent_pos[:3].copy()
        if settled and np.linalg.norm(miss) < 0.004:
            self._bias = np.clip(self._bias + 0.4 * (goal.position - agent_pos[:3]), -0.015, 0.015)
            miss = goal.position + self._bias - self._target[:3]
        distance = np.linalg.norm(miss)
        action = np.zeros(AGENT_POS_DIM)
        action[:3] = miss * min(1.0, min(goal.speed, MAX_TRANSLATION) / max(distance, 1e-9))
        roll, pitch, yaw = agent_pos[3:6]
        level = np.array([math.cos(yaw) * roll - math.sin(yaw) * pitch, math.sin(yaw) * roll + math.cos(yaw) * pitch])
        action[3:5] = np.clip(-0.5 * level, -0.1, 0.1)
        action[5] = np.clip(wrap(goal.yaw - self._target[5]), -MAX_ROTATION, MAX_ROTATION)
        action[6] = goal.gripper
        return action.astype(np.float32)

    def sent(self, action: np.ndarray, agent_pos: np.ndarray) -> None:
        """Note the (7,) action that was really sent from the measured (7,) pose."""
        centre = np.asarray(agent_pos[:3], dtype=np.float64)
        lag, turn = self._target[:3] - centre, float(action[5])
        lag[:2] = (
            math.cos(turn) * lag[0] - math.sin(turn) * lag[1],
            math.sin(turn) * lag[0] + math.cos(turn) * lag[1],
        )
        self._target[:3] = centre + lag + action[:3]
        self._target[5] = wrap(self._target[5] + turn)


def grip_yaw(thing: Thing, near: float) -> float:
    """Return the gripper yaw that closes across the object's narrow side: the equivalent angle nearest to `near`."""
    long_axis = thing.yaw if thing.size[0] >= thing.size[1] else thing.yaw + math.pi / 2
    near = 0.6 * near  # prefer the middle of the wrist's range
    return near + wrap(long_axis - near, symmetry(thing))


def symmetry(thing: Thing) -> float:
    """Return the angle by which the footprint can turn without changing: a quarter turn if square, else a half."""
    return math.pi / 2 if abs(thing.size[0] - thing.size[1]) < 0.2 * max(thing.size[:2]) else math.pi


def go_to(
    scene: Scene, goal: Callable[[], Goal], *, tolerance: float = 0.008, max_steps: int = 25,
    unless: Callable[[], bool] | None = None,
) -> Skill:  # fmt: skip
    """Follow a goal, which may move, until the gripper is there (within `tolerance`, m, and 0.1 rad).

    Returns False after `max_steps` steps, or as soon as `unless` holds.
    """
    for _ in range(max_steps):
        now = goal()
        if unless is not None and unless():
            return False
        close = np.linalg.norm(now.position - scene.agent_pos[:3]) < tolerance
        if close and abs(wrap(now.yaw - float(scene.agent_pos[5]))) < 0.1:
            return True
        yield now
    return False


def stay(scene: Scene, gripper: float, steps: int) -> Skill:
    """Hold the present pose while the gripper opens or closes."""
    here = Goal(np.array(scene.agent_pos[:3], dtype=np.float64), float(scene.agent_pos[5]), gripper)
    for _ in range(steps):
        yield here
    return True


def rise(scene: Scene, height: float, gripper: float, unless: Callable[[], bool] | None = None) -> Skill:
    """Go straight up to `height` (m) over the table, or stay if already higher."""
    position = np.array(scene.agent_pos[:3], dtype=np.float64)
    position[2] = max(position[2], height)
    goal = Goal(position, float(scene.agent_pos[5]), gripper)
    return (yield from go_to(scene, lambda: goal, tolerance=0.02, unless=unless))


def grasp(scene: Scene, name: str, offset: np.ndarray | None = None) -> Skill:
    """Take the object between the fingers; `offset` (3,), m, displaces the grip (a deliberate miss)."""
    offset = np.zeros(3) if offset is None else np.asarray(offset, dtype=np.float64)
    yaw = grip_yaw(scene.thing(name), float(scene.agent_pos[5]))

    def over() -> Goal:
        position = scene.thing(name).position + offset
        return Goal(np.array([*position[:2], position[2] + TRAVEL_HEIGHT]), yaw, 1.0)

    yield from go_to(scene, over, tolerance=0.012)
    yaw = grip_yaw(scene.thing(name), float(scene.agent_pos[5]))
    grip = over().position  # frozen: do not chase what the fingers push aside
    grip[2] = max(grip[2] - TRAVEL_HEIGHT, LOWEST_GRIP)
    yield from go_to(scene, lambda: Goal(grip, yaw, 1.0, CAREFUL + 0.01), tolerance=0.006, max_steps=10)
    yield from stay(scene, 0.0, CLOSING_STEPS)
    return scene.holding(name)


def carry(
    scene: Scene, name: str, place: Callable[[], np.ndarray], *, yaw: Callable[[], float] | None = None,
    unless: Callable[[], bool] | None = None,
) -> Skill:  # fmt: skip
    """Bring a held object's centre to `place()` (3,), m, from above, turned to `yaw()` if given; do not let go.

    Returns False as soon as `unless` holds, wherever that is.
    """
    held = scene.thing(name)
    offset = np.array(scene.agent_pos[:3], dtype=np.float64) - held.position
    offset[:2], offset[2] = np.clip(offset[:2], -0.03, 0.03), np.clip(offset[2], -0.01, 0.03)
    start = float(scene.agent_pos[5])
    turn = 0.0 if yaw is None else wrap(yaw() - held.yaw, symmetry(held))
    if abs(start + turn) > 1.9:
        turn -= math.copysign(symmetry(held), turn)
    swing = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])

    def at(height: float, speed: float) -> Goal:
        position = place() + np.array([*(swing @ offset[:2]), offset[2] + height])
        return Goal(position, wrap(start + turn), 0.0, speed)

    clear = max(float(scene.agent_pos[2]), at(0.05, CRUISE).position[2])
    if not (yield from rise(scene, clear, 0.0, unless)):
        return False
    if not (yield from go_to(scene, lambda: at(0.05, CRUISE), tolerance=0.012, unless=unless)):
        return False
    return (yield from go_to(scene, lambda: at(0.0, CAREFUL), tolerance=0.006, max_steps=8, unless=unless))


def release(scene: Scene) -> Skill:
    """Open the fingers and withdraw upwards."""
    yield from stay(scene, 1.0, 2)
    return (yield from rise(scene, float(scene.agent_pos[2]) + 0.07, 1.0))


def push(
    scene: Scene, name: str, goal: Callable[[], np.ndarray], *, stop_at: float = 0.008, max_steps: int = 40
) -> Skill:
    """Push the object with the closed fingers until its centre is within `stop_at` (m) of `goal()` in the plane.

    Returns False when the object has slipped aside (call again to go behind it anew) or after `max_steps`.
    """

    def line() -> tuple[np.ndarray, float, float, float]:
        thing = scene.thing(name)
        way = goal()[:2] - thing.position[:2]
        distance = float(np.linalg.norm(way))
        way = way / max(distance, 1e-9)
        local = math.atan2(way[1], way[0]) - thing.yaw
        half = 0.5 * (thing.size[0] * abs(math.cos(local)) + thing.size[1] * abs(math.sin(local)))
        return way, distance, half, thing.position[2]

    def across() -> float:
        """Return the gripper yaw with the fingers side by side across the way: a broad front turns the object less."""
        way = line()[0]
        here = float(scene.agent_pos[5])
        return 0.6 * here + wrap(math.atan2(way[1], way[0]) - 0.6 * here, math.pi)

    def behind(height: float, speed: float) -> Goal:
        way, _, half, z = line()
        centre = scene.thing(name).position[:2] - way * (half + FINGER_REACH + PUSH_GAP)
        return Goal(np.array([*centre, max(z, LOWEST_GRIP) + height]), across(), 0.0, speed)

    yield from go_to(scene, lambda: behind(TRAVEL_HEIGHT - 0.02, CRUISE), tolerance=0.012)
    low = behind(0.0, CRUISE)
    yield from go_to(scene, lambda: low, tolerance=0.008, max_steps=8)
    for _ in range(max_steps):
        way, distance, half, z = line()
        if distance < stop_at:
            return True
        aside = scene.thing(name).position[:2] - np.array(scene.agent_pos[:2], dtype=np.float64)
        if aside @ way < 0.3 * np.linalg.norm(aside) or abs(aside @ [-way[1], way[0]]) > half + 0.01:
            return False
        # aim at a point behind the centre, so that the contact stays on the line through centre and goal
        contact = scene.thing(name).position[:2] - way * (half + FINGER_REACH - min(CAREFUL, distance))
        yield Goal(np.array([*contact, max(z, LOWEST_GRIP)]), across(), 0.0, CAREFUL)
    return False
