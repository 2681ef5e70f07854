"""What a scripted actor does in an episode: solve the task, fail in a given way, wander or play.

A world model that has seen only success imagines only success, so most behaviours fail on purpose. Each is a generator
of gripper goals (see `policies.skills`) over an `Actor`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from policies.skills import (
    CAREFUL,
    CLOSING_STEPS,
    CRUISE,
    LOWEST_GRIP,
    TRAVEL_HEIGHT,
    Goal,
    Scene,
    Skill,
    carry,
    go_to,
    grasp,
    grip_yaw,
    push,
    release,
    rise,
    stay,
)
from tasks.layout import RANDOM_REGION
from tasks.task import SceneObject, Task

WIDEST_GRIP = 0.045  # m, of an object that fits between the open fingers
PLACE_GAP = 0.004  # m, between a carried object and what it is put on, at release
SINK_GAP = 0.012  # m, the same over the rim of the basket
SHORT_OF = 0.095  # m, from the target's centre, at which an early drop happens at the latest
CLEAR_HEIGHT = 0.08  # m, at which the gripper passes over everything
FOREVER = 10**6


class ActorScene(Scene, Protocol):
    """A scene that can also tell whether the task is solved, and whose positions can be blurred."""

    blur: dict[str, np.ndarray]
    """Object name -> (3,) error, m, added to the object's position."""

    def solved(self) -> bool:
        """Tell whether the task is solved at this moment (to the scene's knowledge)."""
        ...


@dataclass
class Actor:
    """Who acts: the task, what is seen, the episode's randomness and the noise dial."""

    task: Task
    scene: ActorScene
    rng: np.random.Generator
    noise: float = 0.0
    objects: dict[str, SceneObject] = field(init=False)

    def __post_init__(self) -> None:
        self.objects = {item.name: item for item in self.task.objects}
        self.blur()

    def blur(self) -> None:
        """Draw new errors of what is believed about positions (none at noise 0)."""
        for name, item in self.objects.items() if self.noise > 0 else ():
            error = self.rng.normal(0, 0.028 * self.noise**1.5, 3)
            self.scene.blur[name] = (
                error if item.ghost else error * (1, 1, 0)
            )  # what lies on the table has a known height

    def loose(self, widest: float = math.inf) -> list[str]:
        """Return the names of the objects that can be moved and are at most `widest` (m) across."""
        return [n for n, i in self.objects.items() if not (i.fixed or i.ghost) and min(i.size[:2]) <= widest]

    def random_place(self, name: str | None = None) -> np.ndarray:
        """Draw a point (3,), m, in the workspace: where object `name` would rest, without a name up to 18 cm high."""
        xy = self.rng.uniform(*RANDOM_REGION[self.task.scene])
        z = self.rng.uniform(LOWEST_GRIP, 0.18) if name is None else self.objects[name].size[2] / 2 + PLACE_GAP
        return np.array([*xy, z])

    def random_offset(self, low: float, high: float) -> np.ndarray:
        """Draw a horizontal displacement (3,) with a length in [low, high], m."""
        angle, length = self.rng.uniform(-math.pi, math.pi), self.rng.uniform(low, high)
        return np.array([length * math.cos(angle), length * math.sin(angle), 0.0])

    def wrong_place(self, name: str) -> np.ndarray:
        """Draw where object `name` could rest at least 12 cm from the target, or from where it is now."""
        from_here = self.scene.thing(self.task.target).position
        for _ in range(50):
            place = self.random_place(name)
            if np.linalg.norm((place - from_here)[:2]) > 0.12:
                break
        return place

    def on_target(self, source: str, target: str) -> np.ndarray:
        """Return where the source's centre shall be, (3,) m, when it is let go on the target."""
        below = self.scene.thing(target)
        height = (self.objects[source].size[2] + self.objects[target].size[2]) / 2
        return below.position + np.array([0.0, 0.0, height + (SINK_GAP if self.task.scene == "sink" else PLACE_GAP)])

    def yaw_on(self, target: str) -> Callable[[], float] | None:
        """Return what the yaw on the target must be, where the source fits only aligned."""
        fits_any_way = self.task.scene == "table" and max(self.objects[target].size[:2]) > 0.05
        return None if fits_any_way else lambda: self.scene.thing(target).yaw


