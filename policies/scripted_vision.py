"""The scripted expert on observations alone: it finds things by colour, so it runs in the imagined env too."""

import math
from collections.abc import Sequence

import numpy as np

from policies.behaviours import Actor
from policies.scripted import GoalFollower
from policies.skills import FINGER_REACH, Thing
from tasks import TASKS
from tasks.camera import CAMERAS
from tasks.task import SceneObject, Task
from wfm_core.data.actions import to_normalised
from worldsim.protocols import Obs

HUE_TOLERANCE = 0.055  # of the colour circle
LEAST_SATURATION, LEAST_VALUE = 0.55, 0.12
LEAST_PIXELS = 4
IN_VIEW = 0.7  # of the first frame's pixels: with fewer, something hides the object
HELD_OPENNESS = (0.23, 0.85)  # of closed fingers with something between them; empty they close to 0.17
UNSEEN_MARKER_HEIGHT = 0.10  # m


def color_mask(pixels: np.ndarray, color: tuple[float, float, float]) -> np.ndarray:
    """Return the (H, W) bool mask of saturated pixels of (H, W, 3) uint8 with the hue of `color` (RGB in [0, 1])."""
    image = pixels.astype(np.float32) / 255
    high, low = image.max(axis=-1), image.min(axis=-1)
    difference = (_hue(image) - _hue(np.asarray(color, dtype=np.float32)) + 0.5) % 1.0 - 0.5
    vivid = (high - low > LEAST_SATURATION * high) & (high > LEAST_VALUE)
    return vivid & (np.abs(difference) < HUE_TOLERANCE)


def _hue(rgb: np.ndarray) -> np.ndarray:
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return (np.arctan2(math.sqrt(3) * (g - b), 2 * r - g - b) / (2 * math.pi)) % 1.0


def locate(mask: np.ndarray, item: SceneObject, scene: str) -> Thing | None:
    """Estimate where an object on the table is from the (H, W) bool mask of its pixels; None if it is not seen.

    A floating marker is found by its stalk: the lowest pixel shows the point of the table below it.
    """
    rows, columns = np.nonzero(mask)
    if len(rows) < LEAST_PIXELS:
        return None
    camera = CAMERAS[scene]
    uv = np.stack([(columns + 0.5) / mask.shape[1], (rows + 0.5) / mask.shape[0]], axis=-1)  # (N, 2)
    if item.name == "marker":
        return Thing(_marker(mask, uv, scene), 0.0, item.size)
    points = camera.unproject(uv, item.size[2] / 2)[:, :2]
    centre = np.median(points, axis=0) if len(points) < 8 else points.mean(axis=0)
    yaw = 0.0
    if max(item.size[:2]) > 1.5 * min(item.size[:2]) and not item.fixed:
        _, axes = np.linalg.eigh(np.cov(points.T))
        yaw = math.atan2(axes[1, -1], axes[0, -1])
    return Thing(np.array([*centre, item.size[2] / 2]), yaw, item.size)


def _marker(mask: np.ndarray, uv: np.ndarray, scene: str) -> np.ndarray:
    camera = CAMERAS[scene]
    wide = mask[:, :-2] & mask[:, 1:-1] & mask[:, 2:]  # three in a row: the ball, not the stalk
    rows, columns = np.nonzero(wide)
    if len(rows) == 0:
        return camera.unproject(uv.mean(axis=0), UNSEEN_MARKER_HEIGHT)
    ball = np.array([(columns.mean() + 1.5) / mask.shape[1], (rows.mean() + 0.5) / mask.shape[0]])
    foot = uv[uv[:, 1].argmax()]
    if (foot[1] - ball[1]) * mask.shape[0] < 8:
        return camera.unproject(ball, UNSEEN_MARKER_HEIGHT)
    below = camera.unproject(foot, 0.0)[:2]
    heights = np.linspace(0.0, 0.25, 251)
    along = camera.unproject(np.broadcast_to(ball, (len(heights), 2)), heights)
    return along[np.linalg.norm(along[:, :2] - below, axis=1).argmin()]


