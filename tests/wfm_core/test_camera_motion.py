"""The camera's motion, on pictures that are moved by known amounts."""

import numpy as np
import pytest
from moving_pictures import texture, view

from wfm_core.curation.camera_motion import CameraLimits, camera_motion, camera_tags

PICTURE = texture(3, 600, 800)
FPS = 8.0


def measured(height=240, width=320, **motion):
    """What is found out about 10 frames between which the camera moves by this much."""
    frames = np.stack(
        [
            view(PICTURE, **{k: v**t if k == "scale" else v * t for k, v in motion.items()}, size=(height, width))
            for t in range(10)
        ]
    )
    return camera_motion(frames, width / height, FPS)


@pytest.mark.parametrize(
    ("motion", "name", "speed", "tag"),
    [
        ({"x": 5}, "pan", FPS * 5 / 320, "pan_right"),
        ({"x": -5}, "pan", -FPS * 5 / 320, "pan_left"),
        ({"y": 5}, "tilt", FPS * 5 / 320, "tilt_up"),
        ({"y": -5}, "tilt", -FPS * 5 / 320, "tilt_down"),
        ({"scale": 1.02}, "zoom", FPS * np.log(1.02), "zoom_in"),
        ({"scale": 1 / 1.02}, "zoom", -FPS * np.log(1.02), "zoom_out"),
        ({"turn": 0.02}, "roll", FPS * 0.02, "roll_clockwise"),
        ({"turn": -0.02}, "roll", -FPS * 0.02, "roll_counterclockwise"),
    ],
)
def test_each_motion_is_measured_and_named(motion, name, speed, tag):
    measures = measured(**motion)
    assert measures[name] == pytest.approx(speed, rel=0.2) and measures[f"steady_{name}"] > 0.95
    assert camera_tags(measures, CameraLimits()) == [tag]
    others = {"pan", "tilt", "zoom", "roll"} - {name}
    assert all(abs(measures[other]) < 0.02 for other in others)


def test_aspect_does_not_matter():
    wide, high = measured(180, 320, turn=0.02), measured(320, 180, turn=0.02)
    assert wide["roll"] == pytest.approx(0.16, rel=0.2) and high["roll"] == pytest.approx(0.16, rel=0.25)
    assert measured(320, 180, y=3)["tilt"] == pytest.approx(FPS * 3 / 180, rel=0.2)


def test_a_still_camera_is_static_whatever_moves_before_it():
    frames = np.repeat(view(PICTURE, size=(240, 320))[None], 10, axis=0)
    for t, frame in enumerate(frames):
        frame[80:160, 20 * t : 20 * t + 60] = (200, 30, 30)
    assert camera_tags(camera_motion(frames, 4 / 3, FPS), CameraLimits()) == ["static"]
    nothing = camera_motion(np.full((5, 96, 128, 3), 90, np.uint8), 4 / 3, FPS)
    assert set(nothing.values()) == {0.0} and camera_motion(frames[:1], 4 / 3, FPS) == nothing


def test_to_and_fro_is_shaky_and_no_pan():
    shifts = [0, 9, -4, 8, -9, 5, -6, 9, 0, 8, -5, 12]
    frames = np.stack([view(PICTURE, x=shift, size=(240, 320)) for shift in shifts])
    measures = camera_motion(frames, 4 / 3, FPS)
    assert camera_tags(measures, CameraLimits()) == ["shaky"]
    assert camera_tags(measures, CameraLimits(jitter=1.0)) == ["static"]
    assert "pan_right" in camera_tags(measures, CameraLimits(shift=0.01, steady=0.0))
