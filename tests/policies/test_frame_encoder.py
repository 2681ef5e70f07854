import numpy as np
import pytest
import torch

from policies.bc import BCConfig, BCNetwork
from policies.frame_encoder import KeypointEncoder, load_frame_encoder
from wfm_core.checkpoint import as_json, load_tokenizer, save_weights, write_config
from wfm_core.tokenizers.patch import PatchTokenizer, PatchTokenizerConfig, to_float

INSTRUCTIONS = ["go", "stop"]


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def test_keypoints_of_a_stored_network(tmp_path, pixels):
    torch.manual_seed(0)
    BCNetwork(BCConfig(INSTRUCTIONS, image_size=32, width=4, num_keypoints=5)).save(tmp_path / "sub" / "net")
    encoder = load_frame_encoder({"kind": "keypoints", "path": "net"}, tmp_path / "sub")
    encoded = encoder.encode(pixels, "stop")
    assert isinstance(encoder, KeypointEncoder)
    assert encoded.shape == (3, encoder.dim) == (3, 3 * 5 + 2)
    assert encoded[:, -2:].tolist() == [[0, 1]] * 3
    assert np.abs(encoded[:, :10]).max() <= 1
    np.testing.assert_allclose(encoder.encode(pixels[1:2], "stop"), encoded[1:2], atol=1e-6)


def test_latents_of_a_tokenizer(tmp_path, pixels):
    torch.manual_seed(0)
    config = PatchTokenizerConfig(image_size=32)
    write_config(tmp_path, {"kind": "autoregressive", "tokenizer": as_json(config)})
    save_weights(tmp_path, "tokenizer", PatchTokenizer(config).state_dict())
    spec = {"kind": "latents", "world_model": str(tmp_path), "instructions": INSTRUCTIONS}
    encoder = load_frame_encoder(spec, tmp_path)
    with torch.no_grad():
        latents = load_tokenizer(tmp_path).encode(to_float(torch.from_numpy(pixels)))
    encoded = encoder.encode(pixels, "go")
    np.testing.assert_allclose(encoded[:, :-2], latents.flatten(1), atol=1e-6)
    assert encoded[:, -2:].tolist() == [[1, 0]] * 3
    assert encoder.dim == encoded.shape[1]


def test_a_wrong_description_is_named(tmp_path):
    with pytest.raises(ValueError, match="worldsim.json: kind must be .* got 'dino'"):
        load_frame_encoder({"kind": "dino"}, tmp_path)
    with pytest.raises(ValueError, match="worldsim.json: environment_state lacks 'path'"):
        load_frame_encoder({"kind": "keypoints"}, tmp_path)
