import numpy as np
import pytest
import torch

from wfm_core.tokenizers.discrete import DiscreteTokenizer, DiscreteTokenizerConfig, to_float, to_uint8

CONFIG = DiscreteTokenizerConfig(
    image_size=32,
    patch=8,
    levels=(7, 5, 4),
    encoder_dim=24,
    encoder_blocks=2,
    decoder_dims=(16, 8),
    decoder_blocks=(1, 1),
)


@pytest.fixture
def tokenizer() -> DiscreteTokenizer:
    torch.manual_seed(0)
    return DiscreteTokenizer(CONFIG)


def some_frames(number: int) -> torch.Tensor:
    return torch.randint(0, 256, (number, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_every_pixel_value_survives_the_round_trip():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    floats = to_float(frames)
    assert floats.shape == (1, 3, 16, 16) and floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), frames)
    assert to_uint8(torch.tensor([-1.5, 1.5]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]
    assert torch.equal(to_float(some_frames(2))[1, 2], some_frames(2)[1, :, :, 2] / 127.5 - 1)


def test_a_patch_that_changes_changes_its_own_tokens_only(tokenizer):
    frames = some_frames(6)
    changed = frames.clone()
    changed[:, 8:16, 24:32] = 255 - changed[:, 8:16, 24:32]
    before, after = tokenizer.encode(to_float(frames)), tokenizer.encode(to_float(changed))
    assert before.shape == (6, *tokenizer.latent_shape) == (6, 4, 4, 3)
    different = (before != after).any(dim=-1).any(dim=0)
    assert different.nonzero().tolist() == [[1, 3]]


def test_latents_are_codes_and_rows_are_independent(tokenizer):
    latents = tokenizer.encode(to_float(some_frames(3)))
    torch.testing.assert_close(tokenizer.fsq.to_codes(tokenizer.fsq.to_indices(latents)), latents)
    assert torch.equal(tokenizer.encode(to_float(some_frames(3)[1:2])), latents[1:2])
    decoded = tokenizer.decode(latents)
    assert decoded.shape == (3, 3, 32, 32)
    torch.testing.assert_close(tokenizer.decode(latents[1:2]), decoded[1:2])


def test_the_decoder_sees_beyond_its_patch_and_knows_where_it_is(tokenizer):
    latents = tokenizer.encode(to_float(some_frames(1)))
    changed = latents.clone()
    changed[0, 1, 3] = -changed[0, 1, 3] + 0.1
    beyond = (tokenizer.decode(latents) != tokenizer.decode(changed)).any(dim=1)[0]
    beyond[8:16, 24:32] = False
    assert beyond.any()
    same_everywhere = tokenizer.decode(torch.zeros(1, 4, 4, 3))
    assert not torch.allclose(same_everywhere[..., 8:16, 8:16], same_everywhere[..., 16:24, 8:16])


def test_foreground_weighs_more(tokenizer):
    frames = some_frames(2)
    still, _ = tokenizer({"frames": frames, "background": frames})
    moving, metrics = tokenizer({"frames": frames, "background": frames + 128})
    torch.testing.assert_close(moving, (1 + CONFIG.foreground_gain) * still)
    assert metrics["foreground_psnr"] == pytest.approx(metrics["psnr"], abs=0.5)  # pooled error against mean of values


def test_psnr_is_that_of_the_decoded_frames(tokenizer):
    frames = some_frames(2)
    background = frames.clone()
    background[:, :16] += 128
    _, metrics = tokenizer({"frames": frames, "background": background})
    error = (tokenizer.decode(tokenizer.encode(to_float(frames))) - to_float(frames)).detach().double().numpy() / 2
    each = [-10 * np.log10((error[i] ** 2).mean()) for i in range(2)]
    assert metrics["psnr"] == pytest.approx(np.mean(each), abs=1e-4)
    assert metrics["foreground_psnr"] == pytest.approx(-10 * np.log10((error[:, :, :16] ** 2).mean()), abs=1e-4)


def test_every_parameter_learns(tokenizer):
    loss, _ = tokenizer({"frames": some_frames(4), "background": some_frames(4)})
    loss.backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 16}, r"log2\(patch\) - 2 \+ 1 entries.* got patch 16, 2 dims"),
        ({"decoder_blocks": (1,)}, "2 dims, 1 blocks"),
        ({"image_size": 36}, "multiple of patch, got 36 and 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    fields = {"image_size": 32, "patch": 8, "decoder_dims": (16, 8), "decoder_blocks": (1, 1)}
    with pytest.raises(ValueError, match=message):
        DiscreteTokenizerConfig(**fields | changes)
