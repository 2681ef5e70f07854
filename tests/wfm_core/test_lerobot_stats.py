"""Statistics against numpy's own on all rows at once."""

import numpy as np

from wfm_core.data.lerobot_stats import IMAGE_STATS_EVERY, column_stats, image_stats, pixel_histogram


def test_columns_of_several_tables_are_one():
    rng = np.random.default_rng(0)
    tables = [{"pose": rng.normal(size=(n, 3)), "success": rng.random(n) > 0.5} for n in (4, 9)]
    stats = column_stats(tables)
    poses = np.concatenate([table["pose"] for table in tables])
    np.testing.assert_allclose(stats["pose"]["mean"], poses.mean(0))
    np.testing.assert_allclose(stats["pose"]["q10"], np.quantile(poses, 0.1, axis=0))
    assert stats["pose"]["count"] == [13]
    np.testing.assert_allclose(stats["success"]["mean"], [np.mean(np.concatenate([t["success"] for t in tables]))])


def test_histograms_of_videos_add_up():
    rng = np.random.default_rng(1)
    videos = [rng.integers(low, high, (11, 5, 4, 3), dtype=np.uint8) for low, high in ((0, 90), (40, 256))]
    sample = np.concatenate([video[::IMAGE_STATS_EVERY] for video in videos]) / 255
    stats = image_stats(sum(pixel_histogram(video) for video in videos), 22)
    assert stats["count"] == [22]
    for stat, expected in {"mean": sample.mean((0, 1, 2)), "std": sample.std((0, 1, 2))}.items():
        np.testing.assert_allclose(stats[stat], expected.reshape(3, 1, 1))
    for stat, expected in {"min": sample.min((0, 1, 2)), "max": sample.max((0, 1, 2))}.items():
        np.testing.assert_allclose(stats[stat], expected.reshape(3, 1, 1))
    for stat, q in {"q01": 0.01, "q50": 0.5, "q99": 0.99}.items():
        expected = np.quantile(sample, q, axis=(0, 1, 2)).reshape(3, 1, 1)
        np.testing.assert_allclose(stats[stat], expected, atol=1 / 255)
