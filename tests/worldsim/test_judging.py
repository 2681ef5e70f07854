import numpy as np
import pytest

from worldsim.evaluate import Trace
from worldsim.judging import judge
from worldsim.simulator import Calibration, scripted_world_sim


def trace(xs):
    """The scripted model reads the point off the colour: 127 is 0 m, a level is 4 mm; success is x = 0.2 m."""
    frames = np.full((len(xs), 128, 128, 3), 127, np.uint8)
    frames[..., 0] = (127 + np.round(np.array(xs) / 0.004))[:, None, None]
    zeros = np.zeros((len(xs), 7), np.float32)
    return Trace(frames, zeros, zeros[1:])


@pytest.mark.parametrize(
    ("xs", "solved"),
    [
        ([0.0, 0.1, 0.2, 0.2, 0.2], True),
        ([0.0, 0.2, 0.2, 0.2, 0.0], True),  # it counts although it is undone later
        ([0.0, 0.1, 0.2, 0.2, 0.0], False),  # held for two steps of three
        ([0.0, 0.1, 0.1, 0.2], True),  # the episode was cut there
        ([0.2, 0.2, 0.0, 0.2, 0.2, 0.0], False),  # not in a row
        ([0.0, 0.0, 0.0, 0.0, 0.0], False),
    ],
)
def test_success_must_hold(xs, solved):
    assert judge(scripted_world_sim(), trace(xs), "any") is solved


def test_an_instruction_is_judged_by_its_own_threshold():
    sim = scripted_world_sim()
    never = 1.1  # no probability reaches it
    sim.calibration = Calibration(success_thresholds={"this one": never})
    there = trace([0.0, 0.1, 0.2, 0.2, 0.2])
    assert judge(sim, there, "any") and not judge(sim, there, "this one")
