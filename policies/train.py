"""Train behaviour-cloning policies on the successful demonstrations of a clip cache."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from policies.actor import WAYPOINT_OF_AGENT_POS, ActorConfig, ActorNetwork
from policies.bc import BCConfig, BCNetwork
from policies.demonstrations import Demonstrations, load_demonstrations
from policies.wfm_policy import WFMPolicyConfig, WFMPolicyNetwork
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.files import write_atomic
from wfm_core.encoding import encode_cache
from wfm_core.tokenizers.patch import PatchTokenizer, to_float
from wfm_core.train import Batch, TrainConfig, fit

ENCODED_AT_ONCE = 256  # frames
GRIPPER_WEIGHT = 0.3
WAYPOINT_WEIGHT = 1.0


@dataclass
class CloneConfig:
    """One behaviour-cloning run, whatever the network sees with.

    Attributes:
        num_demos: demonstrations per task, 0 for all; smaller sets are subsets of larger ones with the same seed.
        num_held_out: further demonstrations per task kept for the reported errors.
        behaviours: which behaviours of the cache count as demonstrations.
        agent_pos_noise: standard deviation of the noise on `agent_pos` in units of its own: a policy that trusts
            proprioception to the millimetre replays trajectories instead of looking.
        max_shift: frames are shifted by up to this many pixels; more would blur where things are in the robot's frame.
        chunk_len, num_executed: see `ActorConfig`.
    """

    num_demos: int = 0
    num_held_out: int = 4
    behaviours: list[str] = field(default_factory=lambda: ["expert"])
    num_steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 0
    agent_pos_noise: float = 0.1
    max_shift: int = 2
    chunk_len: int = 6
    num_executed: int = 3


@dataclass
class BCTrainConfig(CloneConfig):
    """Cloning from pixels.

    Attributes:
        width: see `BCConfig`.
    """

    width: int = 16


@dataclass
class WFMTrainConfig(CloneConfig):
    """Cloning by a network whose trunk is a world model's.

    Attributes:
        world_model, num_layers: see `WFMPolicyConfig`.
        initialised: begin with the world model's weights; else at random.
        frozen: leave the trunk as it is, which takes a third of the time.
        num_views: versions of each frame, the first as it is and the others augmented, encoded before training.
    """

    world_model: str = DEFAULT_WORLD_MODEL
    num_layers: int = 0
    initialised: bool = True
    frozen: bool = False
    num_views: int = 4


class CloningObjective(nn.Module):
    """The network with its loss, in the form the training loop wants."""

    def __init__(self, network: ActorNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts.

        Args:
            batch: `picture` (B, ...), as the network sees it, `agent_pos` (B, 7), `instruction_id` (B,), `actions`
                (B, chunk_len, 7) normalised, `waypoint` (B, 4) in m and rad.
        """
        actions, waypoint = self.network(batch["picture"], batch["agent_pos"], batch["instruction_id"])
        return cloning_loss(self.network, actions, waypoint, batch)


