"""Record a data set of robot episodes from the physics twin.

    worldsim-record out=runs/demos num_episodes=600
    worldsim-record out=runs/stack num_episodes=3000 'tasks=[stack_cubes]' 'behaviours={expert: 0.6, idle: 0.4}'
    worldsim-record out=runs/rolled num_episodes=600 'behaviours={bc_30_demos: 1, path/to/mine: 1}'
    worldsim-record out=runs/filmed num_episodes=400 'cameras=[third_person,wrist]' camera_motion=1

Writes the LeRobotDataset v3.0 layout to `out`: 128x128 video (lossless unless encoding=compact), observation.state,
action, reward terms, success, failure, the held object and object positions; per episode the instruction, initial state
and layout, seed, policy, behaviour and noise. With a wrist camera or a moving one, also observation.images.wrist, and
of each camera its pose (camera.<name>: right, down and forward axes and position in the robot-base frame) and focal
lengths (focal.<name>: fractions of the image's width and height). The episodes are the same whatever films them, since
whoever acts always sees the fixed camera. Interrupt it and start it again with the same settings: it goes on where
it stopped. A finished data set is left as it is.
"""

import atexit
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np

from policies.behaviours import BEHAVIOURS
from policies.load import load_policy, policy_path
from tasks import (
    REWARD_TERMS,
    SUCCESS_HOLD_STEPS,
    TASKS,
    Pose,
    TaskState,
    held,
    jitter_initial_state,
    sample_initial_state,
)
from tasks.camera import CAMERAS, THIRD_PERSON, WRIST, Camera
from tasks.camera_path import camera_path
from wfm_core.data.actions import ACTION_HIGH, ACTION_LOW, CONTROL_HZ, to_physical
from wfm_core.data.camera_rays import pack_pose
from wfm_core.data.episode import Episode
from wfm_core.data.lerobot_v3 import LeRobotV3Reader
from wfm_core.data.video import ENCODINGS
from worldsim.commands.entry import launch, register
from worldsim.protocols import Policy
from worldsim.recording import deciding, make_dataset

# A world model that has seen only success imagines only success: most behaviours are failures of one kind or another.
DEFAULT_BEHAVIOURS = {"expert": 0.4} | {name: 0.6 / (len(BEHAVIOURS) - 1) for name in BEHAVIOURS if name != "expert"}
CONVENTION, COMMAND_LAG = "commanded", 0
"""What the twin's actions are: commands, which move the arm within their own control step."""
FACTORS = ("table", "light", "camera", "object_color", "distractors")
MAX_OBJECTS = max(len(task.objects) for task in TASKS.values())


