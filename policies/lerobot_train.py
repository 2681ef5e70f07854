"""Train LeRobot's ACT and Diffusion with LeRobot's own trainer on our demonstrations, seen through a frozen encoder.

Their ResNet alone has 11 M parameters and costs ten times as much per step as the policies they are compared with. Here
they read the feature "observation.environment_state" instead: what a frozen encoder says of the frame. The encoder is
stored in the policy's folder or named there, so that `policies.lerobot_policy` feeds it when the policy acts.
"""

import abc
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from safetensors.torch import load_file, save_file

from policies.actor import ActorConfig, instruction_id
from policies.demonstrations import Demonstrations, load_demonstrations
from policies.frame_encoder import FrameEncoder, load_frame_encoder
from policies.load import load_policy, policy_path
from policies.train import check_same_run, shifted
from wfm_core.data.actions import ACTION_NAMES, AGENT_POS_NAMES, CONTROL_HZ, to_physical
from wfm_core.data.files import write_atomic

log = logging.getLogger(__name__)

MIN_STATE_STD = 0.05
"""Floor (m, rad) on the standard deviations that normalise the state: some entries hardly vary in demonstrations."""


@dataclass
class LeRobotTrainConfig(abc.ABC):
    """One run of LeRobot's trainer; subclasses say which policy.

    Attributes:
        encoder: a behaviour-cloning policy (name or path) whose keypoints are the environment state.
        world_model: or a world model (name or path) whose tokenizer's latents are; empty for the keypoints.
        num_demos: demonstrations per task, 0 for all; see `policies.demonstrations.Demonstrations.split`.
        num_held_out: further demonstrations per task kept for the reported errors.
        behaviours: which behaviours of the cache count as demonstrations.
        num_views: how often each demonstration is in the data set: once as it is, then with frames shifted by up to two
            pixels and with noise of `agent_pos_noise` (m, rad) on the state.
        chunk_len, num_executed: actions predicted, and executed before predicting again.
    """

    type: ClassVar[str]
    """LeRobot's name of the policy."""

    encoder: str = ""
    world_model: str = ""
    num_demos: int = 0
    num_held_out: int = 4
    behaviours: list[str] = field(default_factory=lambda: ["expert"])
    num_views: int = 3
    agent_pos_noise: float = 0.01
    num_steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 3e-4
    seed: int = 0
    chunk_len: int = 8
    num_executed: int = 3

    @abc.abstractmethod
    def policy_arguments(self) -> dict[str, object]:
        """Settings of the policy, as `lerobot-train` names them."""


@dataclass
class ACTTrainConfig(LeRobotTrainConfig):
    """One ACT run.

    Attributes:
        dim_model, num_layers: size of the transformer.
    """

    type = "act"
    dim_model: int = 128
    num_layers: int = 3

    def policy_arguments(self) -> dict[str, object]:
        """Settings of the policy, as `lerobot-train` names them."""
        return {
            "chunk_size": self.chunk_len,
            "dim_model": self.dim_model,
            "n_heads": 4,
            "dim_feedforward": 4 * self.dim_model,
            "n_encoder_layers": self.num_layers,
            "use_vae": "false",  # scripted experts have one way of doing things
        }


@dataclass
class DiffusionTrainConfig(LeRobotTrainConfig):
    """One run of Diffusion Policy, which sees one frame and draws its actions.

    Attributes:
        down_dims: channels of the U-Net's levels, each of which halves the chunk's length.
        num_inference_steps: of denoising, by DDIM.

    Raises:
        ValueError: a chunk that cannot be halved as often.
    """

    type = "diffusion"
    down_dims: list[int] = field(default_factory=lambda: [128, 256])
    num_inference_steps: int = 8

    def __post_init__(self) -> None:
        if self.chunk_len % (shortest := 2 ** len(self.down_dims)):
            raise ValueError(f"chunk_len must be a multiple of {shortest} for {self.down_dims}, got {self.chunk_len}")

    def policy_arguments(self) -> dict[str, object]:
        """Settings of the policy, as `lerobot-train` names them."""
        return {
            "n_obs_steps": 1,
            "horizon": self.chunk_len,
            "drop_n_last_frames": self.chunk_len - self.num_executed,
            "down_dims": f"[{', '.join(map(str, self.down_dims))}]",
            "noise_scheduler_type": "DDIM",
            "num_inference_steps": self.num_inference_steps,
            "scheduler_warmup_steps": self.num_steps // 10,
        }


