import numpy as np
import pytest
import torch

from policies import load_policy
from policies.actor import ActorPredictor
from policies.wfm_policy import NOTES, FrameTrunk, WFMPolicyConfig, WFMPolicyNetwork
from wfm_core.checkpoint import build_config, load_patch_tokenizer, load_weights, read_part
from wfm_core.models.autoregressive import Autoregressive, AutoregressiveConfig
from wfm_core.models.motion import Contact, Motion
from wfm_core.models.places import PlaceHead
from wfm_core.tokenizers.patch import to_float

INSTRUCTIONS = ["push the cube", "stack the cubes"]


@pytest.fixture
def network(tiny_checkpoint):
    torch.manual_seed(0)
    config = WFMPolicyConfig(INSTRUCTIONS, world_model=str(tiny_checkpoint), num_keypoints=4, hidden_dim=16)
    return WFMPolicyNetwork(config).born()


def obs(num_rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 256, (num_rows, 32, 32, 3), dtype=np.uint8),
        "agent_pos": rng.uniform(-0.3, 0.3, (num_rows, 7)).astype(np.float32),
    }


def latents(network: WFMPolicyNetwork, pixels: np.ndarray) -> torch.Tensor:
    return load_patch_tokenizer(network.view.folder).encode(to_float(torch.from_numpy(pixels)))


def test_the_trunk_is_the_world_models_when_nothing_is_known_but_the_frame(tiny_checkpoint, network):
    sizes = build_config(AutoregressiveConfig, read_part(tiny_checkpoint, "dynamics"), tiny_checkpoint)
    whole = load_weights(Autoregressive(sizes), tiny_checkpoint, "dynamics")
    seen = latents(network, obs(3)["pixels"])
    unknown, first = torch.full((3, 1, 7), torch.nan), torch.zeros(3, 1, dtype=torch.int64)
    motion = Motion(unknown, unknown, unknown[..., :6], first, first + Contact.UNKNOWN)
    expected = whole.trunk(whole.one_hot(whole.fsq.to_indices(seen).flatten(1, 2)[:, None]), motion)[:, 0]
    torch.testing.assert_close(network.trunk(seen), expected)
    fewer = FrameTrunk(sizes, 1)
    fewer.born_from(dict(whole.state_dict()))
    assert len(fewer.layers) == 1 and (fewer(seen) - expected).abs().max() > 1e-3


def test_a_trunk_of_patches_reads_them_as_the_world_model_does():
    sizes = AutoregressiveConfig(levels=(4, 3), grid=4, groups=1, width=8, num_heads=2, num_layers=2, time_layers=(1,),
                                 refiner_layers=1, patch_size=2)  # fmt: skip
    torch.manual_seed(0)
    whole, trunk = Autoregressive(sizes), FrameTrunk(sizes, 2)
    trunk.born_from(dict(whole.state_dict()))
    tokens = torch.randint(0, 3, (3, 16, 2))
    unknown, first = torch.full((3, 1, 7), torch.nan), torch.zeros(3, 1, dtype=torch.int64)
    motion = Motion(unknown, unknown, unknown[..., :6], first, first + Contact.UNKNOWN)
    expected = whole.trunk(whole.one_hot(tokens[:, None]), motion)[:, 0]
    torch.testing.assert_close(trunk(whole.fsq.to_codes(tokens).unflatten(1, (4, 4))), expected)
    assert expected.shape == (3, 4, 8)


def test_it_sees_latents_or_encodes_pixels(network):
    batch = obs(3)
    predictor = ActorPredictor(network)
    chunk = predictor.predict(batch, INSTRUCTIONS[0])
    assert chunk.shape == (3, 6, 7) and np.abs(chunk).max() <= 1
    imagined = {"latents": latents(network, batch["pixels"]).detach().numpy(), "agent_pos": batch["agent_pos"]}
    np.testing.assert_allclose(predictor.predict(imagined, INSTRUCTIONS[0]), chunk, atol=1e-6)
    rows = [predictor.predict({k: v[i : i + 1] for k, v in batch.items()}, INSTRUCTIONS[0])[0] for i in range(3)]
    np.testing.assert_allclose(chunk, np.stack(rows), atol=1e-5)
    with pytest.raises(ValueError, match=r"pixels must be \(B, \(32, 32, 3\)\)"):
        predictor.predict({k: v[:, :16] if k == "pixels" else v for k, v in batch.items()}, INSTRUCTIONS[0])


def test_a_keypoint_is_where_its_cell_is(network):
    network.within.weight.data.zero_()
    network.within.bias.data.zero_()
    network.queries.weight.data *= 1e3  # each keypoint looks at one cell
    looked = network.look(latents(network, obs(1)["pixels"]))
    seen = network.see(looked, torch.ones(1, network.config.instruction_dim))[0]
    places, sure, notes = seen[:12].view(4, 3), seen[12:16], seen[16:32].view(4, NOTES)
    assert sure.min() > 0.99
    assert set(places[:, :2].abs().flatten().tolist()) <= {0.5}  # centres of 2 x 2 cells
    assert not places[:, 2].any()
    cells = 2 * (places[:, 1] > 0) + (places[:, 0] > 0)
    torch.testing.assert_close(notes, network.notes(network.norm(looked))[0, cells], atol=0.02, rtol=0)


def test_a_keypoint_is_where_the_place_head_says_a_thing_is(network):
    head = network.trunk.place_head = PlaceHead(network.trunk.width, 1)
    for value in (network.queries.weight, network.queries.bias):
        value.data.zero_()
    head[1].bias.data.view(2, 4)[:, 0] = -40.0  # nothing is anywhere
    looked = network.look(latents(network, obs(1)["pixels"])).repeat(2, 1, 1)
    assert looked.shape[2] == network.trunk.width + 8
    said = looked[..., -8:].view(2, -1, 2, 4)
    said[0, 1, 1] = torch.tensor([40.0, 0.25, -0.5, 0.7])  # a thing in the upper right cell, and a gripper below it
    said[0, 3, 0] = torch.tensor([40.0, 0.0, 0.0, 0.2])
    said[1] = said[0]
    embedding = torch.zeros(2, network.config.instruction_dim)
    network.kind_affinity.data[0] = torch.tensor([0.0, 30.0])  # the first keypoint looks for things, the second not
    network.kind_affinity.data[1] = torch.tensor([30.0, 0.0])
    seen = network.see(looked, embedding)[0]
    places, sure = seen[:12].view(4, 3), seen[12:]
    torch.testing.assert_close(places[0], torch.tensor([0.5 + 0.25, -0.5 - 0.5, 0.7]))
    torch.testing.assert_close(places[1], torch.tensor([0.5, 0.5, 0.2]))
    torch.testing.assert_close(places[2], (places[0] + places[1]) / 2)
    torch.testing.assert_close(sure, torch.tensor([1.0, 1.0, 0.5, 0.5]))


def test_it_loads_as_a_policy(network, tmp_path):
    network.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    network.save(tmp_path)
    policy = load_policy(tmp_path)
    policy.reset(2, instruction=INSTRUCTIONS[1], seeds=[0, 1])
    np.testing.assert_array_equal(policy.act(obs(2)), ActorPredictor(network).predict(obs(2), INSTRUCTIONS[1])[:, 0])


def test_other_families_are_refused(tiny_transformer):
    with pytest.raises(ValueError, match="kind autoregressive, got 'transformer'"):
        WFMPolicyNetwork(WFMPolicyConfig(INSTRUCTIONS, world_model=str(tiny_transformer)))
