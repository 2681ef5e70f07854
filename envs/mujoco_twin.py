"""The ground-truth twin: a WidowX 250s in MuJoCo behind Bridge's control and camera conventions.

`MujocoBridge` is one episode's physics and needs no Gymnasium; a `Stage` (compiled model and renderer) may serve many.
"""

import atexit
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from envs.mujoco_arm import (
    FINGER_OPEN,
    INITIAL_QPOS,
    NUM_JOINTS,
    POINTING_DOWN,
    ArmKinematics,
    BridgeController,
    finger_target,
    matrix_to_euler,
    openness,
)
from envs.mujoco_factors import Appearance, Factors, place_distractors
from envs.mujoco_gl import make_renderer, mujoco
from envs.mujoco_scene import DISTRACTORS, FREE_CAMERA, TIMESTEP, build_model, sensor_of
from tasks.camera import CAMERAS, THIRD_PERSON, WRIST, WRIST_CAMERA, Camera
from tasks.task import Pose, SceneObject, Task, TaskState
from wfm_core.data.actions import CONTROL_HZ

IMAGE_SIZE = 128
_SUBSTEPS = round(1 / CONTROL_HZ / TIMESTEP)
_INTERPOLATION = 5  # physics steps per interpolated joint target
_SETTLE_STEPS = 75  # 0.3 s
_GRASP_FORCE = 0.1  # N, normal force of each finger that counts as holding
_TOUCH_FORCE = 1e-4  # N


class Stage:
    """A compiled scene and its renderer; the episodes of one task share it (in one thread)."""

    def __init__(self, task: Task, factors: Factors | None = None) -> None:
        """Compile the task's scene; the renderer is made at the first `render`."""
        self.task = task
        self.factors = factors or Factors()
        self.objects = task.objects + (DISTRACTORS if self.factors.distractors else ())
        self.model = build_model(task.scene, self.objects)
        self.kinematics = ArmKinematics()
        model = self.model
        self.site = model.site("ee").id
        self.pads = (model.geom("left_pad").id, model.geom("right_pad").id)
        self.body_ids = [model.body(item.name).id for item in self.objects]
        owners = {body: index for index, body in enumerate(self.body_ids)}
        robot = {model.body(name).id for name in _robot_bodies(model)}
        self.geom_owner = [owners.get(body, -2 if body in robot else -1) for body in model.geom_bodyid]
        """Of each geom: the index of its object, -1 for the scenery, -2 for the robot."""
        self.object_geoms = [np.flatnonzero(np.array(self.geom_owner) == index) for index in range(len(self.objects))]
        self.appearance = Appearance(model)
        self._renderers: dict[int, mujoco.Renderer] = {}
        self._forget = weakref.finalize(self, _close_all, self._renderers)

    def renderer(self, size: int) -> mujoco.Renderer:
        """Return the renderer for square images of `size` pixels."""
        if size not in self._renderers:
            self._renderers[size] = make_renderer(self.model, size)
            # At interpreter exit what is registered last comes first; the first renderer registers the end of EGL,
            # after which nothing can be freed without tracebacks.
            atexit.register(self._forget)
        return self._renderers[size]

    def close(self) -> None:
        """Free the renderers. May be called twice."""
        _close_all(self._renderers)


