import torch

from wfm_core.tokenizers.losses import foreground_mask, reconstruction_loss


def test_the_reconstruction_loss_by_hand():
    error = torch.tensor([[1.0, -2.0], [0.0, 0.5]])[None, None]
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    pixel = (1 * (1 + 2) + 2 * (2 + 8) + 3 * 0 + 4 * (0.5 + 0.5)) / 4
    across = (2 * 3 + 4 * 0.5) / 2  # a difference has the weight of its right or lower pixel
    down = (3 * 1 + 4 * 2.5) / 2
    torch.testing.assert_close(reconstruction_loss(error, weight), torch.tensor(pixel + 0.25 * (across + down)))


def test_channels_and_images_are_averaged():
    one = torch.randn(1, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(1, 1, 4, 6)
    expected = (reconstruction_loss(one, weight) + reconstruction_loss(2 * one, weight)) / 2
    torch.testing.assert_close(reconstruction_loss(torch.cat([one, 2 * one], dim=1), weight), expected)
    both = reconstruction_loss(torch.cat([one, 2 * one]), weight.expand(2, 1, 4, 6))
    torch.testing.assert_close(both, expected)
    assert reconstruction_loss(torch.zeros(1, 3, 4, 6), weight) == 0


def test_foreground_is_what_differs_by_more_than_the_threshold():
    background = torch.full((1, 2, 2, 3), 250, dtype=torch.uint8)
    frames = background.clone()
    frames[0, 0, 1] = torch.tensor([245, 245, 229])  # 31 in sum; wrapping uint8 arithmetic would see 225
    frames[0, 1, 0] = torch.tensor([255, 255, 230])  # 30: not above
    mask = foreground_mask(frames, background)
    assert mask.shape == (1, 1, 2, 2) and mask.dtype == torch.bool
    assert mask[0, 0].tolist() == [[False, True], [False, False]]
    assert torch.equal(foreground_mask(background, frames), mask)
    assert foreground_mask(frames, background, threshold=9.9).sum() == 2
