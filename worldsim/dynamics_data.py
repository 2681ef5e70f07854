"""What dynamics are trained on: clips of any kind, where to look most closely in them, and what is touched."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tasks import TASKS
from tasks.camera import CAMERAS
from tasks.task import Task
from wfm_core.batches import DynamicsBatches, LatentClipBatches, TokenClipBatches
from wfm_core.data.camera_rays import FOCALS, POSES, unpack_pose
from wfm_core.data.clip_cache import ClipCache
from wfm_core.models.autoregressive import AutoregressiveConfig
from wfm_core.models.diffusion_config import DiffusionConfig
from wfm_core.models.motion import Contact
from wfm_core.models.text import load_text_encoder
from wfm_core.models.transformer_config import TransformerConfig
from wfm_core.train import BatchFn

STIR = 0.002  # m in a control step; less is an object that rests
LEAST_COMMAND = 0.006  # m in two control steps; where less is commanded nobody can tell whether the arm obeys
REACH = 0.04  # of the image's side, around a point: what a small object or the fingertips cover


def dynamics_batches(
    config: Any,
    caches: Sequence[ClipCache],
    real: Sequence[np.ndarray],
    imagined: Sequence[np.ndarray | None],
    *,
    grid: int,
    image_every: int,
    action_free: bool,
    **sizes: int,
) -> BatchFn:
    """Build the batches on which dynamics are trained.

    Args:
        config: of the dynamics, of whatever kind.
        caches: clip caches.
        real: per cache, all frames as the tokenizer keeps them.
        imagined: per cache, from `keep_imagined`, or None.
        grid: cells along each side of a frame.
        image_every: every so many batches one of single frames, 0 for none.
        action_free: hide actions, and what only a simulator knows of objects.
        sizes: clip_length, batch_size and seed.
    """
    reads = load_text_encoder(config.text_encoder) if config.text_encoder else None
    shared: dict[str, Any] = {"text_encoder": reads, "action_free": action_free, **sizes}
    if isinstance(config, AutoregressiveConfig | DiffusionConfig):
        watched = [watched_cells(cache, grid) for cache in caches]
        if action_free:
            watched = [np.zeros_like(cells) for cells in watched]
        shared |= {"watched": watched, "imagined": imagined, "space": config.actions}
    if isinstance(config, AutoregressiveConfig):
        contact = [np.full(len(cache.frames), Contact.UNKNOWN) if action_free else contacts(cache) for cache in caches]
        others = (config.num_cameras - 1) * grid**2  # cells of further cameras, whose places nobody knows
        shared["watched"] = [np.pad(cells, ((0, 0), (0, others))) for cells in watched]
        if config.places_weight:
            shared["places"] = [np.full_like(at, np.nan) if action_free else at for at in map(places, caches)]
        if config.closing_share and not action_free:
            shared |= {"sought": [closings(cache) for cache in caches], "sought_share": config.closing_share}
        return DynamicsBatches(caches, real, contact=contact, rays=config.rays, **shared)
    shared["image_every"] = image_every
    if isinstance(config, TransformerConfig):
        return TokenClipBatches(caches, real, **shared)
    if isinstance(config, DiffusionConfig):
        shared["span"] = math.floor(config.rope.longest)
    return LatentClipBatches(caches, real, **shared)


def watched_cells(cache: ClipCache, grid: int) -> np.ndarray:
    """Find the cells in which it shows what becomes of objects: around the gripper, and where each is and first was.

    The gripper and the first places are there whether a grasp succeeds or not. Cells that were watched only when it
    does would teach a model to see success where it cannot tell.

    Args:
        cache: with the label "object_positions" (m), "agent_pos", and the task's name in the episodes' metadata. Where
            one is missing nothing is found.
        grid: cells along each side of a frame.

    Returns:
        (N, grid * grid) bool.
    """
    found = np.zeros((len(cache.frames), grid, grid), dtype=bool)
    centres = (np.arange(grid) + 0.5) / grid
    reach = 0.5 / grid + REACH
    for task, rows, objects in _labelled(cache):
        points = [cache.columns["agent_pos"][rows, :3]]
        for positions in objects:
            points += [positions, np.broadcast_to(positions[0], positions.shape)]
        for place in points:
            u, v = _seen_at(cache, rows, task.scene, place).T
            near_u, near_v = (np.abs(at[:, None] - centres) < reach for at in (u, v))
            found[rows] |= near_v[:, :, None] & near_u[:, None, :]
    return found.reshape(len(found), -1)


def places(cache: ClipCache) -> np.ndarray:
    """Tell where in the image the gripper and the objects are seen, and how high they are.

    Args:
        cache: as for `watched_cells`. Where a label is missing nothing is known.

    Returns:
        (N, K, 3) float32, the gripper first: fractions of the image's width and height, and m; NaN where not known.
    """
    most = 1 + max(len(task.objects) for task in TASKS.values())
    found = np.full((len(cache.frames), most, 3), np.nan, np.float32)
    for task, rows, objects in _labelled(cache):
        for k, point in enumerate([cache.columns["agent_pos"][rows, :3], *objects]):
            found[rows, k] = np.concatenate([_seen_at(cache, rows, task.scene, point), point[:, 2:]], axis=1)
    return found


def _labelled(cache: ClipCache) -> Iterator[tuple[Task, slice, np.ndarray]]:
    """Of the episodes whose task is known: this, their rows, and where its objects are, (K, T, 3) m."""
    if "object_positions" not in cache.columns:
        return
    for start, length, episode in zip(cache.starts, cache.lengths, cache.episodes, strict=True):
        task = TASKS.get(episode.get("meta", {}).get("task_name"))
        if task is not None:
            rows = slice(start, start + length)
            positions = cache.columns["object_positions"][rows].reshape(length, -1, 3)
            yield task, rows, positions[:, : len(task.objects)].swapaxes(0, 1)


def _seen_at(cache: ClipCache, rows: slice, scene: str, points: np.ndarray) -> np.ndarray:
    """Image fractions (T, 2) of points (T, 3), m, in frames of the scene's own camera, or of one that moves."""
    if POSES not in cache.columns:
        return CAMERAS[scene].project(points)
    rotation, position = unpack_pose(cache.columns[POSES][rows])
    local = np.squeeze((points - position)[:, None] @ rotation, 1)
    return 0.5 + local[:, :2] / local[:, 2:] * cache.columns[FOCALS][rows]


