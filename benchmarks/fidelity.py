"""How true are imagined rollouts? Held-out twin episodes, from the first frame only, under their true actions.

    python benchmarks/fidelity.py [--quick] [--world-model NAME] [--out outputs/fidelity]

The episodes are recorded by the twin on first use (`worldsim-record` with seed 1: ids 1-000000 to 1-000099), so anybody
can repeat the figures. Frames count where an object has moved by at least 1 cm since the start. Object positions in
images are centroids of the pixels of the object's colour, in the true and in the imagined frame alike, and only where
the true frame shows the object. The last line is one JSON object.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from policies.scripted_vision import color_mask
from tasks import TASKS, held
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import find_checkpoint, load_patch_tokenizer, load_world_model
from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.video import encode_video
from wfm_core.encoding import encode_cache
from wfm_core.metrics import psnr
from wfm_core.models.motion import Contact
from wfm_core.rollouts import decode_cache, first_rows, imagine_cache, swapped_actions
from wfm_core.tokenizers.batches import median_backgrounds
from worldsim.caches import open_caches
from worldsim.commands.record import RecordConfig
from worldsim.commands.record import run as record
from worldsim.dynamics_data import contacts
from worldsim.heads import load_heads
from worldsim.heads_data import judge_episodes
from worldsim.simulator import read_calibration

HELD_OUT_SEED = 1
MOVED = 0.01  # m, since the start
VISIBLE = 12  # px that a true frame must show of an object
GRASP_FRAMES = 3  # an object held for fewer counts as touched by chance
GONE = 0.2  # of the true frame's pixels: with fewer, an object has vanished


@dataclass
class Rollouts:
    """Decoded frames of all episodes end to end, (N, H, W, 3) uint8 each; an episode's first frame is the true one."""

    true_actions: np.ndarray
    shuffled_actions: np.ndarray
    held_still: np.ndarray
    reconstruction: np.ndarray


def held_out_cache(out: Path, num_episodes: int) -> ClipCache:
    """Record (or reuse) the published held-out episodes."""
    folder = out / f"held_out_{num_episodes}"
    record(RecordConfig(out=str(folder), num_episodes=num_episodes, seed=HELD_OUT_SEED))
    return open_caches([str(folder)])[0]


class ContactLog:
    """A world model that notes the `Contact` of every frame it imagines, if it draws any."""

    def __init__(self, model) -> None:
        self.model = model
        self.contact: list[np.ndarray] = []

    def __getattr__(self, name: str):
        """Return what the world model has."""
        return getattr(self.model, name)

    def step(self, state, action):
        """Step the world model."""
        step = self.model.step(state, action)
        if "contact" in step[0]:
            self.contact.append(step[0]["contact"].numpy())
        return step


def roll_out(checkpoint: Path, cache: ClipCache) -> tuple[Rollouts, np.ndarray, np.ndarray | None]:
    """Imagine every episode under its true, another's and no actions.

    Returns:
        The rollouts, the real tokens and the `Contact` (T, episodes) of the frames after each episode's first one,
        imagined under the true actions; an episode that has ended goes on without meaning. None if none are drawn.
    """
    tokenizer = load_patch_tokenizer(checkpoint)
    model: Any = ContactLog(load_world_model(checkpoint))
    real = encode_cache(tokenizer, cache)
    still = np.zeros_like(cache.columns["actions"])
    still[:, -1] = 1.0
    decoded = {}
    for name, actions in (
        ("true_actions", None),
        ("shuffled_actions", swapped_actions(cache, np.random.default_rng(0))),
        ("held_still", still),
    ):
        imagined, _ = imagine_cache(model, tokenizer.codec, cache, real, len(cache), actions)
        decoded[name] = decode_cache(model, tokenizer.codec, cache, real, imagined)
    contact = np.array(model.contact[: int(cache.lengths.max()) - 1]) if model.contact else None
    return Rollouts(**decoded, reconstruction=decode_cache(model, tokenizer.codec, cache, real, real)), real, contact


