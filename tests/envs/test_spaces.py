import numpy as np

from envs.spaces import AGENT_POS_HIGH, action_space, latents_observation_space, pixels_observation_space
from wfm_core.data.actions import to_physical


def test_the_action_box_maps_onto_the_physical_limits():
    space = action_space()
    assert space.shape == (7,) and space.dtype == np.float32 and (space.low == -1).all() and (space.high == 1).all()
    np.testing.assert_allclose(to_physical(space.high), [0.05] * 3 + [0.25] * 3 + [1.0])


def test_observations_have_the_keys_and_types_lerobot_expects():
    space = pixels_observation_space()
    assert space["pixels"].shape == (128, 128, 3) and space["pixels"].dtype == np.uint8
    assert space["agent_pos"].shape == (7,) and space["agent_pos"].dtype == np.float32
    assert space["agent_pos"].is_bounded() and AGENT_POS_HIGH[6] == 1.0


def test_latents_take_the_place_of_pixels():
    space = latents_observation_space((8, 8, 6))
    assert set(space) == {"latents", "agent_pos"} and space["latents"].shape == (8, 8, 6)