def cloning_loss(
    network: ActorNetwork, actions: Tensor, waypoint: Tensor, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and its parts of what a network's `decide` gave for a batch of `CloningObjective`."""
    columns = list(WAYPOINT_OF_AGENT_POS)
    target = (batch["waypoint"] - network.mean[columns]) / network.std[columns]
    motion_loss, gripper_loss = action_losses(actions, batch["actions"])
    waypoint_loss = functional.smooth_l1_loss(waypoint.float(), target, beta=0.1)
    loss = motion_loss + GRIPPER_WEIGHT * gripper_loss + WAYPOINT_WEIGHT * waypoint_loss
    parts = {"motion": motion_loss, "gripper": gripper_loss, "waypoint": waypoint_loss}
    return loss, {name: part.detach() for name, part in parts.items()}


def action_losses(actions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of motion and of the gripper: predicted actions (..., 7), the gripper a logit, against normalised ones."""
    motion = functional.smooth_l1_loss(actions[..., :-1].float(), target[..., :-1], beta=0.1)
    is_open = ((target[..., -1] + 1) / 2).clamp(0, 1)
    return motion, functional.binary_cross_entropy_with_logits(actions[..., -1].float(), is_open)


def clone(
    cache_dirs: Sequence[str],
    out_dir: Path,
    config: CloneConfig,
    *,
    command: str = "",
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train one policy and write its checkpoint folder; resumes if killed.

    Args:
        cache_dirs: clip caches.
        out_dir: the checkpoint folder; the run's state lies next to it in `<out_dir>.run`.
        config: the run.
        command: the command line, for the card.
        on_log: called now and then with the step and its metrics.

    Returns:
        Errors on held-out demonstrations (see `held_out_errors`).

    Raises:
        ValueError: the caches have too few demonstrations, or the run directory belongs to another configuration.
    """
    demos = load_demonstrations(cache_dirs, config.behaviours)
    train, held_out = demos.split(config.num_demos, config.num_held_out, config.seed)
    torch.manual_seed(config.seed)  # parameter initialisation has no generator argument
    network, sight = _build(config, train)
    objective = CloningObjective(network)
    batch_fn = _batches(train, sight, train.frame_indices(), config, network.config)
    run_dir = out_dir.with_name(out_dir.name + ".run")
    run_dir.mkdir(parents=True, exist_ok=True)
    check_same_run(run_dir / "run.json", {"caches": list(cache_dirs), **asdict(config)})
    settings = TrainConfig(
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(100, config.num_steps // 10),
        ema_decay=0.99,
    )
    averaged = fit(objective, batch_fn, settings, run_dir, on_log=on_log)
    objective.load_state_dict(averaged)
    network.save(out_dir)
    errors = held_out_errors(network, held_out)
    _write_card(out_dir, network, config, train, errors, command)
    return errors


def demonstrated(
    network: ActorNetwork, caches: Sequence[ClipCache], instructions: Sequence[str], num_demos: int, seed: int
) -> Callable[[int], Batch]:
    """Return batches of demonstrations, by number, for a policy that learns otherwise and shall not forget them.

    Args:
        network: who sees them.
        caches: where they are.
        instructions: of the tasks whose demonstrations are wanted.
        num_demos: of each task, 0 for all; the same ones that `clone` takes with this seed.
        seed: of the choice and of the batches.

    Raises:
        ValueError: the caches have too few, or of other tasks than the policy knows.
    """
    config = WFMTrainConfig(num_demos=num_demos, seed=seed, num_views=1, chunk_len=network.config.chunk_len)
    demos, _ = load_demonstrations([str(cache.directory) for cache in caches], config.behaviours).split(
        num_demos, config.num_held_out, seed
    )
    if demos.instructions != list(network.config.instructions):
        raise ValueError(f"the policy knows {network.config.instructions}, demonstrations are of {demos.instructions}")
    if isinstance(network, WFMPolicyNetwork):
        sight = latent_sight(demos, config, network.view.tokenizer)
    else:
        sight = pixel_sight(demos, config)
    wanted = [demos.instructions.index(instruction) for instruction in instructions]
    indices = demos.frame_indices()
    indices = indices[np.isin(demos.instruction_id[indices], wanted)]
    return _batches(demos, sight, indices, config, network.config)


def _batches(
    demos: Demonstrations, sight: "Sight", indices: np.ndarray, config: CloneConfig, network: ActorConfig
) -> Callable[[int], Batch]:
    """Batches by number, of frames drawn from `indices`."""

    def batch_fn(number: int) -> Batch:
        rng = np.random.default_rng([config.seed, number])
        return make_batch(demos, sight, rng.choice(indices, config.batch_size), config, rng, network)

    return batch_fn


def _build(config: CloneConfig, demos: Demonstrations) -> tuple[ActorNetwork, "Sight"]:
    """The network that a run trains, and how it sees demonstrations."""
    states = demos.agent_pos[demos.frame_indices()]
    sizes: dict[str, Any] = {
        "instructions": demos.instructions,
        "chunk_len": config.chunk_len,
        "num_executed": config.num_executed,
        "agent_pos_mean": [float(x) for x in states.mean(axis=0)],
        "agent_pos_std": [float(max(x, 0.05)) for x in states.std(axis=0)],  # a floor, for what hardly varies
    }
    if isinstance(config, WFMTrainConfig):
        network = WFMPolicyNetwork(
            WFMPolicyConfig(**sizes, world_model=config.world_model, num_layers=config.num_layers)
        )
        network.trunk.requires_grad_(not config.frozen)
        sight = latent_sight(demos, config, network.view.tokenizer)
        return (network.born() if config.initialised else network), sight
    assert isinstance(config, BCTrainConfig)
    bc = BCNetwork(BCConfig(**sizes, image_size=demos.image_size, width=config.width))
    return bc, pixel_sight(demos, config)


type Sight = Callable[[np.ndarray, np.random.Generator], Tensor]
"""Gives the augmented pictures (B, ...) of frames by their indices (B,), as a network's `see` takes them."""


def augmented(frames: np.ndarray, max_shift: int, rng: np.random.Generator) -> Tensor:
    """Shift, brighten, dim and blur frames (B, H, W, 3) uint8; float32 in [0, 255]."""
    pixels = torch.from_numpy(shifted(frames, max_shift, rng)).float()
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (len(frames), 1, 1, 3)).astype(np.float32))
    bias = torch.from_numpy(rng.uniform(-15, 15, (len(frames), 1, 1, 1)).astype(np.float32))
    pixels = pixels.mul_(gain).add_(bias).clamp_(0, 255)
    blurred = torch.from_numpy(np.flatnonzero(rng.random(len(frames)) < 0.3))
    channels_first = pixels[blurred].permute(0, 3, 1, 2)
    pixels[blurred] = functional.avg_pool2d(channels_first, 3, stride=1, padding=1).permute(0, 2, 3, 1)
    return pixels


def pixel_sight(demos: Demonstrations, config: CloneConfig) -> Sight:
    """Return pictures that are pixels (B, H, W, 3) float32 in [0, 255], augmented anew each time."""
    return lambda indices, rng: augmented(demos.frames(indices), config.max_shift, rng)


@torch.no_grad()
def latent_sight(demos: Demonstrations, config: WFMTrainConfig, tokenizer: PatchTokenizer) -> Sight:
    """Return pictures that are latents (B, h, w, C) of one of `config.num_views` versions of each frame.

    Those of frames as they are stay beside the data sets, where every training finds them.
    """
    kept = [encode_cache(tokenizer, cache) for cache in demos.caches]
    indices, parts = demos.frame_indices(), []
    starts = range(0, len(indices) if config.num_views > 1 else 0, ENCODED_AT_ONCE)
    for start in tqdm(starts, desc="encoding augmented demonstrations", disable=not starts):
        rng = np.random.default_rng([config.seed, start])
        frames = demos.frames(indices[start : start + ENCODED_AT_ONCE])
        versions = [augmented(frames, config.max_shift, rng) for _ in range(config.num_views - 1)]
        parts.append(np.stack([tokenizer.codec.pack(tokenizer.encode(to_float(each))) for each in versions], axis=1))
    others = np.concatenate(parts) if parts else None  # (N, num_views - 1, ...)

    def sight(chosen: np.ndarray, rng: np.random.Generator) -> Tensor:
        latents, version = demos.rows(kept, chosen), rng.integers(config.num_views, size=len(chosen))
        if others is not None and (changed := version > 0).any():
            latents[changed] = others[np.searchsorted(indices, chosen[changed]), version[changed] - 1]
        return tokenizer.codec.unpack(latents)

    return sight


def make_batch(
    demos: Demonstrations,
    sight: Sight,
    indices: np.ndarray,
    config: CloneConfig,
    rng: np.random.Generator,
    network: ActorConfig,
) -> Batch:
    """Gather one batch, with noise on `agent_pos`."""
    indices = np.sort(indices)  # the cache is read forwards
    picture = sight(indices, rng)
    noise = rng.normal(0, config.agent_pos_noise, (len(indices), 7)) * np.array(network.agent_pos_std)
    return {
        "picture": picture,
        "agent_pos": torch.from_numpy((demos.agent_pos[indices] + noise).astype(np.float32)),
        "instruction_id": torch.from_numpy(demos.instruction_id[indices]),
        "actions": torch.from_numpy(demos.chunks(indices, config.chunk_len)),
        "waypoint": torch.from_numpy(demos.waypoint[indices]),
    }


def shifted(frames: np.ndarray, max_shift: int, rng: np.random.Generator) -> np.ndarray:
    """Shift every frame of (B, H, W, 3) by its own -max_shift..max_shift pixels; uncovered edges keep their pixels."""
    out = frames.copy()
    height, width = frames.shape[1:3]
    for frame, source, (dy, dx) in zip(
        out, frames, rng.integers(-max_shift, max_shift + 1, (len(frames), 2)), strict=True
    ):
        inside = source[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
        frame[max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)] = inside
    return out


@torch.no_grad()
def held_out_errors(network: ActorNetwork, demos: Demonstrations, *, batch_size: int = 64) -> dict[str, float]:
    """Return mean absolute errors of the first action of each chunk on demonstrations not trained on.

    Returns:
        `translation_mm` and `waypoint_mm` (mean over x, y, z), `gripper_accuracy` in [0, 1].
    """
    network.eval()
    rows = []
    indices = demos.frame_indices()
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        actions, waypoint = network(
            network.picture({"pixels": demos.frames(batch)}),
            torch.from_numpy(demos.agent_pos[batch]),
            torch.from_numpy(demos.instruction_id[batch]),
        )
        waypoint = waypoint.numpy() * network.std.numpy()[list(WAYPOINT_OF_AGENT_POS)]
        waypoint += network.mean.numpy()[list(WAYPOINT_OF_AGENT_POS)]
        truth = demos.chunks(batch, 1)[:, 0]
        translation = np.abs(actions[:, 0, :3].numpy() - truth[:, :3]).mean(axis=1) * 50  # 1 is 50 mm
        right = (actions[:, 0, -1].numpy() > 0) == (truth[:, -1] > 0)
        to_waypoint = np.abs(waypoint[:, :3] - demos.waypoint[batch, :3]).mean(axis=1) * 1000
        rows.append(np.stack([translation, to_waypoint, right], axis=1))
    means = np.concatenate(rows).mean(axis=0)
    return dict(zip(("translation_mm", "waypoint_mm", "gripper_accuracy"), map(float, means), strict=True))


def check_same_run(path: Path, values: dict[str, object]) -> None:
    """Write down what a run directory belongs to, or compare it with what is written there.

    Raises:
        ValueError: it belongs to another run.
    """
    text = json.dumps(values, indent=2) + "\n"
    if path.exists() and (found := path.read_text()) != text:
        raise ValueError(f"{path} belongs to another run ({found}); choose another output or delete {path.parent}")
    write_atomic(path, text.encode())


def _write_card(
    out_dir: Path,
    network: ActorNetwork,
    config: CloneConfig,
    train: Demonstrations,
    errors: dict[str, float],
    command: str,
) -> None:
    lines = [
        f"# {out_dir.name}",
        "",
        f"Behaviour cloning: one frame's {network.sees}, proprioception and instruction to an action chunk.",
        "",
        f"- Data: {len(train.first)} successful demonstrations of the scripted expert in the twin, "
        f"{len(train.frame_indices())} frames, {len(train.instructions)} tasks "
        f"({'all' if config.num_demos == 0 else config.num_demos} per task).",
        f"- Steps: {config.num_steps} of batch {config.batch_size}; seed {config.seed}.",
        f"- Command: `{command or 'policies.train.clone'}`",
        f"- Settings: `{json.dumps(asdict(config))}`",
        "- Held-out demonstrations: " + ", ".join(f"{name} {value:.3g}" for name, value in errors.items()) + ".",
        f"- Limits: knows only these instructions; one camera at {train.image_size} pixels; gripper open or closed, "
        "nothing between.",
    ]
    write_atomic(out_dir / "CARD.md", ("\n".join(lines) + "\n").encode())
