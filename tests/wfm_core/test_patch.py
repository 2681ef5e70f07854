from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from wfm_core.tokenizers.patch import CONTINUOUS_STEP, PatchTokenizer, PatchTokenizerConfig, to_float, to_uint8

CONFIG = PatchTokenizerConfig(
    image_size=32,
    patch=8,
    levels=(7, 5, 4),
    encoder_dim=24,
    encoder_blocks=2,
    decoder_dims=(16, 8),
    decoder_blocks=(1, 1),
)


CONTINUOUS = {"levels": (), "latent_dim": 3}


def make_tokenizer(**changes: Any) -> PatchTokenizer:
    torch.manual_seed(0)
    return PatchTokenizer(replace(CONFIG, **changes))


@pytest.fixture(params=["discrete", "continuous"])
def tokenizer(request) -> PatchTokenizer:
    return make_tokenizer(**CONTINUOUS if request.param == "continuous" else {})


def batch(frames: torch.Tensor, *, background: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"frames": frames, "reference": frames.flip(0), "background": background, "seed": torch.tensor(3)}


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


def test_latents_are_codes_or_bounded_numbers():
    codes = (tokenizer := make_tokenizer()).encode(to_float(some_frames(3)))
    torch.testing.assert_close(tokenizer.fsq.to_codes(tokenizer.fsq.to_indices(codes)), codes)
    numbers = (tokenizer := make_tokenizer(**CONTINUOUS)).encode(to_float(some_frames(3)))
    assert len(numbers.unique()) > 100 > len(codes.unique()) and numbers.abs().max() < 1
    with pytest.raises(ValueError, match="tokens need a discrete tokenizer, got a continuous one"):
        tokenizer.fsq.to_indices(numbers)
    assert (CONFIG.name, tokenizer.config.name) == ("DI8x8 patch", "CI8x8 patch")


def test_rows_are_independent(tokenizer):
    latents = tokenizer.encode(to_float(some_frames(3)))
    assert torch.equal(tokenizer.encode(to_float(some_frames(3)[1:2])), latents[1:2])
    reference, reference_latents = to_float(some_frames(4)[1:]), latents.flip(0)
    decoded = tokenizer.decode(latents, reference, reference_latents)
    assert decoded.shape == (3, 3, 32, 32)
    row = tokenizer.decode(latents[1:2], reference[1:2], reference_latents[1:2])
    torch.testing.assert_close(row, decoded[1:2])


def test_the_decoder_sees_beyond_its_patch_and_knows_where_it_is(tokenizer):
    latents = tokenizer.encode(to_float(some_frames(1)))
    changed = latents.clone()
    changed[0, 1, 3] = -changed[0, 1, 3] + 0.1
    black, zero = torch.full((1, 3, 32, 32), -1.0), torch.zeros(1, 4, 4, 3)
    beyond = (tokenizer.decode(latents, black, zero) != tokenizer.decode(changed, black, zero)).any(dim=1)[0]
    beyond[8:16, 24:32] = False
    assert beyond.any()
    same_everywhere = tokenizer.decode(zero, black, zero)
    assert not torch.allclose(same_everywhere[..., 8:16, 8:16], same_everywhere[..., 16:24, 8:16])


def test_the_decoder_copies_what_its_gate_lets_through():
    """With the gate shut the reference comes back to the bit; with it open the reference's pixels are not copied."""
    tokenizer = make_tokenizer()
    gates = slice(-(4**2), None)
    latents, reference = tokenizer.encode(to_float(some_frames(2))), to_float(some_frames(4)[2:])
    with torch.no_grad():
        tokenizer.to_haar.weight[gates] = 0
        tokenizer.to_haar.bias[gates] = 0
        tokenizer.to_haar.bias[gates.start] = -1000.0
    assert torch.equal(tokenizer.decode(latents, reference, latents), reference)
    with torch.no_grad():
        tokenizer.to_haar.bias[gates.start] = 1000.0
        for look in tokenizer.from_reference:
            look.weight.zero_()
    other = to_float(some_frames(6)[4:])
    torch.testing.assert_close(tokenizer.decode(latents, other, latents), tokenizer.decode(latents, reference, latents))