def train_lerobot(
    cache_dirs: Sequence[str], out_dir: Path, config: LeRobotTrainConfig, *, command: str = ""
) -> dict[str, float]:
    """Train one LeRobot policy and write its folder; resumes if killed.

    Args:
        cache_dirs: clip caches.
        out_dir: the policy's folder; data set and LeRobot's run lie next to it in `<out_dir>.run`.
        config: the run.
        command: the command line, for the card.

    Returns:
        Errors of the first action of each chunk on held-out demonstrations: `translation_mm`, `gripper_accuracy`.

    Raises:
        ValueError: not exactly one of encoder and world_model is given, the caches have too few demonstrations, or the
            run directory belongs to another configuration.
        RuntimeError: LeRobot's trainer failed; what it said is in train.log in the run directory.
    """
    if bool(config.encoder) == bool(config.world_model):
        raise ValueError(f"give either encoder or world_model, got {config.encoder!r} and {config.world_model!r}")
    demos = load_demonstrations(cache_dirs, config.behaviours)
    train, held_out = demos.split(config.num_demos, config.num_held_out, config.seed)
    run_dir = out_dir.with_name(out_dir.name + ".run")
    run_dir.mkdir(parents=True, exist_ok=True)
    check_same_run(run_dir / "run.json", {"caches": list(cache_dirs), **asdict(config)})
    spec = _prepare_encoder(config, train.instructions, run_dir)
    dataset_dir, lerobot_dir = run_dir / "dataset", run_dir / "lerobot"
    if not dataset_dir.exists():
        partial = run_dir / "dataset.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_feature_dataset(train, load_frame_encoder(spec, run_dir), partial, config)
        partial.rename(dataset_dir)
    arguments = trainer_arguments(dataset_dir, lerobot_dir, config)
    _run_trainer(arguments, lerobot_dir, run_dir / "train.log")
    _export(lerobot_dir / "checkpoints" / "last" / "pretrained_model", out_dir, spec, run_dir)
    errors = held_out_errors(out_dir, held_out)
    _write_card(out_dir, config, train, errors, command, arguments)
    return errors


