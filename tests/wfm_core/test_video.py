import pytest
import torch

from wfm_core.tokenizers.video import SPACE_FACTORS, TIME_FACTORS, VideoTokenizer, VideoTokenizerConfig

FAMILY = [
    (space, time, levels) for space in SPACE_FACTORS for time in TIME_FACTORS for levels in ((), (8, 8, 8, 5, 5, 5))
]


def make(space: int, time: int, levels: tuple[int, ...]) -> VideoTokenizer:
    torch.manual_seed(0)
    dims = (8, 12) if space == 8 else (8, 12, 16)
    config = VideoTokenizerConfig(space, time, levels, dims=dims, num_blocks=1, num_heads=2, window=2)
    return VideoTokenizer(config).double().requires_grad_(False)


def video(time: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, time, 3, 32, 48, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(("space", "time", "levels"), FAMILY)
def test_the_whole_family_encodes_and_decodes(space, time, levels):
    tokenizer = make(space, time, levels)
    for num_latents in (1, 3):
        frames = video(1 + (num_latents - 1) * time)
        latents, _ = tokenizer.encode(frames)
        assert latents.shape == (2, num_latents, 32 // space, 48 // space, len(levels) or 16)
        decoded, _ = tokenizer.decode(latents)
        assert decoded.shape == frames.shape
        if levels:
            indices = tokenizer.fsq.to_indices(latents)
            assert ((indices >= 0) & (indices < torch.tensor(levels))).all()
            torch.testing.assert_close(tokenizer.fsq.to_codes(indices), latents.float())


def test_names_are_those_of_the_literature():
    assert [make(*variant).config.name for variant in ((8, 1, ()), (16, 1, (8, 5)), (8, 4, ()), (16, 8, (8, 5)))] == [
        "CI8x8", "DI16x16", "CV4x8x8", "DV8x16x16",
    ]  # fmt: skip


@pytest.mark.parametrize(("space", "time", "levels"), FAMILY)
def test_streaming_equals_the_whole_clip(space, time, levels):
    tokenizer, frames = make(space, time, levels), video(1 + 4 * time)
    whole, _ = tokenizer.encode(frames)
    past, pieces = None, []
    for chunk in frames.split((1, time, 2 * time, time), dim=1):
        latents, past = tokenizer.encode(chunk, past)
        pieces.append(latents)
    streamed = torch.cat(pieces, dim=1)
    torch.testing.assert_close(streamed, whole)
    assert sum(tensor.numel() for tensor in past.values()) == sum(
        tensor.numel() for tensor in tokenizer.encode(video(1 + 9 * time))[1].values()
    )  # what is remembered does not grow
    decoded, _ = tokenizer.decode(whole)
    past, pieces = None, []
    for chunk in whole.split((2, 1, 2), dim=1):
        frames, past = tokenizer.decode(chunk, past)
        pieces.append(frames)
    torch.testing.assert_close(torch.cat(pieces, dim=1), decoded)


@pytest.mark.parametrize(("space", "time", "levels"), FAMILY)
def test_a_latent_depends_on_no_later_frame(space, time, levels):
    tokenizer, frames = make(space, time, levels), video(1 + 3 * time)
    other = frames.clone()
    other[:, 1 + time :] *= -1
    before, after = tokenizer.encode(frames)[0], tokenizer.encode(other)[0]
    assert torch.equal(before[:, :2], after[:, :2])
    assert (before[:, 2:] != after[:, 2:]).flatten(2).any(dim=-1).all()
    torch.testing.assert_close(tokenizer.decode(before)[0][:, : 1 + time], tokenizer.decode(after)[0][:, : 1 + time])


def test_an_image_tokenizer_takes_frames_one_by_one():
    tokenizer, frames = make(16, 1, ()), video(3)
    latents, past = tokenizer.encode(frames)
    torch.testing.assert_close(latents[:, 1:2], tokenizer.encode(frames[:, 1:2])[0])
    assert past == {}


def test_what_does_not_fit_is_refused():
    tokenizer = make(16, 8, ())
    with pytest.raises(ValueError, match=r"CV8x16x16 needs 1 \+ a multiple of 8 frames at the beginning, got 8"):
        tokenizer.encode(video(8))
    _, past = tokenizer.encode(video(1))
    with pytest.raises(ValueError, match="CV8x16x16 needs a multiple of 8 frames, got 9"):
        tokenizer.encode(video(9), past)
    with pytest.raises(ValueError, match=r"multiples of 16, got \(32, 40\)"):
        tokenizer.encode(video(1)[..., :40])
    for changes, message in (
        ({"space_factor": 4}, r"space_factor must be in \(8, 16\)"),
        ({"time_factor": 2}, r"time_factor in \(1, 4, 8\)"),
        ({"dims": (8, 8)}, "dims must have 3 entries for space_factor=16"),
        ({"num_heads": 3}, r"multiple of num_heads, got \(128, 256, 256\) and 3"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoTokenizerConfig(**changes)
