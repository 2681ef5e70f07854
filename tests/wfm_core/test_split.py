"""Splitting: cuts are where they were made, clips have no gaps, and none is too long."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from moving_pictures import shot, texture, view, write_video

from wfm_core.curation.split import TEXT_LINES, SplitSettings, split_video
from wfm_core.data.video_stream import stream_video


def split(tmp_path, frames, **settings):
    path = write_video(tmp_path / "v.mp4", frames)
    return list(split_video(stream_video(path), SplitSettings(**settings)))


def test_cuts_are_found_where_they_are(tmp_path):
    lengths = [12, 9, 20, 7, 15]
    clips = split(tmp_path, np.concatenate([shot(seed, length) for seed, length in enumerate(lengths)]))
    assert [clip.num_frames for clip in clips] == lengths
    assert [clip.first for clip in clips] == [0, 12, 21, 41, 48]
    assert [clip.start_s for clip in clips] == pytest.approx([0, 1.2, 2.1, 4.1, 4.8])
    assert [clip.end_s for clip in clips] == pytest.approx([1.2, 2.1, 4.1, 4.8, 6.3])
    whole = split(tmp_path, np.concatenate([shot(0, 12), shot(1, 9)]), shot_change=float("inf"))
    assert [clip.num_frames for clip in whole] == [21]


def test_a_camera_that_pans_is_no_cut(tmp_path):
    picture = texture(0)
    assert len(split(tmp_path, np.stack([view(picture, x=6 * t) for t in range(30)]))) == 1


def test_long_shots_become_clips_of_bounded_length_and_are_measured_at_a_bounded_rate(tmp_path):
    clips = split(tmp_path, shot(0, 55, step=0.5), longest=2.0, fps=5.0)
    assert [(clip.first, clip.num_frames) for clip in clips] == [(0, 20), (20, 20), (40, 15)]
    assert [len(clip.frames) for clip in clips] == [10, 10, 8] and clips[0].frames.shape[1:] == (96, 128, 3)
    assert [len(clip.large) for clip in clips] == [2, 2, 2] and clips[0].large.shape[1:] == (TEXT_LINES, 640, 3)
    assert (clips[0].height, clips[0].width, clips[0].fps) == (120, 160, 10)
    (slow,) = split(tmp_path, shot(0, 6), fps=8.0)
    assert len(slow.frames) == 6
    wild = [replace(moment, second=1e-3 * moment.index) for moment in stream_video(tmp_path / "v.mp4")] * 9
    wild = [replace(moment, index=k) for k, moment in enumerate(wild)]
    clips = list(split_video(wild, SplitSettings(longest=1.0, fps=8.0, shot_change=float("inf"))))
    assert [clip.num_frames for clip in clips] == [16, 16, 16, 6]  # whatever the times say


def test_settings_and_the_library_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="longest must be above 0, got 0"):
        SplitSettings(longest=0)
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(ImportError, match=r"needs scenedetect-headless: pip install 'worldsim\[curate\]'"):
        list(split_video([], SplitSettings()))