def expert(actor: Actor) -> Skill:
    """Solve the task, and try again after a failure."""
    task, scene = actor.task, actor.scene
    if task.source is None:
        return (yield from hold_at(actor, lambda: scene.thing(task.target).position))
    if actor.objects[task.target].ghost:
        while (
            not (yield from push(scene, task.source, lambda: scene.thing(task.target).position)) or not scene.solved()
        ):
            yield from rise(scene, CLEAR_HEIGHT, 0.0)
            yield from stay(scene, 0.0, 1)
            actor.blur()
        return True
    while not scene.solved():
        yield from put(actor, task.source, task.target)
        actor.blur()
    return True


def put(actor: Actor, source: str, target: str) -> Skill:
    """Put the source on the target; give up where the source is not held."""
    scene = actor.scene

    def lost() -> bool:
        return not scene.holding(source)

    yield from grasp(scene, source)
    place = lambda: actor.on_target(source, target)  # noqa: E731
    if not lost() and (yield from carry(scene, source, place, yaw=actor.yaw_on(target), unless=lost)):
        return (yield from release(scene))
    yield from rise(scene, CLEAR_HEIGHT + 0.03, 1.0)
    return False


def hold_at(actor: Actor, point: Callable[[], np.ndarray], steps: int = FOREVER) -> Skill:
    """Keep the end effector at a point (3,), m."""
    yaw = float(actor.scene.agent_pos[5])
    for _ in range(steps):
        yield Goal(point(), yaw, 1.0)
    return True


def miss_grasp(actor: Actor) -> Skill:
    """Grip (or push, or reach) beside the object, then carry on as if all were well."""
    task, scene = actor.task, actor.scene
    source, offset = task.source, actor.random_offset(0.035, 0.07)
    if source is None:
        return (yield from hold_at(actor, lambda: scene.thing(task.target).position + offset))
    if actor.objects[task.target].ghost:
        start = scene.thing(source).position
        way = scene.thing(task.target).position - start
        side = np.array([-way[1], way[0], 0.0]) / np.linalg.norm(way) * actor.rng.choice([-1, 1])
        offset = side * actor.rng.uniform(0.055, 0.08)
        yield from _sweep(actor, start + offset - 0.4 * way, start + offset + 1.1 * way)
    else:
        yield from grasp(scene, source, _beside(actor, source))
        yield from carry(scene, source, lambda: actor.on_target(source, task.target))
        yield from release(scene)
    return (yield from wait(actor))


def _beside(actor: Actor, name: str) -> np.ndarray:
    """Draw a grip offset (3,), m, with which the fingers close on nothing: across the object's long side, or above."""
    thing, rng = actor.scene.thing(name), actor.rng
    if rng.random() < 0.25:
        return np.array([0.0, 0.0, thing.size[2] / 2 + rng.uniform(0.018, 0.04)])
    across = thing.yaw + (math.pi / 2 if thing.size[0] >= thing.size[1] else 0.0)
    length = rng.choice([-1, 1]) * (min(thing.size[:2]) / 2 + rng.uniform(0.03, 0.055))
    return np.array([length * math.cos(across), length * math.sin(across), 0.0])


def drop_early(actor: Actor) -> Skill:
    """Let go on the way (or stop pushing or reaching half-way), go on empty-handed and stay there."""
    task, scene, rng = actor.task, actor.scene, actor.rng
    source, part = task.source, rng.uniform(0.1, 0.75)
    if source is None:
        way = scene.thing(task.target).position - scene.agent_pos[:3]
        part = min(part, 1 - 0.05 / float(np.linalg.norm(way)))
        return (yield from hold_at(actor, lambda point=scene.agent_pos[:3] + part * way: point))
    start = scene.thing(source).position
    end = scene.thing(task.target).position
    way = end - start
    stop = start + min(part, 1 - SHORT_OF / float(np.linalg.norm(way[:2]))) * way
    if actor.objects[task.target].ghost:
        yield from push(scene, source, lambda: stop)
        yield from rise(scene, CLEAR_HEIGHT, 0.0)
        return (yield from wait(actor))
    yield from grasp(scene, source)
    over = stop + np.array([0.0, 0.0, rng.uniform(0.01, 0.09)])
    yield from carry(scene, source, lambda: over)
    yield from release(scene)
    if rng.random() < 0.5:
        above = end + np.array([0.0, 0.0, 0.08])
        yield from go_to(scene, lambda: Goal(above, float(scene.agent_pos[5]), 0.0))
        yield from release(scene)
    return (yield from wait(actor))