def write_feature_dataset(demos: Demonstrations, encoder: FrameEncoder, root: Path, config: LeRobotTrainConfig) -> None:
    """Write demonstrations as a LeRobotDataset of state, environment state and physical action, without images."""
    from datasets import disable_progress_bars
    from lerobot.datasets import LeRobotDataset

    features = {
        "observation.state": {"dtype": "float32", "shape": (7,), "names": list(AGENT_POS_NAMES)},
        "observation.environment_state": {"dtype": "float32", "shape": (encoder.dim,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": list(ACTION_NAMES)},
    }
    disable_progress_bars()  # one bar an episode otherwise
    dataset = LeRobotDataset.create(f"local/{root.parent.name}", CONTROL_HZ, features, root=root, use_videos=False)
    rng = np.random.default_rng(config.seed)
    for view in range(config.num_views):
        for first, last in zip(demos.first, demos.last, strict=True):
            instruction = demos.instructions[demos.instruction_id[first]]
            frames, state = demos.frames(np.arange(first, last)), demos.agent_pos[first:last]
            if view:
                frames = shifted(frames, 2, rng)
                state = state + rng.normal(0, config.agent_pos_noise, state.shape).astype(np.float32)
            encoded = encoder.encode(frames, instruction)
            actions = to_physical(demos.actions[first:last])
            for row in range(last - first):
                dataset.add_frame(
                    {
                        "observation.state": state[row],
                        "observation.environment_state": encoded[row],
                        "action": actions[row],
                        "task": instruction,
                    }
                )
            dataset.save_episode()
    dataset.finalize()
    stats_path = root / "meta" / "stats.json"
    stats = json.loads(stats_path.read_text())
    stats["observation.state"]["std"] = [max(value, MIN_STATE_STD) for value in stats["observation.state"]["std"]]
    stats_path.write_text(json.dumps(stats, indent=4))


def trainer_arguments(dataset_dir: Path, lerobot_dir: Path, config: LeRobotTrainConfig) -> list[str]:
    """Return the command line of `lerobot-train` for a run."""
    values = {
        "dataset.repo_id": f"local/{dataset_dir.parent.name}",
        "dataset.root": dataset_dir,
        "dataset.video_backend": "pyav",
        "output_dir": lerobot_dir,
        "policy.type": config.type,
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "policy.pretrained_backbone_weights": "null",
        "policy.n_action_steps": config.num_executed,
        "policy.optimizer_lr": config.learning_rate,
        **{f"policy.{name}": value for name, value in config.policy_arguments().items()},
        "steps": config.num_steps,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "save_freq": max(1, config.num_steps // 4),
        "log_freq": 100,
        "env_eval_freq": 0,
        "num_workers": 0,
        "wandb.enable": "false",
    }
    return [f"--{name}={value}" for name, value in values.items()]


def held_out_errors(folder: Path, demos: Demonstrations) -> dict[str, float]:
    """Return `translation_mm` (mean absolute error) and `gripper_accuracy` of a policy's first actions."""
    policy = load_policy(folder)
    translation, right = [], []
    for first, last in zip(demos.first, demos.last, strict=True):
        rows = np.arange(first, last)
        instruction = demos.instructions[demos.instruction_id[first]]
        policy.reset(len(rows), instruction=instruction, seeds=[0] * len(rows))
        actions = policy.act({"pixels": demos.frames(rows), "agent_pos": demos.agent_pos[rows]})
        truth = demos.actions[rows]
        translation.append(np.abs(actions[:, :3] - truth[:, :3]).mean(axis=1) * 50)  # 1 is 50 mm
        right.append((actions[:, -1] > 0) == (truth[:, -1] > 0))
    means = float(np.concatenate(translation).mean()), float(np.concatenate(right).mean())
    return dict(zip(("translation_mm", "gripper_accuracy"), means, strict=True))


def _prepare_encoder(config: LeRobotTrainConfig, instructions: list[str], run_dir: Path) -> dict[str, object]:
    """Return the encoder's entry of worldsim.json; the keypoint network is copied to `run_dir`."""
    if config.world_model:
        return {"kind": "latents", "world_model": config.world_model, "instructions": instructions}
    folder = run_dir / "encoder"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(policy_path(config.encoder) / name, folder / name)
    known = ActorConfig(json.loads((folder / "config.json").read_text())["instructions"])
    for instruction in instructions:
        instruction_id(known, instruction)  # an encoder that lacks one fails here, not in the middle of the run
    return {"kind": "keypoints", "path": "encoder"}


def _run_trainer(arguments: list[str], lerobot_dir: Path, log_path: Path) -> None:
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_train"]
    resumable = lerobot_dir / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
    if resumable.exists():
        command += [f"--config_path={resumable}", "--resume=true"]
    else:
        shutil.rmtree(lerobot_dir, ignore_errors=True)  # killed before its first checkpoint
        command += arguments
    log.info("training with LeRobot; its log is %s", log_path)
    with open(log_path, "ab") as file:
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        raise RuntimeError(f"LeRobot's trainer ended with {result.returncode}; see {log_path}")


def _export(source: Path, out_dir: Path, spec: dict[str, object], run_dir: Path) -> None:
    """Copy LeRobot's checkpoint, weights in half precision, with the encoder; the folder appears whole."""
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("train_config.json", "README.md"))
    weights = load_file(source / "model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, partial / "model.safetensors", {"format": "pt"})
    if spec["kind"] == "keypoints":
        shutil.copytree(run_dir / "encoder", partial / "encoder")
    (partial / "worldsim.json").write_text(json.dumps({"environment_state": spec}, indent=2) + "\n")
    shutil.rmtree(out_dir, ignore_errors=True)
    partial.rename(out_dir)


def _write_card(
    out_dir: Path,
    config: LeRobotTrainConfig,
    train: Demonstrations,
    errors: dict[str, float],
    command: str,
    arguments: list[str],
) -> None:
    seen = f"latents of {config.world_model}" if config.world_model else f"keypoints of {config.encoder} (`encoder/`)"
    lines = [
        f"# {out_dir.name}",
        "",
        f"LeRobot's {config.type}, trained by its `lerobot-train`; `policies.load_policy` runs it with its processors.",
        "",
        f"- Sees: the {seen} as observation.environment_state with a one-hot instruction; observation.state.",
        f"- Data: {len(train.first)} successful demonstrations of the scripted expert in the twin, "
        f"{len(train.frame_indices())} frames, {len(train.instructions)} tasks.",
        f"- Command: `{command or 'policies.lerobot_train.train_lerobot'}`",
        f"- Settings: `{json.dumps(asdict(config))}`",
        "- Trainer: `lerobot-train " + " ".join(a for a in arguments if "_dir" not in a and ".root" not in a) + "`",
        "- Held-out demonstrations: " + ", ".join(f"{name} {value:.3g}" for name, value in errors.items()) + ".",
        "- Limits: knows only these instructions; can be no better than what the frozen encoder sees.",
    ]
    write_atomic(out_dir / "CARD.md", ("\n".join(lines) + "\n").encode())
