from dataclasses import replace

import numpy as np
import pytest
import torch
from wandering_block import LENGTHS, SCENES, make_caches, make_episode

from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.tokenizers.batches import (
    Mixture,
    TokenizerBatches,
    VideoBatches,
    augmented,
    median_backgrounds,
)


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> list[ClipCache]:
    return make_caches(tmp_path_factory.mktemp("caches"))


def test_the_median_sees_through_what_moves(caches):
    backgrounds, group = median_backgrounds(caches[0])
    assert backgrounds.shape == (2, 32, 32, 3) and backgrounds.dtype == np.uint8
    assert [episode["instruction"] for episode in caches[0].episodes] == ["left", "right", "left", "right"]
    still = backgrounds.copy()
    still[:, 31, 31] = np.array(list(SCENES.values()))[:, None]
    for episode, g in enumerate(group):
        assert (still[g] == SCENES[caches[0].episodes[episode]["instruction"]]).all()


def test_tokenizer_batches_pair_frames_with_their_own_background(caches):
    batches = TokenizerBatches(Mixture(caches), batch_size=64, seed=0)
    known = {index: make_episode(index).frames for index in LENGTHS}
    seen, begun = set(), []
    for step in range(8):
        batch = batches(step)
        pictures = [batch[name] for name in ("frames", "reference", "background")]
        assert all(part.shape == (64, 32, 32, 3) and part.dtype == torch.uint8 for part in pictures)
        for frame, reference, background in zip(*pictures, strict=True):
            index, t, _ = frame[31, 31].tolist()
            seen.add((index, t))
            same_episode, earlier, _ = reference[31, 31].tolist()
            assert same_episode == index and earlier <= t
            begun.append(earlier == 0)
            assert reference.numpy().tobytes() == known[index][earlier].tobytes()
            assert frame.numpy().tobytes() == known[index][t].tobytes()
            assert (background[:31] == list(SCENES.values())[index % 2]).all()
    assert 0.6 < np.mean(begun) < 0.9  # most references are their episode's first frame
    assert len(seen) > 130 and {index for index, _ in seen} == LENGTHS.keys()  # 166 frames in all


def test_each_sample_is_of_one_camera(tmp_path):
    """The second camera sees what the first does, upside down."""
    episodes = [make_episode(index, 9) for index in range(2)]
    both = [replace(e, frames=np.concatenate([e.frames, e.frames[:, ::-1]], axis=1)) for e in episodes]
    cache = build_clip_cache(both, tmp_path / "both")
    batch = TokenizerBatches(Mixture([cache]), 32, 0, num_cameras=2, still=False)(0)
    known = {frame.tobytes(): k for e in episodes for k in range(2) for frame in (e.frames, e.frames[:, ::-1])[k]}
    pictures = [[known[each.numpy().tobytes()] for each in batch[name]] for name in ("frames", "reference")]
    assert pictures[0] == pictures[1] and 8 < sum(pictures[0]) < 24
    assert torch.equal(batch["background"], batch["reference"])


def test_video_batches_alternate_clips_and_frames(caches):
    batches = VideoBatches(Mixture(caches), clip_length=5, batch_size=6, seed=0, image_every=3)
    episodes = {index: make_episode(index) for index in LENGTHS}
    seen = set()
    for step in range(12):
        frames = batches(step)["frames"]
        assert frames.dtype == torch.uint8
        assert frames.shape == ((30, 1, 32, 32, 3) if step % 3 == 0 else (6, 5, 32, 32, 3))
        for clip in frames.numpy().reshape(6, 5, 32, 32, 3):
            index, first, _ = clip[0, 31, 31].tolist()
            seen.add(index)
            for t in range(5):
                assert np.array_equal(clip[t], episodes[index].frames[first + t])
    assert seen == LENGTHS.keys()
    assert VideoBatches(Mixture(caches), clip_length=5, batch_size=2, seed=0, image_every=0)(0)["frames"].shape[1] == 5
    some = VideoBatches(Mixture(caches), clip_length=5, batch_size=6, seed=0, image_every=3, image_stride=2)(0)[
        "frames"
    ]
    assert torch.equal(some, batches(0)["frames"].unflatten(0, (6, 5))[:, ::2].flatten(0, 1))
    assert torch.equal(
        batches(5)["frames"], VideoBatches(Mixture(caches), clip_length=5, batch_size=6, seed=0)(5)["frames"]
    )