class PixelScene:
    """What skills see, estimated from pixels and proprioception."""

    def __init__(self, task: Task) -> None:
        """Know the objects' sizes and colours."""
        self._task = task
        self._seen: dict[str, Thing] = {}
        self._full_view: dict[str, int] = {}
        self.agent_pos = np.zeros(7)
        self.blur: dict[str, np.ndarray] = {}

    def look(self, pixels: np.ndarray, agent_pos: np.ndarray) -> None:
        """Take in the present moment: (H, W, 3) uint8 and (7,)."""
        moved = np.asarray(agent_pos, dtype=np.float64)[:3] - self.agent_pos[:3]
        self.agent_pos = np.asarray(agent_pos, dtype=np.float64)
        for item in self._task.objects:
            first = item.name not in self._seen
            if not first and item.fixed:
                continue
            mask = color_mask(pixels, item.color)
            count = int(mask.sum())
            if first:
                self._full_view[item.name] = count
            hidden = count < IN_VIEW * self._full_view[item.name]
            found = None if hidden and not first else locate(mask, item, self._task.scene)
            if item.name == self._task.source and not first and self.holding(item.name):
                self._seen[item.name] = self._between_fingers(item)
            elif found is not None:
                self._seen[item.name] = found
            elif first:
                self._seen[item.name] = self._expected(item)
            else:
                self._seen[item.name] = self._pushed(self._seen[item.name], moved)

    def thing(self, name: str) -> Thing:
        """Return the object where it was last seen or felt."""
        seen = self._seen[name]
        return Thing(seen.position + self.blur.get(name, 0.0), seen.yaw, seen.size)

    def holding(self, name: str) -> bool:
        """Tell whether something keeps the fingers from closing or opening fully (taken to be the source)."""
        low, high = HELD_OPENNESS
        return name == self._task.source and low < self.agent_pos[6] < high

    def solved(self) -> bool:
        """Tell whether the source seems to be well over the target."""
        if self._task.source is None:
            return False
        source, target = self._seen[self._task.source], self._seen[self._task.target]
        near = 0.5 * float(np.linalg.norm(target.size[:2]) / 2)
        return float(np.linalg.norm((source.position - target.position)[:2])) < near

    def _expected(self, item: SceneObject) -> Thing:
        poses = [state[item.name] for state in self._task.initial_states]
        return Thing(np.mean([(pose.x, pose.y, pose.z) for pose in poses], axis=0), 0.0, item.size)

    def _between_fingers(self, item: SceneObject) -> Thing:
        return Thing(self.agent_pos[:3].copy(), self._seen[item.name].yaw, item.size)

    def _pushed(self, thing: Thing, moved: np.ndarray) -> Thing:
        """Move a hidden object along with the fingers that are about to touch it."""
        gap = float(np.linalg.norm(thing.position[:2] - self.agent_pos[:2]))
        touching = gap < max(thing.size[:2]) / 2 + FINGER_REACH + 0.01 and self.agent_pos[2] < thing.size[2] + 0.01
        shift = np.array([*moved[:2], 0.0]) if touching else np.zeros(3)
        return Thing(thing.position + shift, thing.yaw, thing.size)


class VisionScriptedPolicy:
    """Solve any of the tasks from pixels and proprioception by the experts' waypoints (`worldsim.protocols.Policy`)."""

    def __init__(self, noise: float = 0.0) -> None:
        """Set the dial: noise 0 is as good as the policy gets, at 1 it mostly fails.

        Raises:
            ValueError: negative noise.
        """
        if not noise >= 0:
            raise ValueError(f"noise must be >= 0, got {noise}")
        self.noise = noise
        self._task: Task | None = None
        self._seeds: list[int] = []
        self._rows: list[tuple[PixelScene, GoalFollower] | None] = []

    def reset(self, num_envs: int, *, instruction: str, seeds: Sequence[int], mask: np.ndarray | None = None) -> None:
        """Begin episodes; see `worldsim.protocols.Policy.reset`.

        Raises:
            ValueError: no task has this instruction, or a wrong number of seeds or mask entries.
        """
        if len(seeds) != num_envs:
            raise ValueError(f"reset needs one seed a row ({num_envs}), got {len(seeds)}")
        task = next((task for task in TASKS.values() if task.instruction == instruction), None)
        if task is None:
            known = sorted(task.instruction for task in TASKS.values())
            raise ValueError(f"instruction must be one of {known}, got {instruction!r}")
        if mask is None:
            mask, self._rows, self._seeds = np.ones(num_envs, bool), [None] * num_envs, [0] * num_envs
        mask = np.asarray(mask, bool)
        if mask.shape != (num_envs,) or len(self._rows) != num_envs:
            raise ValueError(
                f"mask must have shape ({num_envs},) and num_envs stay {len(self._rows)}, got {mask.shape}"
            )
        self._task = task
        for row in np.flatnonzero(mask):
            self._rows[row], self._seeds[row] = None, int(seeds[row])

    def act(self, obs: Obs) -> np.ndarray:
        """Return (B, 7) float32 actions in [-1, 1].

        Raises:
            ValueError: before the first `reset`, or when the observations do not have one row an env.
        """
        if self._task is None:
            raise ValueError("reset must be called before act")
        if len(obs["agent_pos"]) != len(self._rows):
            raise ValueError(f"obs must have {len(self._rows)} rows (num_envs of reset), got {len(obs['agent_pos'])}")
        actions = [self._act_row(row, obs["pixels"][row], obs["agent_pos"][row]) for row in range(len(self._rows))]
        return np.clip(to_normalised(np.stack(actions)), -1, 1)

    def _act_row(self, row: int, pixels: np.ndarray, agent_pos: np.ndarray) -> np.ndarray:
        running = self._rows[row]
        if running is None:
            assert self._task is not None
            scene = PixelScene(self._task)
            scene.look(pixels, agent_pos)
            actor = Actor(self._task, scene, np.random.default_rng(self._seeds[row]), self.noise)
            running = self._rows[row] = (scene, GoalFollower("expert", actor))
        else:
            running[0].look(pixels, agent_pos)
        return running[1].act()
