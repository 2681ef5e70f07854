"""Ensembles: members that go their own ways, and how far apart they are."""

import pytest
import torch

from wfm_core.checkpoint import load_patch_tokenizer, load_world_model, world_digest, write_config
from wfm_core.ensemble import Ensemble
from wfm_core.world_model import Reference, merge_rows, repeat_rows
from worldsim.heads import load_heads


@pytest.fixture(scope="module")
def model(tiny_diffusion):
    return load_world_model(tiny_diffusion, dtype=torch.float32)


def begin(model, seeds=(3, 4)):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(seeds), 1, 2, 2, 3, generator=generator)
    return model.start(latents, torch.zeros(len(seeds), 0, 7), seeds), 0.02 * torch.rand(len(seeds), 5, 7)


def test_an_ensemble_imagines_what_its_first_member_does(model):
    both = Ensemble([model, model])
    state, actions = begin(both)
    alone, _ = begin(model)
    other, _ = begin(model, (3 + 2**32, 4 + 2**32))
    for t in range(3):
        state, made, uncertainty = both.step(state, actions[:, t])
        alone, expected, _ = model.step(alone, actions[:, t])
        other, second, _ = model.step(other, actions[:, t])
        assert torch.equal(made, expected)
        apart = (made - second).square().mean(dim=(1, 2, 3)).sqrt() / 2  # of two from their mean
        torch.testing.assert_close(uncertainty, apart)
        assert (uncertainty > 1e-3).all()
    frames = torch.randint(256, (2, 1, 32, 32, 3), dtype=torch.uint8)
    latents = both.encode(frames)
    assert torch.equal(latents, model.encode(frames)) and both.frame_shape == (32, 32, 3)
    reference = Reference(frames[:, 0], latents[:, 0])
    assert torch.equal(both.decode(made, reference), model.decode(made, reference))


def test_states_of_an_ensemble_are_values(model):
    both = Ensemble([model, model, model])
    state, actions = begin(both)
    copy = {name: value.clone() for name, value in state.items()}
    after, made, _ = both.step(state, actions[:, 0])
    assert state.keys() == copy.keys() == after.keys() and all(torch.equal(state[k], copy[k]) for k in copy)
    assert all(len(value) == 2 for value in after.values())
    _, twice, doubts = both.step(repeat_rows(state, 2), actions[:, 0].repeat_interleave(2, dim=0))
    torch.testing.assert_close(twice[::2], made)
    mixed = merge_rows(torch.tensor([True, False]), state, after)
    _, again, _ = both.step(mixed, actions[:, 0])
    torch.testing.assert_close(again[:1], made[:1])


def test_members_must_fit(model, tiny_checkpoint):
    with pytest.raises(ValueError, match="needs at least 2 members, got 1"):
        Ensemble([model])

    class Other:
        latent_shape, frame_shape = (2, 2, 5), (32, 32, 3)

    with pytest.raises(ValueError, match=r"latents of one shape, got \[\(2, 2, 3\), \(2, 2, 5\)\]"):
        Ensemble([model, Other()])


def test_a_checkpoint_may_be_an_ensemble_of_others(tiny_diffusion, tmp_path):
    names = [str(tiny_diffusion)] * 3
    write_config(tmp_path, {"kind": "ensemble", "members": names, "digests": [world_digest(name) for name in names]})
    made = load_world_model(tmp_path, dtype=torch.float32)
    assert isinstance(made, Ensemble) and len(made.members) == 3
    assert made.members[0] is made.members[2]  # the same weights are not loaded again
    with pytest.raises(ValueError, match="must be as when the ensemble was put together; do so again"):
        write_config(tmp_path, {"kind": "ensemble", "members": names, "digests": ["other"] * 3})
        load_world_model(tmp_path)
    assert load_patch_tokenizer(tmp_path).latent_shape == load_heads(tmp_path).config.latent_shape == (2, 2, 3)
