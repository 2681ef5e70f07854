import pytest
import torch

from wfm_core.models.scripted import ScriptedConfig, ScriptedWorldModel
from wfm_core.world_model import Reference


def start(model, points, seeds=None):
    latents = torch.tensor(points, dtype=torch.float32).view(-1, 1, 1, 1, 3)
    return model.start(latents, torch.zeros(len(points), 0, 7), seeds or [0] * len(points))


def test_the_point_moves_by_the_action():
    model = ScriptedWorldModel()
    state = start(model, [[0.0, 0.1, 0.0], [0.0, 0.0, 0.0]])
    action = torch.tensor([[0.05, -0.02, 0.01, 9, 9, 9, 1], [0.0] * 7])
    before = {name: value.clone() for name, value in state.items()}
    after, latents, uncertainty = model.step(state, action)
    torch.testing.assert_close(latents[:, 0, 0], torch.tensor([[0.05, 0.08, 0.01], [0.0, 0.0, 0.0]]))
    assert uncertainty.tolist() == [0, 0] and after["step"].tolist() == [1, 1]
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_uncertainty_is_the_distance_beyond_what_is_trusted():
    model = ScriptedWorldModel(ScriptedConfig(trusted_radius=0.3))
    _, _, uncertainty = model.step(start(model, [[0.48, 0.0, 0.0]]), torch.tensor([[0.02, 0, 0, 0, 0, 0, 0]]))
    torch.testing.assert_close(uncertainty, torch.tensor([0.2]))


def test_frames_on_the_pixel_grid_survive_encoding():
    model = ScriptedWorldModel(ScriptedConfig(frame_size=4))
    frames = torch.tensor([0, 127, 255], dtype=torch.uint8).expand(2, 1, 4, 4, 3)
    latents = model.encode(frames)
    torch.testing.assert_close(latents[0, 0, 0, 0], torch.tensor([-0.508, 0.0, 0.512]))
    reference = Reference(frames[:, 0], latents[:, 0])
    assert torch.equal(model.decode(latents[:, 0], reference), frames[:, 0])
    assert model.decode(torch.full((1, 1, 1, 3), 9.0), reference).eq(255).all()


def test_noise_is_the_rows_own():
    model = ScriptedWorldModel(ScriptedConfig(noise=0.01))
    still = torch.zeros(3, 7)
    together, latents, _ = model.step(start(model, [[0.0] * 3] * 3, [4, 5, 4]), still)
    assert torch.equal(latents[0], latents[2]) and not torch.equal(latents[0], latents[1])
    _, second, _ = model.step(together, still)
    assert not torch.allclose(second[0] - latents[0], latents[0])
    _, alone, _ = model.step(start(model, [[0.0] * 3], [5]), still[:1])
    assert torch.equal(alone[0], latents[1])


def test_wrong_shapes_are_named():
    model = ScriptedWorldModel()
    with pytest.raises(ValueError, match=r"\(1, 1, 7\), got \(1, 0, 7\)"):
        model.start(torch.zeros(1, 2, 1, 1, 3), torch.zeros(1, 0, 7), [0])
    with pytest.raises(ValueError, match="1 rows, got 2"):
        start(model, [[0.0] * 3], [0, 1])
