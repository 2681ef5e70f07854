"""Factors of variation of the twin: table, light, camera, object colours and distractors, drawn at reset."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from envs.mujoco_gl import mujoco
from envs.mujoco_scene import DISTRACTORS, TABLE_MATERIALS, key_light_pos
from tasks.camera import THIRD_PERSON
from tasks.put_eggplant_in_basket import SINK_SIZE
from tasks.task import Pose

_VARIED = ("geom_matid", "geom_rgba", "light_pos", "light_dir", "light_diffuse", "cam_pos", "cam_quat")
_DISTRACTOR_REGION = {  # low and high x, y and the height of the ground, m
    "table": ((0.16, -0.12), (0.43, 0.20), 0.0),
    "sink": ((0.45, -0.06), (0.50, 0.20), SINK_SIZE[2]),
}
_LIGHT_RANGE = ((0.05, -0.42), (0.40, -0.10))  # x and y of the direction; the shadow map shows speckles beyond
_DISTRACTOR_CLEARANCE = 0.10  # m, between centres


@dataclass(frozen=True)
class Factors:
    """Which factors vary; all are off by default.

    Attributes:
        table: the table's or counter's material and tint.
        light: direction, strength and warmth of the key light.
        camera: the fixed camera's position (1.5 cm) and direction (1.5 degrees).
        object_color: the objects' colours, near enough to the usual ones to be named alike.
        distractors: two more objects, clear of the task's.
    """

    table: bool = False
    light: bool = False
    camera: bool = False
    object_color: bool = False
    distractors: bool = False

    @classmethod
    def of(cls, names: Iterable[str]) -> "Factors":
        """Switch on the factors of these names.

        Raises:
            ValueError: there is no such factor; names the nearest.
        """
        known = [field.name for field in fields(cls)]
        chosen = list(names)
        for name in chosen:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"factors must be among {known}, got {name!r}; did you mean {nearest!r}?")
        return cls(**dict.fromkeys(chosen, True))


class Appearance:
    """The arrays of a model that rendering alone looks at; each episode has its own."""

    def __init__(self, model: mujoco.MjModel) -> None:
        """Copy the model's present appearance."""
        self.arrays = {name: getattr(model, name).copy() for name in _VARIED}

    def apply(self, model: mujoco.MjModel) -> None:
        """Write this appearance into the model it came from."""
        for name, values in self.arrays.items():
            getattr(model, name)[:] = values

    def vary(
        self, model: mujoco.MjModel, factors: Factors, rng: np.random.Generator, object_geoms: list[np.ndarray]
    ) -> None:
        """Draw the factors that are on.

        Args:
            model: the model this appearance belongs to.
            factors: which to draw.
            rng: source of randomness.
            object_geoms: of each object, the ids of its geoms.
        """
        arrays = self.arrays
        if factors.table:
            oak = model.mat(TABLE_MATERIALS[0]).id
            wooden = np.flatnonzero(model.geom_matid == oak)
            arrays["geom_matid"][wooden] = model.mat(TABLE_MATERIALS[rng.integers(len(TABLE_MATERIALS))]).id
            # A geom colour other than MuJoCo's default takes the place of its material's, which is white here.
            arrays["geom_rgba"][wooden, :3] = rng.uniform(0.82, 1.0, 3)
        if factors.light:
            key = model.light("key").id
            direction = np.array([*rng.uniform(*_LIGHT_RANGE), -1.0])
            arrays["light_pos"][key] = key_light_pos(direction)
            arrays["light_dir"][key] = direction / np.linalg.norm(direction)
            warmth = rng.uniform(-0.08, 0.08)
            arrays["light_diffuse"][key] *= rng.uniform(0.7, 1.25) * np.array([1 + warmth, 1.0, 1 - warmth])
        if factors.camera:
            camera = model.camera(THIRD_PERSON).id
            arrays["cam_pos"][camera] += rng.uniform(-0.015, 0.015, 3)
            quat, turned = np.zeros(4), np.zeros(4)
            mujoco.mju_euler2Quat(quat, np.deg2rad(rng.uniform(-1.5, 1.5, 3)), "xyz")
            mujoco.mju_mulQuat(turned, arrays["cam_quat"][camera], quat)
            arrays["cam_quat"][camera] = turned
        if factors.object_color:
            for geoms in object_geoms:
                gain, shift = rng.uniform(0.75, 1.1), rng.uniform(-0.10, 0.10, 3)
                arrays["geom_rgba"][geoms, :3] = np.clip(arrays["geom_rgba"][geoms, :3] * gain + shift, 0, 1)


def place_distractors(scene: str, taken: Mapping[str, Pose], rng: np.random.Generator) -> dict[str, Pose]:
    """Draw where the distractors stand: clear of the poses `taken`, or as clear as 50 tries get."""
    low, high, ground = _DISTRACTOR_REGION[scene]
    centres = [np.array([pose.x, pose.y]) for pose in taken.values()]
    poses = {}
    for item in DISTRACTORS:
        candidates = rng.uniform(low, high, (50, 2))
        gaps = np.linalg.norm(candidates[:, None] - np.array(centres), axis=-1).min(axis=1)
        clear = np.flatnonzero(gaps >= _DISTRACTOR_CLEARANCE)
        xy = candidates[clear[0] if clear.size else gaps.argmax()]
        centres.append(xy)
        poses[item.name] = Pose(float(xy[0]), float(xy[1]), ground + item.size[2] / 2, float(rng.uniform(-3.14, 3.14)))
    return poses
