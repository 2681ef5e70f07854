"""The servo and the skills in a kinematic world with known answers: no physics, a one-step lag, a rigid grip."""

import math

import numpy as np
import pytest

from policies.skills import (
    CAREFUL,
    Goal,
    Servo,
    Thing,
    carry,
    go_to,
    grasp,
    grip_yaw,
    push,
    release,
    symmetry,
    wrap,
)
from wfm_core.data.actions import ACTION_HIGH, ACTION_LOW

BLOCK = Thing(np.array([0.3, 0.05, 0.02]), 0.4, (0.08, 0.03, 0.04))


class KinematicWorld:
    """The arm reaches each target one step late; what is between closed fingers moves with them rigidly."""

    def __init__(self, thing: Thing = BLOCK, sag: float = 0.0) -> None:
        self.agent_pos = np.array([0.29, 0.0, 0.13, 0.0, 0.05, 0.0, 1.0])
        self.target = self.agent_pos.copy()
        self.sag = sag
        self.object = thing
        self.held = False
        self.servo = Servo(self.agent_pos)

    def thing(self, name: str) -> Thing:
        return self.object

    def holding(self, name: str) -> bool:
        return self.held

    def follow(self, goal: Goal) -> np.ndarray:
        """Advance one step; return the action."""
        action = self.servo.act(goal, self.agent_pos)
        self.servo.sent(action, self.agent_pos)
        before = self.agent_pos.copy()
        lag = self.target[:3] - before[:3]  # Bridge turns the previous target about the measured position
        c, s = math.cos(action[5]), math.sin(action[5])
        swung = np.array([c * lag[0] - s * lag[1], s * lag[0] + c * lag[1], lag[2]])
        self.agent_pos[:6] = self.target[:6] - [0, 0, self.sag, 0, 0, 0]
        self.target[:3] = before[:3] + swung + action[:3]
        self.target[3:6] += action[3:6]
        self.agent_pos[6] = action[6]
        moved, turned = self.agent_pos[:3] - before[:3], self.agent_pos[5] - before[5]
        offset = self.object.position - before[:3]
        if self.held:
            c, s = math.cos(turned), math.sin(turned)
            swung = np.array([c * offset[0] - s * offset[1], s * offset[0] + c * offset[1], offset[2]])
            self.object = Thing(self.agent_pos[:3] + swung, self.object.yaw + turned, self.object.size)
        elif action[6] == 0 and np.linalg.norm(offset) < 0.012:
            self.held = True
        elif self.agent_pos[2] < self.object.position[2] + 0.01 and action[6] == 0:
            ahead = offset[:2] - moved[:2]
            reach = self.object.size[0] / 2 + 0.01
            if np.linalg.norm(moved[:2]) > 1e-4 and np.linalg.norm(ahead) < reach:  # a disc pushed by a point
                place = self.agent_pos[:2] + ahead / np.linalg.norm(ahead) * reach
                self.object = Thing(np.array([*place, self.object.position[2]]), self.object.yaw, self.object.size)
        if action[6] == 1:
            self.held = False
        return action

    def run(self, skill) -> bool:
        """Exhaust a skill and return its result."""
        while True:
            try:
                goal = next(skill)
            except StopIteration as stop:
                return stop.value
            action = self.follow(goal)
            assert np.all((action >= ACTION_LOW - 1e-6) & (action <= ACTION_HIGH + 1e-6))


def test_servo_reaches_a_goal_without_overshoot_despite_the_lag() -> None:
    world, goal = KinematicWorld(), Goal(np.array([0.40, -0.1, 0.05]), 0.7, 0.3)
    start = world.agent_pos[:3].copy()
    way = goal.position - start
    progress = []
    for _ in range(15):
        action = world.follow(goal)
        assert np.linalg.norm(action[:3]) <= goal.speed + 1e-6
        assert action[6] == pytest.approx(0.3)
        progress.append((world.agent_pos[:3] - start) @ way / (way @ way))
    assert np.all(np.diff(progress) > -1e-3)
    assert max(progress) < 1.01
    assert world.agent_pos[:3] == pytest.approx(goal.position, abs=1e-3)
    assert world.agent_pos[5] == pytest.approx(0.7, abs=0.01)
    assert world.agent_pos[3:5] == pytest.approx([0, 0], abs=0.01)  # levelled


def test_servo_removes_a_standing_error() -> None:
    world, goal = KinematicWorld(sag=0.006), Goal(np.array([0.32, 0.05, 0.1]), 0.0, 1.0)
    for _ in range(20):
        world.follow(goal)
    assert world.agent_pos[:3] == pytest.approx(goal.position, abs=1e-3)


