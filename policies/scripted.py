"""Scripted experts that see the simulator's state: they record the demonstrations, and the failures beside them."""

import math
from dataclasses import replace

import numpy as np

from policies.behaviours import BEHAVIOURS, Actor, wait
from policies.skills import LOWEST_GRIP, Servo, Thing
from tasks.task import Task, TaskState
from wfm_core.data.actions import ACTION_HIGH, ACTION_LOW


class StateScene:
    """What skills see, read from the simulator's state."""

    def __init__(self, task: Task) -> None:
        """Know the objects' sizes."""
        self._task = task
        self._sizes = {item.name: item.size for item in task.objects}
        self.blur: dict[str, np.ndarray] = {}

    def look(self, state: TaskState, agent_pos: np.ndarray) -> None:
        """Take in the present moment."""
        self._state = state
        self.agent_pos = np.asarray(agent_pos, dtype=np.float64)

    def thing(self, name: str) -> Thing:
        """Return the object as it is now."""
        w, x, y, z = self._state.quats[name]
        yaw = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        position = np.array(self._state.positions[name], dtype=np.float64) + self.blur.get(name, 0.0)
        return Thing(position, yaw, self._sizes[name])

    def holding(self, name: str) -> bool:
        """Tell whether the object is between both fingers."""
        return self._state.grasped == name

    def solved(self) -> bool:
        """Tell whether the task is solved at this moment."""
        return self._task.success(self._state)


class Disturbance:
    """Smooth (Ornstein-Uhlenbeck) action noise and sudden slips of the gripper, both scaled by one dial."""

    def __init__(self, noise: float, rng: np.random.Generator) -> None:
        """Start at rest; with noise 0 nothing is drawn and nothing changes."""
        self._noise, self._rng = noise, rng
        self._drift = np.zeros(6)
        self._slip_steps = 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Return the disturbed (7,) action."""
        if self._noise == 0:
            return action
        scale = self._noise * np.array([0.016, 0.016, 0.011, 0.02, 0.02, 0.09])
        self._drift = 0.75 * self._drift + math.sqrt(1 - 0.75**2) * scale * self._rng.standard_normal(6)
        disturbed = action.astype(np.float64)
        disturbed[:6] += self._drift
        if self._slip_steps == 0 and self._rng.random() < 0.035 * self._noise:
            self._slip_steps = int(self._rng.integers(1, 5))
        if self._slip_steps > 0:
            self._slip_steps -= 1
            disturbed[6] = 1.0 - disturbed[6]
        return disturbed.astype(np.float32)


class GoalFollower:
    """Follow a behaviour's goals, disturbed: the part that experts on states and on pixels share."""

    def __init__(self, behaviour: str, actor: Actor) -> None:
        """Begin an episode; `actor.scene` must have been shown the first moment."""
        self._actor = actor
        self._servo = Servo(actor.scene.agent_pos)
        self._disturb = Disturbance(actor.noise, actor.rng)
        self._goals = BEHAVIOURS[behaviour](actor)
        self._pace = actor.rng.uniform(0.6, 1.3) if actor.noise > 0 else 1.0

    def act(self) -> np.ndarray:
        """Return the next (7,) float32 physical action for the moment that the scene shows."""
        agent_pos = self._actor.scene.agent_pos
        goal = next(self._goals, None)
        if goal is None:  # nothing is left to do
            self._goals = wait(self._actor)
            goal = next(self._goals)
        goal = replace(goal, speed=self._pace * goal.speed)
        action = self._disturb(self._servo.act(goal, agent_pos))
        action[2] = max(action[2], min(0.0, LOWEST_GRIP - agent_pos[2]))
        action = np.clip(action, ACTION_LOW, ACTION_HIGH)
        self._servo.sent(action, agent_pos)
        return action


class ScriptedExpert:
    """Act on the simulator's state by waypoints.

    The behaviour "expert" at noise 0 is a function of the states alone; everything else also draws from the seed.
    """

    def __init__(self, task: Task, behaviour: str = "expert", noise: float = 0.0, seed: int = 0) -> None:
        """Choose what to do.

        Args:
            task: the task to solve (or to fail).
            behaviour: one of `policies.behaviours.BEHAVIOURS`.
            noise: >= 0; 0 leaves the behaviour as it is, at 1 the expert mostly fails.
            seed: of the first episode.

        Raises:
            ValueError: unknown behaviour, or negative noise.
        """
        if behaviour not in BEHAVIOURS:
            raise ValueError(f"behaviour must be one of {sorted(BEHAVIOURS)}, got {behaviour!r}")
        if not noise >= 0:
            raise ValueError(f"noise must be >= 0, got {noise}")
        self.task = task
        self.behaviour = behaviour
        self.noise = noise
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Begin an episode."""
        self._seed = seed
        self._scene = StateScene(self.task)
        self._follower: GoalFollower | None = None

    def act(self, state: TaskState, agent_pos: np.ndarray) -> np.ndarray:
        """Return the next (7,) float32 physical action.

        Args:
            state: ground truth of this moment.
            agent_pos: (7,) measured end-effector pose and gripper (`wfm_core.data.actions`).
        """
        self._scene.look(state, agent_pos)
        if self._follower is None:
            actor = Actor(self.task, self._scene, np.random.default_rng(self._seed), self.noise)
            self._follower = GoalFollower(self.behaviour, actor)
        return self._follower.act()