@dataclass
class RecordConfig:
    """What to record.

    Attributes:
        out: folder of the data set.
        tasks: task names, recorded in turn; empty means all.
        behaviours: name -> probability weight: names of `BEHAVIOURS`, or policies by shipped name or path, because a
            world model that has not seen a policy's near misses imagines hits. None means `DEFAULT_BEHAVIOURS`.
        num_episodes: number of episodes.
        seed: of the whole plan; episode k of a seed is always the same.
        noise: range from which an episode's noise dial is drawn (0: none; at 1 an expert mostly fails). A policy's
            actions are disturbed in the same way.
        random_layouts: fraction of episodes that start from a random layout, the others from one of the task's 24.
        jitter: standard deviation (m) by which the objects of the 24 layouts are moved.
        max_steps: longest episode, in steps; 0: the task's own horizon.
        settle_steps: steps recorded after success or failure, so that a model sees how things come to rest.
        still_steps: an episode ends early once nothing has moved for so many steps; 0 records on to the horizon.
        encoding: "lossless" (pixels read back bit for bit) or "compact" (yuv420p, plays everywhere).
        instruction: what episodes say they are to do, for behaviours that do something else; "": the task's own.
        cameras: third_person, whose frames come first, and wrist.
        camera_motion: how much the third-person camera moves about the workspace, at most 2; 0 is Bridge's fixed one, 1
            swings by up to 16 degrees to both sides.
        factors: factors of variation to draw at reset: table, light, camera, object_color, distractors.
        workers: processes; 0 records in this one. Does not change what is recorded.
    """

    out: str = "runs/demos"
    tasks: list[str] = field(default_factory=list)
    behaviours: Any = None  # dict[str, float]; hydra would merge a typed dict into its default, and refuse new keys
    num_episodes: int = 600
    seed: int = 0
    noise: list[float] = field(default_factory=lambda: [0.0, 0.5])
    random_layouts: float = 0.5
    jitter: float = 0.01
    max_steps: int = 0
    settle_steps: int = 5
    still_steps: int = 15
    encoding: str = "lossless"
    cameras: list[str] = field(default_factory=lambda: [THIRD_PERSON])
    camera_motion: float = 0.0
    factors: list[str] = field(default_factory=list)
    instruction: str = ""
    workers: int = 2

    def __post_init__(self) -> None:
        self.tasks = list(self.tasks) or list(TASKS)
        self.behaviours = self.behaviours or DEFAULT_BEHAVIOURS
        shares = self.behaviours.values() if isinstance(self.behaviours, Mapping) else [None]
        if not all(isinstance(share, int | float) for share in shares):
            raise ValueError(f"behaviours must be names with weights, as {{expert: 1, idle: 1}}, got {self.behaviours}")
        self.behaviours = dict(self.behaviours)
        for name in self.behaviours.keys() - BEHAVIOURS.keys():
            try:
                policy_path(name)
            except ValueError as error:
                raise ValueError(f"behaviours must be among {', '.join(BEHAVIOURS)} or policies: {error}") from error
        for kind, names, known in (
            ("tasks", self.tasks, TASKS),
            ("encoding", [self.encoding], ENCODINGS),
            ("cameras", self.cameras, (THIRD_PERSON, WRIST)),
            ("factors", self.factors, FACTORS),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{kind} must be among {', '.join(known)}, got {', '.join(unknown)}")
        weights = list(self.behaviours.values())
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"behaviours must have weights >= 0, some > 0, got {self.behaviours}")
        if len(self.noise) != 2 or not 0 <= self.noise[0] <= self.noise[1]:
            raise ValueError(f"noise must be a range [low, high] with 0 <= low <= high, got {self.noise}")
        if not 0 <= self.random_layouts <= 1:
            raise ValueError(f"random_layouts must be in [0, 1], got {self.random_layouts}")
        if THIRD_PERSON not in self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"cameras must name {THIRD_PERSON}, and none twice, got {self.cameras}")
        if not 0 <= self.camera_motion <= 2:
            raise ValueError(f"camera_motion must be in [0, 2], got {self.camera_motion}")
        for name in ("num_episodes", "max_steps", "settle_steps", "still_steps", "jitter", "workers"):
            if getattr(self, name) < (name == "num_episodes"):
                raise ValueError(f"{name} must be >= {int(name == 'num_episodes')}, got {getattr(self, name)}")


@dataclass(frozen=True)
class EpisodePlan:
    """Everything that decides an episode. `initial_state` is -1 for a random layout."""

    task: str
    behaviour: str
    noise: float
    initial_state: int
    layout: Mapping[str, Pose]
    seed: int


def plan_episode(config: RecordConfig, index: int) -> EpisodePlan:
    """Decide episode `index`: a pure function of both, so any process may record it, at any time."""
    rng = np.random.default_rng([config.seed, index])
    task = TASKS[config.tasks[index % len(config.tasks)]]
    weights = np.array(list(config.behaviours.values()))
    behaviour = list(config.behaviours)[rng.choice(len(weights), p=weights / weights.sum())]
    noise = float(rng.uniform(config.noise[0], config.noise[1]))
    if rng.random() < config.random_layouts:
        initial_state, layout = -1, sample_initial_state(task, rng)
    else:
        initial_state = int(rng.integers(len(task.initial_states)))
        layout = jitter_initial_state(task.initial_states[initial_state], rng, config.jitter)
    return EpisodePlan(task.name, behaviour, noise, initial_state, layout, seed=int(rng.integers(2**31)))


