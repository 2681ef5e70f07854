"""What post-trained models make of what they are told: an instruction, a camera's path, a second camera.

    python benchmarks/recipes.py text   --world-model CHECKPOINT --data HELD_OUT
    python benchmarks/recipes.py views  --world-model JOINT --alone WRIST --data HELD_OUT --training DATA
    python benchmarks/recipes.py camera --world-model CHECKPOINT --data HELD_OUT --training DATA

text: held-out first frames, imagined on without any action, under the episode's own instruction, under "keep still" and
under none; the shipped success head judges, since nobody acts, and what it says of the real frames stands beside.
views: third person and wrist imagined together against the wrist alone, and whether both views show the same way of
the gripper. camera: how far the camera has come since the first frame, read off imagined frames, against what was told;
with its rays, and with those of a camera that stands still. Ways are read by small networks that learn from real frames
of the training data; what they make of real held-out frames stands beside.

A film in `--out` shows some episodes: true, then as imagined, in the order above. --quick takes a few episodes and
hardly trains the readers. The last line is one JSON object.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import nn
from tqdm import trange

from tasks import SUCCESS_HOLD_STEPS, held
from tasks.camera import THIRD_PERSON, WRIST
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import find_checkpoint, load_patch_tokenizer, load_world_model
from wfm_core.data.actions import CONTROL_HZ
from wfm_core.data.camera_rays import POSES, unpack_pose
from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.files import write_atomic
from wfm_core.data.lerobot_v3_writer import DEFAULT_CAMERA, IMAGES
from wfm_core.data.video import ENCODINGS, encode_video
from wfm_core.encoding import encode_frames
from wfm_core.fidelity import by_episode
from wfm_core.memory import keep_freed_memory
from wfm_core.metrics import mean_interval, psnr
from wfm_core.models.token_world_model import TokenWorldModel
from wfm_core.rollouts import first_rows, imagined_frames
from wfm_core.world_model import Reference, no_motion
from worldsim.caches import open_caches
from worldsim.heads import load_heads
from worldsim.simulator import NEUTRAL_AGENT_POS, read_calibration

STILL = "keep still"  # the instruction of episodes in which the arm idles
CAMERAS = [DEFAULT_CAMERA, f"{IMAGES}{WRIST}"]
READER_SIZE, READER_BATCH = 64, 64  # px, pairs of frames
SHOWN = 6  # episodes in a film


@dataclass(frozen=True)
class Options:
    """What is measured, and how long readers learn."""

    world_model: str
    data: str
    training: str
    alone: str
    out: Path
    num_episodes: int
    reader_steps: int


def load(name: str) -> TokenWorldModel:
    """A world model of tokens, the family that is told cameras."""
    model = load_world_model(name)
    assert isinstance(model, TokenWorldModel)
    return model


def opened(folder: str, options: Options, cameras: list[str], count: int = 0) -> ClipCache:
    """A data set at the size that shipped models see, all of it or its first `count` episodes."""
    (cache,) = open_caches([folder], beside=options.out, cameras=cameras)
    return cache.subset(range(min(count, len(cache)))) if count else cache


def encoded(name: str, cache: ClipCache) -> np.ndarray:
    """Frames of a cache as the tokenizer of a checkpoint keeps them."""
    return np.concatenate(list(encode_frames(load_patch_tokenizer(name), cache)))


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95% bootstrap interval."""
    return float(values.mean()), *mean_interval(values, np.random.default_rng(0))


def film(options: Options, recipe: str, columns: list[np.ndarray]) -> None:
    """Show frames (T, H, W, 3) of some episodes beside each other."""
    encoded = encode_video(np.concatenate(columns, axis=2), fps=CONTROL_HZ, encoding=ENCODINGS["compact"])
    write_atomic(options.out / f"{recipe}.mp4", encoded)


