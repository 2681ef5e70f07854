"""An episode refuses parts that do not go together, and its views follow its frames."""

from dataclasses import replace

import numpy as np
import pytest

from wfm_core.data.episode import Episode


def make_episode(**changes) -> Episode:
    fields = {
        "frames": np.zeros((4, 8, 6, 3), np.uint8),
        "actions": np.zeros((3, 7), np.float32),
        "agent_pos": np.zeros((4, 7), np.float32),
        "instruction": "",
        "episode_id": "7",
        "convention": "commanded",
        "command_lag": 0,
        "views": {"wrist": np.full((4, 10, 10, 3), 9, np.uint8)},
    }
    return Episode(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": np.zeros((3, 8, 6, 3), np.uint8)}, r"episode 7: 3 actions need 4 frames, got 3 \(frames\)"),
        ({"views": {"wrist": np.zeros((5, 8, 6, 3), np.uint8)}}, r"3 actions need 4 frames, got 5 \(wrist\)"),
        ({"frames": np.zeros((4, 8, 6), np.uint8)}, r"frames must be uint8 \(T \+ 1, H, W, 3\), got uint8 \(4, 8, 6\)"),
        ({"views": {"wrist": np.zeros((4, 8, 6, 3))}}, "wrist must be uint8 .* got float64"),
        ({"views": {"": np.zeros((4, 8, 6, 3), np.uint8)}}, "views must have names of letters.*got"),
        ({"views": {"a/b": np.zeros((4, 8, 6, 3), np.uint8)}}, r"views must have names of letters.*'a/b'"),
        ({"views": {"frames": np.zeros((4, 8, 6, 3), np.uint8)}}, "other than frames"),
        ({"labels": {"success": np.zeros(3, bool)}}, r"label 'success' must have 4 rows"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_episode(**changes)


def test_frames_are_squashed_and_not_cut():
    frames = np.zeros((4, 24, 32, 3), np.uint8)
    frames[:, :, :4, 0] = frames[:, :, -4:, 2] = 250  # red at the left, blue at the right: gone in the middle square
    small = make_episode(frames=frames).resized(8, 8).frames
    assert small.shape == (4, 8, 8, 3)
    np.testing.assert_array_equal(small[:, :, 0], np.broadcast_to([250, 0, 0], (4, 8, 3)))
    np.testing.assert_array_equal(small[:, :, 7], np.broadcast_to([0, 0, 250], (4, 8, 3)))
    assert not small[:, :, 1:7].any()


def test_views_are_resized_with_the_frames():
    small = make_episode().resized(4, 3)
    assert small.frames.shape == small.views["wrist"].shape == (4, 4, 3, 3)
    assert (small.views["wrist"] == 9).all() and not small.frames.any()
    assert replace(small, views={}).views == make_episode(views={}).views == {}