def record_episode(config: RecordConfig, index: int) -> Episode:
    """Run one episode in the twin, from its plan to its horizon, or until `settle_steps` after its outcome."""
    from envs.mujoco_twin import MujocoBridge

    plan = plan_episode(config, index)
    task = TASKS[plan.task]
    twin = MujocoBridge(task, stage=_stage(plan.task, tuple(config.factors)))
    twin.reset(plan.layout, np.random.default_rng(plan.seed))
    act = _actor(plan)

    actions, agent_pos, frames, labels = [], [], defaultdict(list), defaultdict(list)
    in_success, after_failure, still = 0, 0, 0
    last = config.max_steps or task.max_episode_steps
    path = _path(config, plan, last + 1)
    for step in range(last + 1):
        state, pose = twin.task_state(), twin.agent_pos()
        cameras = {name: path[step] if path and name == THIRD_PERSON else name for name in config.cameras}
        for name, camera in cameras.items():
            frames[name].append(twin.render(camera=camera))
        agent_pos.append(pose)
        success, failure = task.success(state), task.failure(state)
        told = _labels(plan.task, state, success, failure)
        if path or len(cameras) > 1:
            told |= _camera_labels(
                {name: c if isinstance(c, Camera) else twin.camera(c) for name, c in cameras.items()}
            )
        for name, value in told.items():
            labels[name].append(value)
        in_success = in_success + 1 if success else 0
        after_failure += failure or after_failure > 0
        still = still + 1 if step and _is_still(agent_pos, labels["object_positions"]) else 0
        settled = in_success >= SUCCESS_HOLD_STEPS + config.settle_steps or after_failure > config.settle_steps
        if settled or step == last or 0 < config.still_steps <= still:
            break
        actions.append(act(twin.render if path else lambda: frames[THIRD_PERSON][-1], state, pose))
        twin.step(actions[-1])

    solved = held(labels["success"])
    views = {name: np.stack(seen) for name, seen in frames.items()}
    return Episode(
        frames=views.pop(THIRD_PERSON),
        views=views,
        actions=np.stack(actions),
        agent_pos=np.stack(agent_pos),
        labels={name: np.stack(values) for name, values in labels.items()},
        instruction=config.instruction or task.instruction,
        episode_id=f"{config.seed}-{index:06d}",
        convention=CONVENTION,
        command_lag=COMMAND_LAG,
        meta={
            "task_name": plan.task,
            "policy": "scripted" if plan.behaviour in BEHAVIOURS else plan.behaviour,
            "behaviour": plan.behaviour,
            "noise": plan.noise,
            "seed": plan.seed,
            "initial_state": plan.initial_state,
            "layout": json.dumps({name: asdict(pose) for name, pose in plan.layout.items()}),
            "objects": ",".join(item.name for item in task.objects),
            "solved": solved,
        },
    )


def run(config: RecordConfig) -> None:
    """Record what is missing, assemble the data set and print where it is.

    Raises:
        ValueError: `out` holds something else than an earlier start of this very recording.
        OSError: the disk is full; what is recorded so far is kept, and the next start goes on from it.
    """
    out = Path(config.out)
    make_dataset(
        out,
        partial(record_episode, config),
        config.num_episodes,
        command="record",
        settings=deciding(config),
        defaults=asdict(RecordConfig()),
        encoding=config.encoding,
        workers=config.workers,
    )
    print(summary(out))


def summary(out: Path) -> str:
    """Say what a recorded data set holds and where it is."""
    reader = LeRobotV3Reader(out)
    metas = [reader.meta(k) for k in range(len(reader))]
    frames = sum(reader.length(k) for k in range(len(reader)))
    lines = [f"{len(reader)} episodes, {frames} frames in {out.resolve()}", f"{'solved':>24} {'episodes':>9}"]
    for key in ("task_name", "behaviour"):
        groups: dict[Any, list[bool]] = defaultdict(list)
        for meta in metas:
            groups[meta[key]].append(bool(meta["solved"]))
        lines += [f"{name:<18}{np.mean(solved):>6.0%} {len(solved):>9}" for name, solved in groups.items()]
    return "\n".join(lines)