def test_servo_starts_again_from_the_measured_pose_when_the_arm_did_not_follow() -> None:
    servo, stuck = Servo(np.zeros(7)), np.zeros(7)
    goal = Goal(np.array([0.5, 0.0, 0.0]), 0.0, 1.0)
    for _ in range(20):
        servo.sent(servo.act(goal, stuck), stuck)
    back = servo.act(Goal(np.array([-0.1, 0.0, 0.0]), 0.0, 1.0), stuck)
    assert back[0] < -0.02


@pytest.mark.parametrize(
    ("angle", "period", "expected"),
    [(3.5, 2 * math.pi, 3.5 - 2 * math.pi), (1.7, math.pi, 1.7 - math.pi), (0.3, 1, 0.3)],
)
def test_wrap(angle: float, period: float, expected: float) -> None:
    assert wrap(angle, period) == pytest.approx(expected)


def test_grip_closes_across_the_narrow_side() -> None:
    for yaw in np.linspace(-3, 3, 13):
        long_x, long_y = Thing(np.zeros(3), yaw, (0.1, 0.03, 0.03)), Thing(np.zeros(3), yaw, (0.03, 0.1, 0.03))
        assert wrap(grip_yaw(long_x, 0.2) - yaw, math.pi) == pytest.approx(0, abs=1e-9)
        assert wrap(grip_yaw(long_y, 0.2) - yaw - math.pi / 2, math.pi) == pytest.approx(0, abs=1e-9)
        assert abs(grip_yaw(long_x, 0.0)) <= math.pi / 2
        assert abs(grip_yaw(Thing(np.zeros(3), yaw, (0.03, 0.03, 0.03)), 0.0)) <= math.pi / 4
    assert symmetry(BLOCK) == math.pi


def test_go_to_gives_up_and_stops_on_request() -> None:
    world = KinematicWorld()
    far = Goal(np.array([5.0, 0.0, 0.1]), 0.0, 1.0)
    assert world.run(go_to(world, lambda: far, max_steps=4)) is False
    assert len(list(go_to(world, lambda: far, max_steps=4))) == 4
    assert list(go_to(world, lambda: far, unless=lambda: True)) == []
    here = Goal(world.agent_pos[:3].copy(), float(world.agent_pos[5]), 1.0)
    assert world.run(go_to(world, lambda: here)) is True


@pytest.mark.parametrize("turn", [None, 0.9])
def test_grasp_carry_release_puts_the_centre_where_it_was_told(turn: float | None) -> None:
    world, place = KinematicWorld(), np.array([0.36, -0.08, 0.03])
    assert world.run(grasp(world, "block")) is True
    assert world.object.position == pytest.approx(BLOCK.position, abs=2e-3)
    yaw = None if turn is None else (lambda: turn)
    assert world.run(carry(world, "block", lambda: place, yaw=yaw)) is True
    assert world.object.position == pytest.approx(place, abs=7e-3)
    if turn is not None:
        assert wrap(world.object.yaw - turn, math.pi) == pytest.approx(0, abs=0.1)
    put_down = world.object.position.copy()
    world.run(release(world))
    assert not world.held
    assert world.object.position == pytest.approx(put_down, abs=1e-9)
    assert world.agent_pos[2] > place[2] + 0.05


def test_grasp_beside_the_object_holds_nothing_and_leaves_it() -> None:
    world = KinematicWorld()
    assert world.run(grasp(world, "block", np.array([-0.02, 0.05, 0.0]))) is False
    assert world.object.position == pytest.approx(BLOCK.position)


def test_carry_stops_when_the_object_is_lost() -> None:
    world = KinematicWorld()
    world.run(grasp(world, "block"))
    world.held = False
    world.object = BLOCK
    skill = carry(world, "block", lambda: np.array([0.2, 0.2, 0.02]), unless=lambda: not world.held)
    assert world.run(skill) is False


@pytest.mark.parametrize("angle", [0.0, 1.5, 3.0, -1.2])
def test_push_brings_a_disc_to_its_goal(angle: float) -> None:
    world = KinematicWorld(Thing(np.array([0.3, 0.0, 0.02]), 0.0, (0.04, 0.04, 0.04)))
    goal = np.array([0.3 + 0.1 * math.cos(angle), 0.1 * math.sin(angle), 0.0])
    for _ in range(3):
        if world.run(push(world, "disc", lambda: goal)):
            break
    assert np.linalg.norm(world.object.position[:2] - goal[:2]) < 0.008 + CAREFUL
