import pytest
import torch

from wfm_core.tokenizers.wavelet import haar2d, inverse_haar2d


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_the_transform_inverts_and_keeps_energy(levels):
    x = image(2, 3, 16, 24)
    y = haar2d(x, levels)
    assert y.shape == (2, 3 * 4**levels, 16 >> levels, 24 >> levels)
    torch.testing.assert_close(y.square().sum(dim=(1, 2, 3)), x.square().sum(dim=(1, 2, 3)))
    torch.testing.assert_close(inverse_haar2d(y, levels), x)
    torch.testing.assert_close(haar2d(inverse_haar2d(x.repeat(1, 64, 1, 1), levels), levels), x.repeat(1, 64, 1, 1))


def test_one_level_by_hand():
    red = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    y = haar2d(torch.stack([red, 10 * red])[None])
    # sum, left less right, top less bottom, diagonal; both colours of a band lie side by side
    torch.testing.assert_close(y.flatten(), torch.tensor([15, 150, -5, -50, -9, -90, 3, 30]) / 2)


def test_a_constant_image_has_only_its_mean():
    y = haar2d(torch.full((1, 1, 8, 8), 3.0), 2)
    torch.testing.assert_close(y[:, 0], torch.full((1, 2, 2), 12.0))
    assert not y[:, 1:].any()


def test_a_pixel_stays_in_its_block():
    x = image(1, 1, 16, 16)
    moved = x.clone()
    moved[0, 0, 5, 14] += 1
    changed = (haar2d(x, 2) != haar2d(moved, 2)).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[1, 3]]


def test_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 4, got \(6, 8\)"):
        haar2d(torch.zeros(1, 1, 6, 8), 2)