def _path(config: RecordConfig, plan: EpisodePlan, num_frames: int) -> list[Camera]:
    """Where the third-person camera is at every frame; nothing if it stands still."""
    if config.camera_motion == 0:
        return []
    times, rng = np.arange(num_frames) / CONTROL_HZ, np.random.default_rng([plan.seed, 1])
    return camera_path(CAMERAS[TASKS[plan.task].scene], config.camera_motion, times, rng)


def _camera_labels(cameras: Mapping[str, Camera]) -> dict[str, np.ndarray]:
    poses = {f"camera.{name}": pack_pose(camera.rotation, camera.position) for name, camera in cameras.items()}
    return poses | {f"focal.{name}": camera.focal_uv.astype(np.float32) for name, camera in cameras.items()}


def _actor(plan: EpisodePlan) -> Callable[[Callable[[], np.ndarray], TaskState, np.ndarray], np.ndarray]:
    """Who acts: (draws what the fixed camera sees, state, agent_pos) -> physical action (7,)."""
    from policies.scripted import Disturbance, ScriptedExpert

    task = TASKS[plan.task]
    if plan.behaviour in BEHAVIOURS:
        expert = ScriptedExpert(task, plan.behaviour, plan.noise, plan.seed)
        return lambda see, state, pose: expert.act(state, pose)
    policy = _policy(plan.behaviour)
    policy.reset(1, instruction=task.instruction, seeds=[plan.seed])
    disturb = Disturbance(plan.noise, np.random.default_rng(plan.seed))

    def act(see: Callable[[], np.ndarray], state: TaskState, pose: np.ndarray) -> np.ndarray:
        chosen = policy.act({"pixels": see()[None], "agent_pos": pose[None]})[0]
        return np.clip(disturb(to_physical(np.clip(chosen, -1, 1))), ACTION_LOW, ACTION_HIGH)

    return act


@lru_cache
def _policy(name_or_path: str) -> Policy:
    return load_policy(name_or_path)


@lru_cache(maxsize=len(TASKS))
def _stage(task_name: str, factors: tuple[str, ...]):
    from envs.mujoco_factors import Factors
    from envs.mujoco_twin import IMAGE_SIZE, Stage

    stage = Stage(TASKS[task_name], Factors.of(factors))
    stage.renderer(IMAGE_SIZE)  # loads OpenGL, which registers its own end
    atexit.register(stage.close)  # registered later, so called earlier
    return stage


def _labels(task_name: str, state: TaskState, success: bool, failure: bool) -> dict[str, Any]:
    task = TASKS[task_name]
    terms = task.reward_terms(state)
    names = [item.name for item in task.objects]
    positions = np.zeros((MAX_OBJECTS, 3), dtype=np.float32)
    positions[: len(names)] = [state.positions[name] for name in names]
    return {
        **{f"reward.{name}": np.float32(terms[name]) for name in REWARD_TERMS},
        "success": np.bool_(success),
        "failure": np.bool_(failure),
        "grasped": np.int64(names.index(state.grasped) if state.grasped in names else -1),
        "object_positions": positions.reshape(-1),
    }


def _is_still(agent_pos: list[np.ndarray], object_positions: list[np.ndarray]) -> bool:
    """Tell whether neither robot (1 mm, 1 mrad, 0.1% openness) nor any object (0.2 mm) has moved in the last step."""
    moved, pushed = np.abs(agent_pos[-1] - agent_pos[-2]), np.abs(object_positions[-1] - object_positions[-2])
    return bool(moved.max() < 1e-3 and pushed.max() < 2e-4)


register("record", RecordConfig, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="record")
def main(config: Any) -> None:
    """Run the console script."""
    launch("record", config, RecordConfig, run)


if __name__ == "__main__":
    main()
