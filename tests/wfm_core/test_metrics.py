import numpy as np
import pytest

from wfm_core.metrics import changed_fraction, flicker, frechet_distance, level_use, psnr, ssim


def test_psnr_of_known_errors():
    truth = np.full((3, 4, 4, 3), 100, dtype=np.uint8)
    frames = truth.copy()
    frames[0] += 1
    frames[1, 0, 0] = 200  # 1 of 16 pixels
    expected = [20 * np.log10(255), 10 * np.log10(255**2 / (100**2 / 16)), 60.0]
    np.testing.assert_allclose(psnr(frames, truth), expected)
    np.testing.assert_allclose(psnr(frames, truth[:1]), expected)
    np.testing.assert_allclose(psnr(truth, frames), expected)  # no wrap-around of uint8
    assert psnr(np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8))[0] == 0


def test_only_masked_pixels_count():
    truth = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    frames = truth.copy()
    frames[:, 0, 0] = 10
    frames[:, 3] = 255
    mask = np.zeros((3, 4, 4), dtype=bool)
    mask[0, 0, :2] = True
    mask[1, 1] = True
    got = psnr(frames, truth, mask)
    np.testing.assert_allclose(got[:2], [10 * np.log10(255**2 / 50), 60])
    assert np.isnan(got[2])
    assert psnr(frames, truth, np.ones_like(mask)) == pytest.approx(psnr(frames, truth))


def test_flicker_counts_tokens_that_change_where_pixels_do_not():
    frames = np.zeros((3, 4, 8, 3), dtype=np.uint8)
    frames[1:, 3, 4, 2] = 1  # the cell in the second row, third column changes once
    tokens = np.zeros((3, 8, 2), dtype=np.uint8)
    tokens[1:, 6] = 3  # that cell: no flicker
    assert changed_fraction(tokens, frames, 2) == 0
    tokens[2, 1, 1] = 1
    tokens[2, 6, 0] = 4  # it stood still in the second step
    assert changed_fraction(tokens, frames, 2) == 2 / 15
    assert np.isnan(changed_fraction(tokens, frames + np.arange(3, dtype=np.uint8)[:, None, None, None], 2))


def test_ssim_is_one_for_the_same_and_falls_with_blur_and_noise():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    noisy = np.clip(truth + rng.normal(0, [[[[5]]], [[[20]]], [[[80]]]], truth.shape), 0, 255).astype(np.uint8)
    assert ssim(truth, truth).tolist() == [1.0, 1.0, 1.0]
    values = ssim(noisy, truth)
    assert 1 > values[0] > values[1] > values[2] > 0


def test_flicker_is_of_changes_not_of_offsets():
    rng = np.random.default_rng(0)
    truth = rng.integers(50, 200, (5, 8, 8, 3), dtype=np.uint8)
    assert flicker(truth + np.uint8(9), truth) == 0
    shimmering = truth.copy()
    shimmering[1::2] += 4
    assert flicker(shimmering, truth) == 4


def test_the_frechet_distance_of_normals_is_known():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200_000, 3))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + [1, 2, 0]) == pytest.approx(5, abs=1e-6)
    stretched = x * [2.0, 1.0, 3.0]  # the squared differences of standard deviations
    assert frechet_distance(x, stretched) == pytest.approx(1 + 4, rel=0.02)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    assert frechet_distance(x @ turn, stretched @ turn) == pytest.approx(frechet_distance(x, stretched), rel=1e-6)


def test_the_use_of_levels():
    even = np.stack(np.meshgrid(np.arange(4), np.arange(2)), axis=-1)
    assert level_use(even, (4, 2)) == pytest.approx(1)
    assert level_use(0 * even, (4, 2)) == 0
    assert level_use(even % 2, (4, 2)) == pytest.approx(0.75)