# --- text ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def imagine(model: TokenWorldModel, cache: ClipCache, texts: list[str] | None, steps: int) -> torch.Tensor:
    """Imagine each episode on from its first frame, told `texts` and no action: latents (E, steps + 1, h, w, C)."""
    latents = model.encode(torch.from_numpy(cache.frames[cache.starts])[:, None])
    state = model.start(latents, torch.zeros(len(cache), 0, 7), list(range(len(cache))), texts)
    nothing, seen = torch.full((len(cache), 7), torch.nan), [latents[:, 0]]
    for _ in trange(steps, desc="imagining"):
        state, after, _ = model.step(state, nothing)
        seen.append(after)
    return torch.stack(seen, dim=1)


@torch.no_grad()
def seen_done(latents: torch.Tensor, tasks: list[str]) -> np.ndarray:
    """Whether the success head sees each task done in latents (E, T + 1, h, w, C), (E,) bool."""
    heads, calibration = load_heads(DEFAULT_WORLD_MODEL), read_calibration(find_checkpoint(DEFAULT_WORLD_MODEL))
    ids = torch.tensor([heads.instruction_id(task) for task in tasks])
    limits = np.array([calibration.success_threshold_for(task) for task in tasks])
    pose, flags = torch.tensor(NEUTRAL_AGENT_POS).repeat(len(tasks), 1), []
    for t in range(latents.shape[1] - 1):
        still = no_motion(pose)[:, None].expand(-1, 2, -1)  # so the pose is what is seen
        read = heads.read(latents[:, t : t + 2], pose, still, ids, latents[:, 0])
        pose = read.agent_pos
        flags.append(read.success.numpy() >= limits)
    flags += flags[-1:] * (SUCCESS_HOLD_STEPS - 1)
    return np.array([held(each) for each in np.array(flags).T])


@torch.no_grad()
def drawn(model: TokenWorldModel, latents: torch.Tensor, cache: ClipCache) -> np.ndarray:
    """Frames (E, T + 1, H, W, 3) of latents (E, T + 1, h, w, C)."""
    first = torch.from_numpy(cache.frames[cache.starts[: len(latents)]])
    reference = Reference(first, latents[:, 0])
    return np.stack([model.decode(latents[:, t], reference).numpy() for t in range(latents.shape[1])], axis=1)


def text_figures(options: Options, steps: int = 60) -> dict[str, Any]:
    """Success under the right instruction, under one to keep still, and under none."""
    cache, model = opened(options.data, options, [], options.num_episodes), load(options.world_model)
    own = [episode["instruction"] for episode in cache.episodes]
    told = {"told": own, "still": [STILL] * len(own), "untold": None}
    latents = {name: imagine(model, cache, texts, steps) for name, texts in told.items()}
    done = {name: seen_done(each, own) for name, each in latents.items()}
    ahead = np.minimum(np.arange(steps + 1), cache.lengths[:, None] - 1)  # an episode's last frame stays
    real = model.encode(torch.from_numpy(cache.frames[cache.starts[:, None] + ahead]))
    done["real"] = seen_done(real, own)
    columns = [drawn(model, each[:SHOWN], cache) for each in (real, *latents.values())]
    film(options, "text", [np.concatenate(list(each)) for each in columns])
    right = np.concatenate([done["told"], ~done["still"]]).astype(float)
    rates = {f"success_{name}": interval(flags.astype(float)) for name, flags in done.items()}
    return {"instruction_accuracy": interval(right), "episodes": len(cache), **rates}


# --- ways that small networks read off frames ------------------------------------------------------------------------


