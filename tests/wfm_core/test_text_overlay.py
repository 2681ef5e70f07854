"""Burnt-in text, in several fonts, sizes and colours; what moves or is mere texture is none."""

import cv2
import numpy as np
import pytest
from moving_pictures import texture, view

from wfm_core.curation.text_overlay import count_letters

SIZE = (480, 640)


def scene(num_frames):
    """A block that moves before a soft slope of light."""
    slope = np.add.outer(np.linspace(60, 120, SIZE[0]), np.linspace(0, 60, SIZE[1]))
    frames = np.repeat(slope.astype(np.uint8)[None, ..., None], num_frames, axis=0) * np.ones(3, np.uint8)
    for t, frame in enumerate(frames):
        frame[100:260, 60 * t : 60 * t + 120] = (40, 70, 200)
    return frames


def written(frames, text, font=cv2.FONT_HERSHEY_SIMPLEX, scale=1.0, color=(255, 255, 255), place=(40, 440), every=1):
    frames = frames.copy()
    for frame in frames[::every]:
        cv2.putText(frame, text, place, font, scale, color, 2, cv2.LINE_AA)
    return frames


@pytest.mark.parametrize("font", [cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX])
@pytest.mark.parametrize(("scale", "color"), [(0.8, (255, 255, 255)), (1.5, (255, 255, 0)), (1.0, (0, 0, 0))])
def test_captions_are_found(font, scale, color):
    frames = scene(4)
    assert count_letters(frames) < 4
    assert count_letters(written(frames, "pick up the spoon", font, scale, color)) >= 5


def test_red_on_grey_of_the_same_luma_is_found():
    grey = np.full((3, *SIZE, 3), 118, np.uint8)
    assert cv2.cvtColor(np.uint8([[[255, 60, 60]]]), cv2.COLOR_RGB2GRAY)[0, 0] == 118
    assert count_letters(written(grey, "SUCCESS", color=(255, 60, 60))) >= 7


def test_letters_are_counted_along_a_row():
    grey = np.full((1, *SIZE, 3), 60, np.uint8)
    assert count_letters(written(grey, "HOLE")) == 4
    assert count_letters(written(written(grey, "HOLE"), "SPOONS", place=(40, 100))) == 6  # the longer one of two
    assert count_letters(written(grey, "H")) == 0


def test_what_is_there_only_now_and_then_is_no_overlay():
    frames = scene(5)
    assert count_letters(written(frames, "pick up the spoon", every=3)) < 4  # in two of five


def test_texture_is_no_text():
    noise = np.random.default_rng(0).integers(0, 255, (2, *SIZE, 3)).astype(np.uint8)
    soft = np.stack([view(texture(seed), size=SIZE, scale=2) for seed in range(2)])
    assert count_letters(np.repeat(noise[:1], 3, axis=0)) < 4 and count_letters(soft) < 4