def video_figures(cache: ClipCache, rolled: Rollouts, moved: np.ndarray, horizon: np.ndarray) -> dict:
    """PSNR of rollouts and baselines, over frames in which an object has moved."""
    frames = np.asarray(cache.frames)
    backgrounds, group = median_backgrounds(cache, min(301, int(cache.lengths.min()) * 20))
    background = backgrounds[np.repeat(group, cache.lengths)]
    foreground = (np.abs(frames.astype(np.int16) - background).mean(axis=-1)) > 10
    values = {
        "rollout": psnr(rolled.true_actions, frames),
        "shuffled": psnr(rolled.shuffled_actions, frames),
        "still": psnr(rolled.held_still, frames),
        "copy": psnr(frames[first_rows(cache)], frames),
        "median": psnr(background, frames),
        "reconstruction": psnr(rolled.reconstruction, frames),
    }
    mean = {name: float(value[moved].mean()) for name, value in values.items()}
    last = moved & np.isin(np.arange(len(frames)), cache.starts + cache.lengths - 1)
    tasks = np.repeat([episode["meta"]["task_name"] for episode in cache.episodes], cache.lengths)
    gain = values["rollout"] - values["copy"]
    return {
        "psnr_db": mean,
        "gain_object_moved_db": mean["rollout"] - mean["copy"],
        "gain_median_background_db": mean["rollout"] - mean["median"],
        "gain_last_horizon_db": float(gain[last].mean()),
        "shuffled_cost_db": mean["rollout"] - mean["shuffled"],
        "still_cost_db": mean["rollout"] - mean["still"],
        "reconstruction_db": float(values["reconstruction"].mean()),
        "reconstruction_foreground_db": float(np.nanmean(psnr(rolled.reconstruction, frames, foreground))),
        "gain_by_horizon_db": {
            f"{low}-{low + 9}": float(gain[moved & (horizon >= low) & (horizon < low + 10)].mean())
            for low in range(1, int(horizon.max()), 10)
            if (moved & (horizon >= low) & (horizon < low + 10)).any()
        },
        "gain_by_task_db": {t: float(gain[moved & (tasks == t)].mean()) for t in TASKS if (moved & (tasks == t)).any()},
    }


