import numpy as np
import pytest

from tasks import TASKS
from tasks.camera import CAMERAS
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import Episode
from worldsim.dynamics_data import object_cells


def make_episode(task_name: str, positions: np.ndarray | None) -> Episode:
    labels = {"grasped": np.full(3, -1)}
    return Episode(
        frames=np.zeros((3, 32, 32, 3), dtype=np.uint8),
        actions=np.zeros((2, 7), dtype=np.float32),
        agent_pos=None,
        instruction="do",
        episode_id=task_name,
        convention="commanded",
        command_lag=0,
        labels=labels if positions is None else labels | {"object_positions": positions},
        meta={"task_name": task_name},
    )


@pytest.mark.parametrize("name", ["stack_cubes", "put_eggplant_in_basket", "push_cube"])
def test_cells_around_the_projected_centres_of_what_can_move(name, tmp_path):
    task = TASKS[name]
    camera = CAMERAS[task.scene]
    rng = np.random.default_rng(0)
    uv = rng.uniform(0.1, 0.9, (3, 3, 2))
    positions = camera.unproject(uv, 0.03).astype(np.float32)
    cache = build_clip_cache([make_episode(name, positions.reshape(3, 9))], tmp_path / "cache")
    found = object_cells(cache, 8)
    assert found.shape == (3, 64) and found.dtype == bool
    for t in range(3):
        expected = np.zeros((8, 8), dtype=bool)
        for k, item in enumerate(task.objects):
            if not (item.fixed or item.ghost):
                u, v = uv[t, k]
                expected[int(v * 8), int(u * 8)] = True
                near = (np.abs((np.arange(8) + 0.5) / 8 - v) < 0.1025)[:, None] & (
                    np.abs((np.arange(8) + 0.5) / 8 - u) < 0.1025
                )
                expected |= near
        np.testing.assert_array_equal(found[t].reshape(8, 8), expected)


def test_nothing_is_found_where_nothing_is_known(tmp_path):
    unknown = build_clip_cache([make_episode("juggle", np.ones((3, 9), dtype=np.float32))], tmp_path / "a")
    unlabelled = build_clip_cache([make_episode("push_cube", None)], tmp_path / "b")
    assert not object_cells(unknown, 8).any() and not object_cells(unlabelled, 8).any()