def wrong_object(actor: Actor) -> Skill:
    """Put the target on the source where that can be, else the source where it does not belong."""
    task, scene = actor.task, actor.scene
    if task.source is None:
        place = actor.wrong_place(task.target) + np.array([0.0, 0.0, actor.rng.uniform(0.0, 0.12)])
        return (yield from hold_at(actor, lambda: place))
    place = actor.wrong_place(task.source)
    if actor.objects[task.target].ghost:
        for _ in range(3):
            if (yield from push(scene, task.source, lambda: place)):
                break
            yield from rise(scene, CLEAR_HEIGHT, 0.0)
    elif task.target in actor.loose(WIDEST_GRIP) and actor.rng.random() < 0.7:
        yield from put(actor, task.target, task.source)
    else:
        yield from grasp(scene, task.source)
        yield from carry(scene, task.source, lambda: place)
        yield from release(scene)
    return (yield from wait(actor))


def idle(actor: Actor) -> Skill:
    """Do nothing, with the gripper open or closed."""
    return (yield from stay(actor.scene, float(actor.rng.random() < 0.7), FOREVER))


def random_walk(actor: Actor) -> Skill:
    """Wander smoothly, mostly low and near the objects, opening and closing the gripper now and then."""
    scene, rng = actor.scene, actor.rng
    gripper = 1.0
    while True:
        place = actor.random_place()
        if rng.random() < 0.6:
            near = scene.thing(str(rng.choice(list(actor.objects)))).position
            place = near + actor.random_offset(0.0, 0.05) + np.array([0.0, 0.0, rng.exponential(0.03)])
            place[2] = max(place[2], LOWEST_GRIP)
        yaw, speed = rng.uniform(-1.2, 1.2), rng.uniform(0.01, CRUISE)
        gripper = float(rng.random()) if rng.random() < 0.15 else gripper
        for _ in range(int(rng.integers(3, 12))):
            if rng.random() < 0.08:
                gripper = 1.0 - round(gripper)
            yield Goal(place, yaw, gripper, speed)


def play(actor: Actor) -> Skill:
    """Do one thing after the other: pick up and move, stack, drop, push, poke, sweep, wander."""
    scene, rng = actor.scene, actor.rng
    while True:
        kinds, weights = ["wander"], [1.0]
        if actor.loose():
            kinds, weights = [*kinds, "push", "poke"], [*weights, 1.5, 0.5]
        if actor.loose(WIDEST_GRIP):
            kinds, weights = [*kinds, "move", "drop", "on"], [*weights, 3.0, 1.5, 1.5]
        kind = rng.choice(kinds, p=np.array(weights) / sum(weights))
        if kind == "wander":
            goal = Goal(
                actor.random_place(), rng.uniform(-1.2, 1.2), float(rng.random() < 0.5), rng.uniform(0.015, CRUISE)
            )
            yield from go_to(scene, lambda goal=goal: goal)
        elif kind in ("push", "poke"):
            name = str(rng.choice(actor.loose()))
            start = scene.thing(name).position
            way = actor.random_offset(0.05, 0.15)
            if kind == "push":
                yield from push(scene, name, lambda end=start + way: end, max_steps=15)
            else:
                yield from _sweep(actor, start - 0.8 * way, start + way)
            yield from rise(scene, CLEAR_HEIGHT, 0.0)
        else:
            yield from _move_about(actor, str(rng.choice(actor.loose(WIDEST_GRIP))), str(kind))