def test_the_decoder_is_told_which_cells_equal_the_references_but_for_rounding(tokenizer):
    latents, reference = tokenizer.encode(to_float(some_frames(1))), to_float(some_frames(2)[1:])
    step = 2 / 6 if tokenizer.config.levels else CONTINUOUS_STEP  # of seven levels
    a_level_off = torch.where(latents > 0, latents - step, latents + step)
    a_level_off[..., 1:] = latents[..., 1:]

    def decoded(reference_latents: torch.Tensor, told: float) -> torch.Tensor:
        with torch.no_grad():
            tokenizer.from_latents.weight[:, -1] = told
        return tokenizer.decode(latents, reference, reference_latents)

    assert not torch.allclose(decoded(latents, 0.0), decoded(latents, 9.0))
    assert not torch.allclose(decoded(latents + 1e-6, 0.0), decoded(latents + 1e-6, 9.0))
    assert torch.equal(decoded(a_level_off, 0.0), decoded(a_level_off, 9.0))


def test_corruption_moves_some_cells_by_a_level():
    tokenizer = make_tokenizer(corruption=0.5)
    latents = tokenizer.encode(to_float(some_frames(8)))
    moved = tokenizer._corrupt(latents, torch.tensor(0))
    before, after = tokenizer.fsq.to_indices(latents), tokenizer.fsq.to_indices(moved)
    torch.testing.assert_close(tokenizer.fsq.to_codes(after), moved)
    assert ((before - after).abs() <= 1).all()
    assert 0.2 < (before != after).any(dim=-1).float().mean() < 0.5  # of cells; at the ends of the range some stay
    assert torch.equal(make_tokenizer(corruption=0.0)._corrupt(latents, torch.tensor(0)), latents)
    tokenizer = make_tokenizer(corruption=0.5, **CONTINUOUS)
    latents = 0.5 * tokenizer.encode(to_float(some_frames(8)))  # clear of the ends
    change = (tokenizer._corrupt(latents, torch.tensor(0)) - latents).abs()
    torch.testing.assert_close(change, CONTINUOUS_STEP * (change > CONTINUOUS_STEP / 2))
    assert 0.2 < (change > 0).any(dim=-1).float().mean() < 0.5


def test_foreground_weighs_more(tokenizer):
    frames = some_frames(2)
    still, _ = tokenizer(batch(frames, background=frames))
    moving, metrics = tokenizer(batch(frames, background=frames + 128))
    torch.testing.assert_close(moving, (1 + CONFIG.foreground_gain) * still)
    assert metrics["foreground_psnr"] == pytest.approx(metrics["psnr"], abs=0.5)  # pooled error against mean of values


def test_psnr_is_that_of_the_decoded_frames():
    tokenizer = make_tokenizer(corruption=0.0)
    frames = some_frames(2)
    background = frames.clone()
    background[:, :16] += 128
    given = batch(frames, background=background)
    _, metrics = tokenizer(given)
    reference = to_float(given["reference"])
    decoded = tokenizer.decode(tokenizer.encode(to_float(frames)), reference, tokenizer.encode(reference))
    error = (decoded - to_float(frames)).detach().double().numpy() / 2
    each = [-10 * np.log10((error[i] ** 2).mean()) for i in range(2)]
    assert metrics["psnr"] == pytest.approx(np.mean(each), abs=1e-4)
    assert metrics["foreground_psnr"] == pytest.approx(-10 * np.log10((error[:, :, :16] ** 2).mean()), abs=1e-4)


def test_every_parameter_learns(tokenizer):
    loss, _ = tokenizer(batch(some_frames(4), background=some_frames(4)))
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
        PatchTokenizerConfig(**fields | changes)
