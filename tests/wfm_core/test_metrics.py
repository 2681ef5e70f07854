import numpy as np
import pytest

from wfm_core.metrics import changed_fraction, psnr


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
