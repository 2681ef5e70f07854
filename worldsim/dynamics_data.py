"""What the dynamics should look at most closely."""

import numpy as np

from tasks import TASKS
from tasks.camera import CAMERAS
from wfm_core.data.clip_cache import ClipCache

OBJECT_REACH = 0.04  # of the image's side, around an object's centre: what a small object covers, and its shadow's root


def object_cells(cache: ClipCache, grid: int) -> np.ndarray:
    """Find the cells of each frame in which the objects stand that can move, by projecting their centres.

    Args:
        cache: with the label "object_positions" (m), and the task's name in the episodes' metadata. Where either is
            missing nothing is found.
        grid: cells along each side of a frame.

    Returns:
        (N, grid * grid) bool.
    """
    found = np.zeros((len(cache.frames), grid, grid), dtype=bool)
    centres = (np.arange(grid) + 0.5) / grid
    reach = 0.5 / grid + OBJECT_REACH
    for start, length, episode in zip(cache.starts, cache.lengths, cache.episodes, strict=True):
        task = TASKS.get(episode.get("meta", {}).get("task_name"))
        if task is None or "object_positions" not in cache.columns:
            continue
        rows = slice(start, start + length)
        positions = cache.columns["object_positions"][rows].reshape(length, -1, 3)
        for k, item in enumerate(task.objects):
            if not (item.ghost or item.fixed):
                u, v = CAMERAS[task.scene].project(positions[:, k]).T
                near = [np.abs(at[:, None] - centres) < reach for at in (u, v)]
                found[rows] |= near[1][:, :, None] & near[0][:, None, :]
    return found.reshape(len(found), -1)
