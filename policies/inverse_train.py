"""Train inverse dynamics on recorded episodes whose actions are known."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from policies.inverse_dynamics import InverseDynamics, InverseDynamicsConfig
from policies.train import GRIPPER_WEIGHT, action_losses
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.data.actions import to_normalised
from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.files import write_atomic
from wfm_core.encoding import encode_cache
from wfm_core.train import Batch, BatchFn, OnLog, TrainConfig, fit


@dataclass
class InverseTrainConfig:
    """One training.

    Attributes:
        world_model, num_layers, num_frames: see `InverseDynamicsConfig`.
        num_episodes: learnt from at most, drawn from all that are not held out; 0: all.
        num_held_out: episodes kept for the reported errors.
    """

    world_model: str = DEFAULT_WORLD_MODEL
    num_layers: int = 0
    num_frames: int = 3
    num_episodes: int = 0
    num_held_out: int = 20
    num_steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


class InverseObjective(nn.Module):
    """The network with its loss, in the form the training loop wants."""

    def __init__(self, network: InverseDynamics) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts.

        Args:
            batch: `latents` (B, num_frames, h, w, C), `actions` (B, 7) normalised, `agent_pos` (B, 7) of the first
                frame, NaN where it is not known.
        """
        network, latents = self.network, batch["latents"]
        seen = network.see(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        motion_loss, gripper_loss = action_losses(network.actions(seen), batch["actions"])
        poses = network.poses(seen[:, 0]).float()
        target = (batch["agent_pos"] - network.centre) / network.scale
        known = target.isfinite()
        pose_loss = functional.smooth_l1_loss(poses[known], target[known], beta=0.1) if known.any() else 0 * poses.sum()
        parts = {"motion": motion_loss, "gripper": gripper_loss, "pose": pose_loss}
        loss = motion_loss + GRIPPER_WEIGHT * gripper_loss + pose_loss
        return loss, {name: part.detach() for name, part in parts.items()}


def train_inverse_dynamics(
    cache_dirs: Sequence[str],
    out_dir: Path,
    config: InverseTrainConfig,
    *,
    command: str = "",
    on_log: OnLog | None = None,
) -> dict[str, float]:
    """Train inverse dynamics and write their folder; resumes if killed.

    Args:
        cache_dirs: clip caches with actions.
        out_dir: the folder; the run's state lies next to it in `<out_dir>.run`.
        config: the run.
        command: the command line, for the card.
        on_log: called now and then with the step and its metrics.

    Returns:
        Errors on held-out episodes, see `inference_errors`.

    Raises:
        ValueError: actions are not known, frames have another size than the world model's, there are too few episodes,
            or the run's folder belongs to another configuration.
    """
    caches = [ClipCache(path) for path in cache_dirs]
    for cache in caches:
        cache.require_actions()
    episodes = [(which, k) for which, cache in enumerate(caches) for k in range(len(cache)) if cache.lengths[k] > 1]
    if len(episodes) <= config.num_held_out:
        raise ValueError(f"need more than num_held_out={config.num_held_out} episodes, got {len(episodes)}")
    drawn = [episodes[k] for k in np.random.default_rng(config.seed).permutation(len(episodes))]
    held_out, learnt = drawn[: config.num_held_out], drawn[config.num_held_out :]
    learnt = learnt[: config.num_episodes or None]
    torch.manual_seed(config.seed)  # parameter initialisation has no generator argument
    sizes = {name: getattr(config, name) for name in ("world_model", "num_layers", "num_frames")}
    network = InverseDynamics(InverseDynamicsConfig(**sizes)).born()
    batch_fn = _batches(network, caches, learnt, config)
    settings = TrainConfig(
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(100, config.num_steps // 10),
        ema_decay=0.99,
    )
    made_of = {"caches": list(cache_dirs), **asdict(config)}
    objective = InverseObjective(network)
    run_dir = out_dir.with_name(out_dir.name + ".run")
    objective.load_state_dict(fit(objective, batch_fn, settings, run_dir, batches=made_of, on_log=on_log))
    network.save(out_dir)
    errors = inference_errors(network, caches, held_out)
    frames = sum(int(caches[which].lengths[k]) for which, k in learnt)
    shown = ", ".join(f"{name} {value:.3g}" for name, value in errors.items())
    card = [
        f"# {out_dir.name}",
        "",
        f"Inverse dynamics on the trunk of {config.world_model}: {config.num_frames} frames to the first one's action.",
        "",
        f"- Data: {len(learnt)} episodes, {frames} frames. Steps: {config.num_steps} of batch {config.batch_size}.",
        f"- {len(held_out)} held-out episodes: {shown}.",
        f"- Command: `{command or 'policies.inverse_train'}`",
        f"- Settings: `{json.dumps(asdict(config))}`",
        "- Limits: knows the arm and the camera of its data; the gripper's command is open or closed.",
    ]
    write_atomic(out_dir / "CARD.md", ("\n".join(card) + "\n").encode())
    return errors


def _batches(
    network: InverseDynamics, caches: list[ClipCache], learnt: list[tuple[int, int]], config: InverseTrainConfig
) -> BatchFn:
    """Number -> batch, of moments of the episodes."""
    tokenizer = network.view.tokenizer
    kept = [encode_cache(tokenizer, cache) for cache in caches]
    moments = np.array([
        (which, row, caches[which].starts[k] + caches[which].lengths[k] - 1)
        for which, k in learnt
        for row in range(caches[which].starts[k], caches[which].starts[k] + caches[which].lengths[k] - 1)
    ])  # fmt: skip
    actions = [to_normalised(cache.columns["actions"]) for cache in caches]

    def batch(number: int) -> Batch:
        rng = np.random.default_rng([config.seed, number])
        chosen = moments[np.sort(rng.choice(len(moments), config.batch_size))]
        rows = np.minimum(chosen[:, 1:2] + np.arange(config.num_frames), chosen[:, 2:])
        which = chosen[:, 0]
        latents = np.stack([kept[c][r] for c, r in zip(which, rows, strict=True)])
        return {
            "latents": tokenizer.codec.unpack(latents),
            "actions": torch.from_numpy(np.stack([actions[c][r] for c, r in zip(which, rows[:, 0], strict=True)])),
            "agent_pos": torch.from_numpy(
                np.stack([caches[c].columns["agent_pos"][r] for c, r in zip(which, rows[:, 0], strict=True)])
            ),
        }

    return batch


def inference_errors(
    network: InverseDynamics, caches: Sequence[ClipCache], episodes: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """Return errors of what is inferred of whole episodes, each (its cache, its number).

    Returns:
        `motion_r2`, the share of the commanded motion's variance that is explained (dimensions that vary weigh alike),
        `translation_mm`, mean absolute error of x, y and z, `gripper_accuracy` in [0, 1], and `pose_mm`, of where the
        arm is, NaN where that is not known.
    """
    told, found, poses = [], [], []
    for which, k in episodes:
        clip = caches[which].clip(k, 0, int(caches[which].lengths[k]))
        actions, agent_pos = network.infer(np.array(clip["frames"]))  # of what is mapped, a copy
        told.append(clip["actions"][:-1])
        found.append(actions)
        poses.append(np.abs(agent_pos - clip["agent_pos"])[:, :3])
    truth, guess = np.concatenate(told), np.concatenate(found)
    spread = truth[:, :-1].var(axis=0)
    varied = spread > 1e-8
    explained = 1 - ((truth - guess)[:, :-1] ** 2).mean(axis=0)[varied] / spread[varied]
    return {
        "motion_r2": float(explained.mean()),
        "translation_mm": float(1000 * np.abs(truth - guess)[:, :3].mean()),
        "gripper_accuracy": float(((truth[:, -1] > 0.5) == (guess[:, -1] > 0.5)).mean()),
        "pose_mm": float(1000 * np.concatenate(poses).mean()),
    }