def contacts(cache: ClipCache) -> np.ndarray:
    """Tell what robot and world do to each other in each frame.

    An object is held or the arm is blocked, or both; or else an object has moved since the frame before.

    Args:
        cache: with the labels "grasped" (an object's index, -1 for none) and "object_positions" (m). Where one is
            missing nothing is known. An arm whose pose was not recorded is never called blocked.

    Returns:
        (N,) uint8 `Contact`.
    """
    if not {"grasped", "object_positions"} <= cache.columns.keys():
        return np.full(len(cache.frames), Contact.UNKNOWN, dtype=np.uint8)
    positions = cache.columns["object_positions"].reshape(len(cache.frames), -1, 3)
    step = np.linalg.norm(np.diff(positions, axis=0, prepend=positions[:1]), axis=-1).max(axis=1)
    step[cache.starts] = 0
    found = np.where(step > STIR, Contact.MOVED, Contact.FREE)
    held, blocked = cache.columns["grasped"].reshape(-1) >= 0, stands_still(cache)
    found[blocked], found[held], found[held & blocked] = Contact.BLOCKED, Contact.HELD, Contact.HELD_BLOCKED
    return found.astype(np.uint8)


def closings(cache: ClipCache) -> np.ndarray:
    """Find the frames in which the hand is told to close and was told to be open a frame before, (N,) bool."""
    opened = cache.columns["actions"][:, -1] > 0.5
    found = ~opened & np.concatenate([opened[:1], opened[:-1]])
    found[cache.starts] = False
    return found


def stands_still(cache: ClipCache) -> np.ndarray:
    """Whether the arm went less than half of the way commanded in the last two steps, (N,) bool.

    Two steps, because an arm that follows late still owes a part of the command before the last.
    """
    rows = np.arange(len(cache.frames))
    second = rows - np.repeat(cache.starts, cache.lengths) < 2  # less than two steps are behind it
    moves, hand = cache.columns["actions"][:, :3], cache.columns["agent_pos"][:, :3]
    commanded = moves[rows - 1] + moves[rows - 2]
    missing = np.linalg.norm(commanded - (hand - hand[rows - 2]), axis=1)
    length = np.linalg.norm(commanded, axis=1)
    return ~second & (length > LEAST_COMMAND) & (missing > 0.5 * length)