class MujocoBridge:
    """One episode of a task in the twin."""

    def __init__(self, task: Task, factors: Factors | None = None, stage: Stage | None = None) -> None:
        """Prepare the scene.

        Args:
            task: what to do and with what.
            factors: factors of variation; those of `stage` when it is given.
            stage: a compiled scene to share with other episodes of the same task and factors (this object then
                leaves closing it to its owner).
        """
        self._owns_stage = stage is None
        self.stage = stage or Stage(task, factors)
        self.task = task
        self._model = self.stage.model
        self._data = mujoco.MjData(self._model)
        self._controller = BridgeController(self.stage.kinematics)
        self._initial_positions: dict[str, np.ndarray] = {}
        self._appearance: Appearance | None = None  # None: the stage's own, nothing to write before rendering

    def reset(self, initial_state: Mapping[str, Pose], rng: np.random.Generator) -> None:
        """Place the objects, let them settle for 0.3 s and draw the factors of variation.

        Raises:
            ValueError: `initial_state` does not name exactly the task's objects.
        """
        names = [item.name for item in self.task.objects]
        if sorted(initial_state) != sorted(names):
            raise ValueError(f"the initial state must place {sorted(names)}, got {sorted(initial_state)}")
        model, data = self._model, self._data
        mujoco.mj_resetData(model, data)
        data.qpos[:NUM_JOINTS] = INITIAL_QPOS
        data.qpos[NUM_JOINTS : NUM_JOINTS + 2] = FINGER_OPEN
        extra = place_distractors(self.task.scene, initial_state, rng) if self.stage.factors.distractors else {}
        for name, pose in ({**initial_state, **extra}).items():
            self._place(name, pose)
        self._vary(rng)
        self._controller.reset(INITIAL_QPOS)
        data.ctrl[:NUM_JOINTS] = INITIAL_QPOS
        data.ctrl[NUM_JOINTS:] = finger_target(1.0)
        mujoco.mj_step(model, data, nstep=_SETTLE_STEPS)
        data.time = 0.0
        mujoco.mj_forward(model, data)
        self._initial_positions = self._positions()

    def step(self, action: np.ndarray) -> bool:
        """Advance one control step (0.2 s).

        Args:
            action: (7,) float, metres, radians and openness (wfm_core/data/actions.py).

        Returns:
            Whether the arm followed (False: the target was out of reach and stays what it was).

        Raises:
            ValueError: the action has another shape or is not finite.
        """
        model, data, controller = self._model, self._data, self._controller
        start = controller.joints.copy()
        followed = controller.advance(action, data.site_xpos[self.stage.site])
        data.ctrl[NUM_JOINTS:] = finger_target(controller.gripper)
        segments = _SUBSTEPS // _INTERPOLATION
        for i in range(1, segments + 1):
            data.ctrl[:NUM_JOINTS] = start + (controller.joints - start) * (i / segments)
            mujoco.mj_step(model, data, nstep=_INTERPOLATION)
        mujoco.mj_forward(model, data)
        return followed

    def render(
        self, segmentation: bool = False, size: int = IMAGE_SIZE, camera: str | Camera = THIRD_PERSON
    ) -> np.ndarray:
        """Draw the scene, 4:3 squashed to a square.

        Args:
            segmentation: draw what is where instead of colours.
            size: pixels of a side.
            camera: `THIRD_PERSON`, Bridge's fixed one, `WRIST`, or one that stands anywhere.

        Returns:
            (size, size, 3) uint8 RGB; or with `segmentation` (size, size) int32: the index in the task's objects
            (then the distractors), -1 scenery, -2 robot. A fresh array each time.

        Raises:
            RuntimeError: no OpenGL.
        """
        renderer = self.stage.renderer(size)
        self._put_on_appearance()
        if isinstance(camera, Camera):
            self._place_free_camera(camera)
        if segmentation:
            renderer.enable_segmentation_rendering()
        renderer.update_scene(self._data, camera=FREE_CAMERA if isinstance(camera, Camera) else camera)
        image = renderer.render()
        if not segmentation:
            return np.ascontiguousarray(image)
        renderer.disable_segmentation_rendering()
        owners = np.array([*self.stage.geom_owner, -1], dtype=np.int32)
        return owners[np.where(image[..., 1] == mujoco.mjtObj.mjOBJ_GEOM, image[..., 0], -1)]

    def camera(self, name: str) -> Camera:
        """Return `THIRD_PERSON` or `WRIST` as it stands at this moment, in the robot-base frame."""
        self._put_on_appearance()
        _, up, back = self._data.camera(name).xmat.reshape(3, 3).T
        intrinsics = {THIRD_PERSON: CAMERAS[self.task.scene], WRIST: WRIST_CAMERA}[name]
        return replace(intrinsics, position=tuple(self._data.camera(name).xpos), forward=tuple(-back), up=tuple(up))

    def agent_pos(self) -> np.ndarray:
        """Return (7,) float32: measured end-effector x, y, z (m), roll, pitch, yaw (rad) and gripper openness."""
        rotation = self._data.site_xmat[self.stage.site].reshape(3, 3) @ POINTING_DOWN.T
        pose = [self._data.site_xpos[self.stage.site], matrix_to_euler(rotation), [self._gripper()]]
        return np.concatenate(pose).astype(np.float32)

    def task_state(self) -> TaskState:
        """Return the ground truth of this moment (copies)."""
        quats = {item.name: self._data.xquat[body].copy() for item, body in self._bodies()}
        grasped, contacts = self._touch()
        return TaskState(
            ee_pos=self._data.site_xpos[self.stage.site].copy(),
            gripper=self._gripper(),
            positions=self._positions(),
            quats=quats,
            initial_positions={name: position.copy() for name, position in self._initial_positions.items()},
            grasped=grasped,
            source_contacts=contacts,
        )

    def close(self) -> None:
        """Free the renderer (unless the stage is shared). May be called twice."""
        if self._owns_stage:
            self.stage.close()

    def _put_on_appearance(self) -> None:
        """Undo what another episode of the stage has done to cameras and lights since."""
        if self._appearance is not None:
            self._appearance.apply(self._model)
            mujoco.mj_camlight(self._model, self._data)

    def _place_free_camera(self, camera: Camera) -> None:
        right, down, forward = camera.rotation.T
        placed, index = self._data.camera(FREE_CAMERA), self._model.camera(FREE_CAMERA).id
        placed.xpos[:], placed.xmat[:] = camera.position, np.stack([right, -down, -forward], axis=1).ravel()
        sensor_size, focal_length = sensor_of(camera)
        self._model.cam_sensorsize[index], self._model.cam_intrinsic[index, :2] = sensor_size, focal_length

    def _vary(self, rng: np.random.Generator) -> None:
        stage = self.stage
        if stage.factors == Factors():
            return
        stage.appearance.apply(self._model)
        self._appearance = Appearance(self._model)
        self._appearance.vary(self._model, stage.factors, rng, stage.object_geoms)

    def _place(self, name: str, pose: Pose) -> None:
        quat = (np.cos(pose.yaw / 2), 0.0, 0.0, np.sin(pose.yaw / 2))
        body = self._model.body(name)
        mocap = body.mocapid[0]
        if mocap >= 0:
            self._data.mocap_pos[mocap] = (pose.x, pose.y, pose.z)
            self._data.mocap_quat[mocap] = quat
        else:
            start = self._model.jnt_qposadr[body.jntadr[0]]
            self._data.qpos[start : start + 7] = (pose.x, pose.y, pose.z, *quat)

    def _bodies(self) -> Iterator[tuple[SceneObject, int]]:
        return zip(self.task.objects, self.stage.body_ids, strict=False)  # distractors come after the task's objects

    def _positions(self) -> dict[str, np.ndarray]:
        return {item.name: self._data.xpos[body].copy() for item, body in self._bodies()}

    def _gripper(self) -> float:
        return openness(float(self._data.qpos[NUM_JOINTS : NUM_JOINTS + 2].mean()))

    def _touch(self) -> tuple[str | None, frozenset[str]]:
        """Return the object between both fingers, and what the source touches other than the robot."""
        data, stage = self._data, self.stage
        force = np.zeros(6)
        held: dict[int, set[int]] = {}
        touched: set[str] = set()
        for i, (geom1, geom2) in enumerate(data.contact.geom):
            owner1, owner2 = stage.geom_owner[geom1], stage.geom_owner[geom2]
            if owner1 < 0 and owner2 < 0:
                continue
            mujoco.mj_contactForce(self._model, data, i, force)
            for item, other, pad in ((owner1, owner2, geom2), (owner2, owner1, geom1)):
                if item < 0:
                    continue
                if pad in stage.pads and force[0] > _GRASP_FORCE:
                    held.setdefault(item, set()).add(int(pad))
                if stage.objects[item].name == self.task.source and other != -2 and force[0] > _TOUCH_FORCE:
                    touched.add("table" if other == -1 else stage.objects[other].name)
        grasped = next((stage.objects[item].name for item, pads in held.items() if len(pads) == 2), None)
        return grasped, frozenset(touched)


def _close_all(renderers: dict[int, mujoco.Renderer]) -> None:
    for renderer in renderers.values():
        renderer.close()
    renderers.clear()


def _robot_bodies(model: mujoco.MjModel) -> list[str]:
    base = model.body("base").id
    return [model.body(i).name for i in range(model.nbody) if model.body_rootid[i] == base]