class WayReader(nn.Module):
    """Reads off two frames how far something has come from one to the other."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        widths = (6, 32, 64, 128, 128)
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.ReLU())
            for a, b in zip(widths, widths[1:], strict=False)
        ]
        side = READER_SIZE // 2 ** len(layers)
        self.net = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, 256), nn.ReLU(), nn.Linear(256, num_outputs)
        )

    def forward(self, first: np.ndarray, frames: np.ndarray) -> torch.Tensor:
        """Map frames (N, H, W, 3) uint8 each to (N, num_outputs)."""
        pair = torch.from_numpy(np.concatenate([first, frames], axis=-1)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.net(nn.functional.interpolate(pair, (READER_SIZE, READER_SIZE), mode="area"))


def train_reader(frames: np.ndarray, cache: ClipCache, ways: np.ndarray, steps: int) -> tuple[WayReader, np.ndarray]:
    """Train on pairs of an episode's first and another frame; returns the reader and the scale of its outputs."""
    torch.manual_seed(0)
    rng, scale = np.random.default_rng(0), ways.std(axis=0) + 1e-9
    reader, first = WayReader(ways.shape[1]), first_rows(cache)
    optimizer = torch.optim.AdamW(reader.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(steps, 2))
    for _ in trange(steps, desc="reader"):
        rows = rng.integers(len(frames), size=READER_BATCH)
        wanted = torch.from_numpy((ways[rows] / scale).astype(np.float32))
        loss = nn.functional.smooth_l1_loss(reader(frames[first[rows]], frames[rows]), wanted, beta=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval(), scale


@torch.no_grad()
def read_ways(
    reader: WayReader, scale: np.ndarray, real: np.ndarray, shown: np.ndarray, cache: ClipCache
) -> np.ndarray:
    """Ways (N, k) in frames (N, H, W, 3) since each episode's real first one."""
    first, parts = first_rows(cache), np.array_split(np.arange(len(shown)), 1 + len(shown) // 256)
    return np.concatenate([reader(real[first[part]], shown[part]).numpy() * scale for part in parts])


# --- views -----------------------------------------------------------------------------------------------------------


def views_figures(options: Options) -> dict[str, Any]:
    """PSNR of the wrist view, imagined with the other one and alone; how far apart the views see the gripper."""
    joint, training = (opened(folder, options, CAMERAS, n) for folder, n in _both(options))
    wrist = opened(options.data, options, CAMERAS[1:], options.num_episodes)
    height = joint.frames.shape[2]  # of a view, square
    pictures = {}
    for name, checkpoint, cache in (("joint", options.world_model, joint), ("alone", options.alone, wrist)):
        model = load(checkpoint)
        pictures[name] = imagined_frames(
            model, model.codec, cache, encoded(checkpoint, cache), cache.columns["actions"]
        )
    truth, end = np.asarray(joint.frames), int(joint.lengths[:SHOWN].sum())
    beside = np.concatenate([truth[:end, :height], pictures["alone"][:end]], axis=1)
    film(options, "views", [truth[:end], pictures["joint"][:end], beside])
    db = {
        "joint": by_episode(joint, psnr(pictures["joint"][:, height:], truth[:, height:])),
        "alone": by_episode(joint, psnr(pictures["alone"], truth[:, height:])),
        "copy": by_episode(joint, psnr(truth[first_rows(joint), height:], truth[:, height:])),
        "third_person": by_episode(joint, psnr(pictures["joint"][:, :height], truth[:, :height])),
    }
    ways = training.columns["agent_pos"][:, :3] - training.columns["agent_pos"][first_rows(training), :3]
    told = np.arange(len(truth)) != first_rows(joint)
    found: dict[str, np.ndarray] = {}
    for part, rows in ((THIRD_PERSON, slice(0, height)), (WRIST, slice(height, None))):
        reader, scale = train_reader(np.asarray(training.frames)[:, rows], training, ways, options.reader_steps)
        for name, shown in (("real", truth), ("imagined", pictures["joint"])):
            found[f"{part}_{name}"] = read_ways(reader, scale, truth[:, rows], shown[:, rows], joint)
        if part == WRIST:
            found["alone"] = read_ways(reader, scale, truth[:, rows], pictures["alone"], joint)
    pairs = {
        "real": (f"{THIRD_PERSON}_real", f"{WRIST}_real"),
        "joint": (f"{THIRD_PERSON}_imagined", f"{WRIST}_imagined"),
        "alone": (f"{THIRD_PERSON}_imagined", "alone"),
    }
    apart = {
        f"apart_{name}_mm": 1000 * float(np.linalg.norm(found[one] - found[other], axis=1)[told].mean())
        for name, (one, other) in pairs.items()
    }
    gain = interval(db["joint"] - db["alone"])
    return {f"{name}_db": float(value.mean()) for name, value in db.items()} | {"gain_db": gain, **apart}


# --- a camera that moves ---------------------------------------------------------------------------------------------


def camera_ways(cache: ClipCache, poses: np.ndarray) -> np.ndarray:
    """How a camera has turned, rad, and moved, m, since its episode's first frame, in that one's frame: (N, 6)."""
    rotation, position = unpack_pose(poses)
    back = np.swapaxes(rotation[first_rows(cache)], -1, -2)
    moved = np.squeeze(back @ (position - position[first_rows(cache)])[..., None], -1)
    return np.concatenate([Rotation.from_matrix(back @ rotation).as_rotvec(), moved], axis=1)


def camera_figures(options: Options) -> dict[str, Any]:
    """Errors of the pose that is seen in imagined frames, told the true path and told that the camera stands still."""
    cache, training = (opened(folder, options, [], n) for folder, n in _both(options))
    model, real = load(options.world_model), encoded(options.world_model, cache)
    ways, truth = camera_ways(training, training.columns[POSES]), np.asarray(cache.frames)
    reader, scale = train_reader(np.asarray(training.frames), training, ways, options.reader_steps)
    wanted, told = camera_ways(cache, cache.columns[POSES]), np.arange(len(truth)) != first_rows(cache)
    pictures = {"real": truth}
    pictures["told"] = imagined_frames(model, model.codec, cache, real, cache.columns["actions"])
    path = cache.columns[POSES]
    cache.columns[POSES] = path[first_rows(cache)]
    pictures["still"] = imagined_frames(model, model.codec, cache, real, cache.columns["actions"])
    cache.columns[POSES] = path
    film(options, "camera", [shown[: int(cache.lengths[:SHOWN].sum())] for shown in pictures.values()])
    pictures["copy"] = truth[first_rows(cache)]
    figures: dict[str, Any] = {"episodes": len(cache)}
    figures["moved_degrees"] = float(np.degrees(np.linalg.norm(wanted[told, :3], axis=1)).mean())
    figures["moved_mm"] = 1000 * float(np.linalg.norm(wanted[told, 3:], axis=1).mean())
    for name, shown in pictures.items():
        off = (read_ways(reader, scale, truth, shown, cache) - wanted)[told]
        figures[f"{name}_degrees"] = float(np.degrees(np.linalg.norm(off[:, :3], axis=1)).mean())
        figures[f"{name}_mm"] = 1000 * float(np.linalg.norm(off[:, 3:], axis=1).mean())
        if name != "real":
            figures[f"{name}_db"] = float(by_episode(cache, psnr(shown, truth)).mean())
    return figures


def _both(options: Options) -> list[tuple[str, int]]:
    """The held-out data and those that readers learn from, and how many episodes of each; 0: all."""
    return [(options.data, options.num_episodes), (options.training, 10 * options.num_episodes)]


RECIPES = {"text": text_figures, "views": views_figures, "camera": camera_figures}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--world-model", required=True, help="post-trained checkpoint")
    parser.add_argument("--data", required=True, help="held-out data set")
    parser.add_argument("--training", default="", help="data set that readers learn from")
    parser.add_argument("--alone", default="", help="checkpoint that imagines the wrist view alone")
    parser.add_argument("--out", type=Path, default=Path("outputs/recipes"), help="folder of caches and films")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    for need, recipes in (("training", ("views", "camera")), ("alone", ("views",))):
        if given.recipe in recipes and not getattr(given, need):
            parser.error(f"{given.recipe} needs --{need}")
    keep_freed_memory()
    sizes = (4, 20) if given.quick else (0, 3000)
    options = Options(given.world_model, given.data, given.training, given.alone, given.out, *sizes)
    figures = RECIPES[given.recipe](options)
    for name, value in figures.items():
        print(f"{name:>24}  {value}")
    print(json.dumps({"recipe": given.recipe, "quick": given.quick, **figures}, allow_nan=False))


if __name__ == "__main__":
    main()