def object_figures(cache: ClipCache, imagined: np.ndarray) -> dict:
    """Where objects are in imagined frames, against true ones: held, vanished, drifting."""
    positions = cache.columns["object_positions"].reshape(len(cache.frames), -1, 3)
    travelled = np.linalg.norm(positions - positions[first_rows(cache)], axis=-1)  # (N, objects)
    seen: list[tuple[str, str, int, bool, float]] = []  # object, task, horizon, whether held, error in px
    for start, length, episode in zip(cache.starts, cache.lengths, cache.episodes, strict=True):
        task = TASKS[episode["meta"]["task_name"]]
        for k, item in enumerate(task.objects):
            if item.ghost or item.fixed:
                continue
            full = color_mask(cache.frames[start], item.color).sum()
            for row in range(start + 1, start + length):
                is_held = cache.columns["grasped"][row] == k
                still = travelled[row, k] < 0.002
                if not (is_held or still):
                    continue
                true_mask = color_mask(cache.frames[row], item.color)
                if true_mask.sum() < (VISIBLE if is_held else max(VISIBLE, 0.9 * full)):
                    continue
                mask = color_mask(imagined[row], item.color)
                gone = mask.sum() < GONE * true_mask.sum()
                error = np.inf if gone else float(np.linalg.norm(centroid(mask) - centroid(true_mask)))
                seen.append((item.name, task.name, row - start, is_held, error))
    objects, tasks, horizon, is_held, error = (np.array([entry[i] for entry in seen]) for i in range(5))
    is_held = is_held.astype(bool)
    groups = {"object": objects, "task": tasks, "horizon": horizon // 10 * 10}
    figures = {"grasped_frames": int(is_held.sum()), "untouched_frames": int((~is_held).sum())}
    for name, chosen, flags in (
        ("grasped_within_8px", is_held, error <= 8),
        ("vanished_rate", is_held, np.isinf(error)),
        ("untouched_drift_rate", ~is_held, error > 3),
    ):
        figures[name] = rate(flags[chosen])
        for what, group in groups.items():
            values = np.unique(group[chosen]).tolist()
            figures[f"{name}_by_{what}"] = {str(value): rate(flags[chosen & (group == value)]) for value in values}
    return figures


def grasp_figures(cache: ClipCache, contact: np.ndarray) -> dict:
    """In how many episodes an object is held, truly and as imagined (T, episodes); chance touches do not count."""
    true = contacts(cache)
    grasped, imagined = (
        np.array([np.isin(kinds, (Contact.HELD, Contact.HELD_BLOCKED)).sum() >= GRASP_FRAMES for kinds in episodes])
        for episodes in (
            [true[start + 1 : start + length] for start, length in zip(cache.starts, cache.lengths, strict=True)],
            [contact[: length - 1, k] for k, length in enumerate(cache.lengths)],
        )
    )
    return {
        "grasps": int(grasped.sum()),
        "grasps_imagined_too": int((grasped & imagined).sum()),
        "grasps_invented": int((imagined & ~grasped).sum()),
    }


def rate(flags: np.ndarray) -> float | None:
    """Fraction of a (N,) bool array that is true; None of none."""
    return float(flags.mean()) if len(flags) else None


def centroid(mask: np.ndarray) -> np.ndarray:
    """(row, column) of the middle of a (H, W) bool mask, px."""
    return np.argwhere(mask).mean(axis=0)


def head_figures(checkpoint: Path, cache: ClipCache, tokens: np.ndarray) -> dict:
    """How often the success head's verdict on true videos is right, an episode counted as a whole."""
    heads, calibration = load_heads(checkpoint), read_calibration(checkpoint)
    probability, _ = judge_episodes(heads, load_patch_tokenizer(checkpoint).codec, cache, tokens)
    right = []
    for start, length, episode in zip(cache.starts, cache.lengths, cache.episodes, strict=True):
        window = slice(start, start + length)
        truth = held(cache.columns["success"][window].astype(bool))
        threshold = calibration.success_threshold_for(episode["instruction"])
        right.append(held(probability[window] >= threshold) == truth)
    return {"success_head_accuracy": float(np.mean(right))}


def false_success(world_model: str, num_states: int) -> dict:
    """How often imagination calls a no-op or random episode a success."""
    from gymnasium.vector import AutoresetMode

    from envs.world_model_bridge import WorldModelBridgeVectorEnv
    from worldsim.evaluate import Cell, evaluate
    from worldsim.probes import NoOpPolicy, RandomPolicy

    fooled = []
    for task in tqdm(TASKS, desc="no-op and random policies"):
        for policy in (NoOpPolicy(), RandomPolicy()):
            env = WorldModelBridgeVectorEnv(
                num_envs=num_states,
                world_model=world_model,
                task=task,
                observation="latents",  # neither policy looks
                autoreset_mode=AutoresetMode.DISABLED,
            )
            pairs = [(state, state) for state in range(num_states)]
            cell = Cell(policy="probe", policy_hash="", world="imagined", world_hash="", task=task)
            records = evaluate(policy, env, pairs, cell, instruction=TASKS[task].instruction)
            fooled += [record.success for record in records]
    return {"false_success_rate": float(np.mean(fooled)), "false_success_episodes": len(fooled)}


def save_videos(cache: ClipCache, rolled: Rollouts, out: Path) -> None:
    """Write true and imagined frames side by side, one mp4 an episode."""
    folder = out / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    for start, length, episode in zip(cache.starts, cache.lengths, cache.episodes, strict=True):
        window = slice(start, start + length)
        pair = np.concatenate([cache.frames[window], rolled.true_actions[window]], axis=2)
        (folder / f"{episode['episode_id']}.mp4").write_bytes(encode_video(pair, fps=5))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 episodes instead of 100")
    parser.add_argument("--world-model", default=DEFAULT_WORLD_MODEL)
    parser.add_argument("--out", type=Path, default=Path("outputs/fidelity"))
    arguments = parser.parse_args()
    num_episodes = 12 if arguments.quick else 100
    checkpoint = find_checkpoint(arguments.world_model)
    cache = held_out_cache(arguments.out, num_episodes)
    rolled, tokens, contact = roll_out(checkpoint, cache)
    positions = cache.columns["object_positions"].reshape(len(cache.frames), -1, 3)
    moved = np.linalg.norm(positions - positions[first_rows(cache)], axis=-1).max(axis=1) >= MOVED
    horizon = np.arange(len(cache.frames)) - first_rows(cache)
    figures = video_figures(cache, rolled, moved, horizon) | object_figures(cache, rolled.true_actions)
    if contact is not None:
        figures |= grasp_figures(cache, contact)
    figures |= head_figures(checkpoint, cache, tokens)
    figures |= false_success(arguments.world_model, 4 if arguments.quick else 24)
    save_videos(cache, rolled, arguments.out)
    figures |= {"episodes": num_episodes, "frames_object_moved": int(moved.sum()), "world_model": checkpoint.name}
    for name, value in figures.items():
        print(f"{name:<32}{value if not isinstance(value, float) else round(value, 4)}")
    print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