def _move_about(actor: Actor, name: str, kind: str) -> Skill:
    scene, rng = actor.scene, actor.rng
    others = [other for other in actor.objects if other != name and not actor.objects[other].ghost]
    place = actor.random_place(name)
    if kind == "on" and others:
        place = actor.on_target(name, str(rng.choice(others))) + actor.random_offset(0.0, 0.03)
    elif kind == "drop":
        place[2] += rng.uniform(0.01, 0.1)
    turn = rng.uniform(-0.8, 0.8)
    yield from grasp(scene, name, actor.random_offset(0.0, 0.012))
    yaw = scene.thing(name).yaw + turn
    yield from carry(scene, name, lambda: place, yaw=(lambda: yaw) if rng.random() < 0.5 else None)
    if kind != "move" or rng.random() < 0.7:
        yield from release(scene)
    return True


def fumble(actor: Actor) -> Skill:
    """Grasp again and again, each time somewhat beside, above, askew or too early, and lift what comes of it.

    What makes the difference between a grasp and a miss is seen from both sides, several times in an episode. Where
    nothing is to be grasped the gripper stays a while here and there around the target.
    """
    scene, rng = actor.scene, actor.rng
    while True:
        names = actor.loose(WIDEST_GRIP)
        beside = rng.normal(0, 0.018, 3) * (1, 1, 0.6)
        if not names:
            yield from hold_at(actor, lambda beside=2 * beside: scene.thing(actor.task.target).position + beside, 6)
            continue
        name = actor.task.source if actor.task.source in names and rng.random() < 0.7 else str(rng.choice(names))
        grip = scene.thing(name).position + beside
        grip[2] = max(grip[2], LOWEST_GRIP)
        yaw = grip_yaw(scene.thing(name), float(scene.agent_pos[5])) + rng.normal(0, 0.3)
        above = Goal(grip + (0, 0, rng.uniform(0.02, TRAVEL_HEIGHT)), yaw, 1.0)
        yield from go_to(scene, lambda above=above: above, tolerance=0.015)
        at = Goal(grip, yaw, 1.0, rng.uniform(CAREFUL, CRUISE))
        yield from go_to(scene, lambda at=at: at, max_steps=10 if rng.random() < 0.7 else int(rng.integers(1, 4)))
        yield from stay(scene, 0.0, int(rng.integers(2, CLOSING_STEPS + 2)))
        yield from rise(scene, float(scene.agent_pos[2]) + rng.uniform(0.02, 0.08), 0.0)
        if rng.random() < 0.3:
            aside = Goal(scene.agent_pos[:3] + actor.random_offset(0.03, 0.1), yaw, 0.0)
            yield from go_to(scene, lambda aside=aside: aside, max_steps=5)
        yield from stay(scene, 1.0, 2)


def _sweep(actor: Actor, start: np.ndarray, end: np.ndarray) -> Skill:
    """Draw the closed fingers along the table from start to end, (3,) m each."""
    scene = actor.scene
    yaw = math.atan2(end[1] - start[1], end[0] - start[0])
    yaw = (yaw + math.pi / 2) % math.pi - math.pi / 2
    low_start, low_end = (np.array([*point[:2], 0.02]) for point in (start, end))
    above = low_start + np.array([0.0, 0.0, 0.06])
    for point, speed in ((above, CRUISE), (low_start, CRUISE), (low_end, 0.6 * CRUISE)):
        goal = Goal(point, yaw, 0.0, speed)
        yield from go_to(scene, lambda goal=goal: goal, tolerance=0.012, max_steps=15)
    return True


def wait(actor: Actor) -> Skill:
    """Stay where the gripper is until the episode ends."""
    return (yield from stay(actor.scene, float(actor.scene.agent_pos[6] > 0.8), FOREVER))


BEHAVIOURS: dict[str, Callable[[Actor], Skill]] = {
    "expert": expert,
    "miss_grasp": miss_grasp,
    "drop_early": drop_early,
    "wrong_object": wrong_object,
    "idle": idle,
    "random_walk": random_walk,
    "play": play,
    "fumble": fumble,
}
"""Every behaviour by name."""