def test_a_crop_is_a_square_of_a_clip_at_any_place(caches):
    sizes = {"clip_length": 3, "batch_size": 8, "seed": 0, "image_every": 0}
    batches = VideoBatches(Mixture(caches), **sizes, crop=31)
    wholes = [cache.frames[first : first + 3] for cache in caches for first in range(len(cache.frames) - 2)]
    crops = {whole[:, y : y + 31, x : x + 31].tobytes(): (y, x) for whole in wholes for y in (0, 1) for x in (0, 1)}
    places = {crops[clip.numpy().tobytes()] for step in range(10) for clip in batches(step)["frames"]}
    assert len(places) == 4
    with pytest.raises(ValueError, match=r"crop must lie in \[0, 32\], frames being \(32, 32\), got 33"):
        VideoBatches(Mixture(caches), **sizes, crop=33)


def test_video_batches_refuse_what_does_not_fit(caches, tmp_path):
    with pytest.raises(ValueError, match=r"a: clip_length must be at most 33, its longest episode, got 34"):
        VideoBatches(Mixture(caches), clip_length=34, batch_size=1, seed=0)
    small = replace(make_episode(0, 6), frames=np.zeros((6, 16, 16, 3), np.uint8))
    other = build_clip_cache([small], tmp_path / "small")
    with pytest.raises(ValueError, match=r"small: frames must be \(32, 32\) as in .*a, got \(16, 16\)"):
        Mixture(caches, [other])


@pytest.mark.parametrize("videos", [False, True])
def test_a_mixture_augments_its_share_and_leaves_the_rest(caches, videos):
    mixture = Mixture(caches[:1], caches[1:], augmented_fraction=0.25)
    batches = (
        VideoBatches(mixture, clip_length=3, batch_size=40, seed=0, image_every=0)
        if videos
        else TokenizerBatches(mixture, batch_size=40, seed=0)
    )
    as_recorded = {frame.tobytes() for frame in caches[0].frames}
    changed = 0
    for step in range(10):
        batch = batches(step)
        samples = batch["frames"] if videos else torch.stack([batch["frames"], batch["reference"]], dim=1)
        known = [[frame.numpy().tobytes() in as_recorded for frame in sample] for sample in samples]
        assert all(all(sample) or not any(sample) for sample in known)
        changed += sum(not any(sample) for sample in known)
        if not videos:
            for frame, background, kept in zip(batch["frames"], batch["background"], known, strict=True):
                alike = ((frame.short() - background.short()).abs().sum(dim=-1) < 4).float().mean()
                assert kept[0] or alike > 0.85  # all but the block: the background was treated as the frame was
    assert changed / 400 == pytest.approx(0.25, abs=0.06)
    assert Mixture([], caches).draw(np.random.default_rng(0), 50).max() == 1
    with pytest.raises(ValueError, match=r"augmented_fraction must lie in \[0, 1\], got 2"):
        Mixture(caches, augmented_fraction=2)


def test_an_episode_without_an_instruction_is_a_scene_of_its_own(tmp_path):
    told = [
        replace(make_episode(k, 8), instruction=instruction) for k, instruction in enumerate(["", "left", "", "left"])
    ]
    backgrounds, group = median_backgrounds(build_clip_cache(told, tmp_path / "cache"))
    assert len(backgrounds) == 3 and group[1] == group[3] and len(set(group)) == 3
    assert [int(backgrounds[g, 0, 0, 0]) for g in group] == [60, 180, 60, 180]


def test_augmentation_treats_a_clip_as_one():
    rng = np.random.default_rng(0)
    still = np.repeat(rng.integers(0, 256, (1, 40, 60, 3), dtype=np.uint8), 4, axis=0)
    outcomes = [augmented(still, rng) for _ in range(20)]
    for clip in outcomes:
        assert clip.shape == still.shape and clip.dtype == np.uint8
        assert (clip == clip[:1]).all()
    assert len({clip.tobytes() for clip in outcomes}) == 20
    left_lit = np.zeros((1, 40, 60, 3), dtype=np.uint8)
    left_lit[:, :, :20] = 255
    mirrored = [
        clip[0, :, -10:].mean() > clip[0, :, :10].mean() for clip in (augmented(left_lit, rng) for _ in range(60))
    ]
    assert 15 < sum(mirrored) < 45
