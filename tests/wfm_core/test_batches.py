from dataclasses import replace

import numpy as np
import pytest
import torch

from wfm_core.batches import (
    FROM_HERE_FRACTION,
    DynamicsBatches,
    Mixture,
    TokenClipBatches,
    TokenizerBatches,
    VideoBatches,
    augmented,
    commanded_travel,
    encode_cache,
    median_backgrounds,
)
from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.models.motion import Contact
from wfm_core.tokenizers.patch import PatchTokenizer, PatchTokenizerConfig, to_float

SCENES = {"left": 60, "right": 180}  # instruction -> brightness of its background


def make_episode(index: int, length: int) -> Episode:
    """A 4 x 4 block wanders over a still background; the first pixel tells the frame."""
    rng = np.random.default_rng(index)
    instruction = list(SCENES)[index % 2]
    frames = np.full((length, 32, 32, 3), SCENES[instruction], dtype=np.uint8)
    for t in range(length):
        row, column = rng.integers(0, 28, 2)
        frames[t, row : row + 4, column : column + 4] = rng.integers(0, 256, 3)
        frames[t, 31, 31] = (index, t, 0)
    return Episode(
        frames=frames,
        actions=rng.normal(size=(length - 1, 7)).astype(np.float32),
        agent_pos=None,
        instruction=instruction,
        episode_id=str(index),
        convention="commanded",
        command_lag=0,
        labels={
            "grasped": np.full(length, -1),
            "object_positions": np.zeros((length, 6), dtype=np.float32),
        },
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> list[ClipCache]:
    folder = tmp_path_factory.mktemp("caches")
    first = build_clip_cache((make_episode(k, 30 + k) for k in range(4)), folder / "a")
    return [first, build_clip_cache([make_episode(5, 40)], folder / "b")]


@pytest.fixture
def tokenizer() -> PatchTokenizer:
    torch.manual_seed(0)
    config = PatchTokenizerConfig(
        image_size=32, levels=(8, 5), encoder_dim=16, encoder_blocks=1, decoder_dims=(8, 8, 8), decoder_blocks=(1, 1, 1)
    )
    return PatchTokenizer(config).eval()


def frame_names(cache: ClipCache) -> np.ndarray:
    """(N, C) tokens that say which episode and frame they are."""
    return cache.frames[:, 31:, 31, :2]


def make_batches(caches, **changes) -> DynamicsBatches:
    settings = {
        "clip_length": 6, "batch_size": 32, "seed": 1,
        "watched": [frame_names(cache)[..., 1] % 3 == 0 for cache in caches],
        "contact": [frame_names(cache)[:, 0, 1] % 4 for cache in caches], "imagined": [None] * len(caches),
    }  # fmt: skip
    return DynamicsBatches(caches, [frame_names(cache) for cache in caches], **settings | changes)


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
            assert reference.numpy().tobytes() == make_episode_frames(index, earlier)
            assert frame.numpy().tobytes() == make_episode_frames(index, t)
            assert (background[:31] == list(SCENES.values())[index % 2]).all()
    assert 0.6 < np.mean(begun) < 0.9  # most references are their episode's first frame
    assert len(seen) > 130 and {index for index, _ in seen} == {0, 1, 2, 3, 5}  # 166 frames in all


_FRAMES: dict[int, np.ndarray] = {}


def make_episode_frames(index: int, t: int) -> bytes:
    if index not in _FRAMES:
        _FRAMES[index] = make_episode(index, 40 if index == 5 else 30 + index).frames
    return _FRAMES[index][t].tobytes()


def test_batches_are_functions_of_seed_and_step(caches):
    for make in (lambda seed: TokenizerBatches(Mixture(caches), 8, seed), lambda seed: make_batches(caches, seed=seed)):
        used = make(0)
        for step in range(5):
            used(step)
        fresh, again, other = make(0)(3), used(3), make(1)(3)
        assert all(torch.equal(fresh[name], again[name]) for name in fresh)
        assert any(not torch.equal(fresh[name], other[name]) for name in fresh)
        assert any(not torch.equal(fresh[name], used(4)[name]) for name in fresh)


def test_encoding_is_kept_under_the_encoders_name(caches, tokenizer, monkeypatch):
    cache = caches[1]
    tokens = encode_cache(tokenizer, cache, batch_size=7)  # no divisor of 40
    expected = tokenizer.fsq.to_indices(tokenizer.encode(to_float(torch.from_numpy(np.array(cache.frames)))))
    np.testing.assert_array_equal(tokens, expected.flatten(1, 2).numpy())
    assert tokens.shape == (40, 4, 2) and tokens.dtype == np.uint8
    encoded, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda frames: encoded.append(len(frames)) or encode(frames))
    with torch.no_grad():
        tokenizer.from_latents.weight.add_(1)
    np.testing.assert_array_equal(encode_cache(tokenizer, cache), tokens)
    assert encoded == []  # another decoder reads the same tokens
    with torch.no_grad():
        tokenizer.encoder[0].weight.mul_(-1)
    assert (encode_cache(tokenizer, cache) != tokens).any() and sum(encoded) == 40
    assert len(list(cache.directory.glob("tokens.*"))) == 2 and not list(cache.directory.glob("*tmp*"))
    ClipCache(cache.directory)  # the tokens beside it are no damage


def test_an_encoding_that_was_killed_leaves_nothing_under_the_name(caches, tokenizer, monkeypatch):
    def fail(file, tokens):
        file.write(b"half")
        raise OSError("no space left")

    with torch.no_grad():
        tokenizer.encoder[0].weight.mul_(2)
    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="no space"):
        encode_cache(tokenizer, caches[1])
    monkeypatch.undo()
    assert encode_cache(tokenizer, caches[1]).shape == (40, 4, 2)


def test_travel_is_what_was_commanded_so_far():
    actions = np.arange(35, dtype=np.float32).reshape(5, 7)
    contact = np.full(5, Contact.HELD)
    travel = commanded_travel(actions, np.array([0, 3]), np.array([3, 2]), contact)
    assert travel.dtype == np.float32
    first = actions[:, :6]
    np.testing.assert_array_equal(travel, [0 * first[0], first[0], first[0] + first[1], 0 * first[0], first[3]])
    contact[[1, 4]] = Contact.BLOCKED, Contact.HELD_BLOCKED  # what led to these frames came to nothing
    travel = commanded_travel(actions, np.array([0, 3]), np.array([3, 2]), contact)
    np.testing.assert_array_equal(travel, [0 * first[0], 0 * first[0], first[1], 0 * first[0], 0 * first[0]])


def test_travel_does_not_drift_over_many_episodes():
    rng = np.random.default_rng(0)
    actions = rng.normal(scale=0.05, size=(200_000, 7)).astype(np.float32) + 0.03
    starts = np.arange(0, 200_000, 50)
    travel = commanded_travel(actions, starts, np.full(4000, 50), np.zeros(200_000))
    alone = commanded_travel(actions[-50:], np.array([0]), np.array([50]), np.zeros(50))
    np.testing.assert_allclose(travel[-50:], alone, atol=1e-6)
    assert not travel[starts].any()


def test_dynamics_clips_are_what_a_rollout_would_see(caches):
    """An anchor, perhaps a gap, then consecutive frames; all from one episode, counted from the anchor."""
    batches = make_batches(caches)
    actions = {index: make_episode(index, 40 if index == 5 else 30 + index).actions for index in (0, 1, 2, 3, 5)}
    from_here, clips, seen = 0, 0, set()
    for step in range(12):
        batch = batches(step)
        assert batch["tokens"].shape == batch["next_tokens"].shape == (32, 6, 1, 2)
        assert batch["tokens"].dtype == torch.uint8 and batch["times"].dtype == batch["seed"].dtype == torch.int64
        for name, dim in (("action", 7), ("previous_action", 7), ("travel", 6)):
            assert batch[name].shape == (32, 6, dim) and batch[name].dtype == torch.float32
        for b in range(32):
            episode, frames = batch["tokens"][b, :, 0].T.tolist()
            index, anchor = episode[0], frames[0]
            assert set(episode) == {index} and frames[1:] == list(range(frames[1], frames[1] + 5))
            assert anchor == 0 or anchor == frames[1] - 1
            assert batch["next_tokens"][b, :, 0].tolist() == [[index, frame + 1] for frame in frames]
            assert batch["next_watched"][b, :, 0].tolist() == [(frame + 1) % 3 == 0 for frame in frames]
            assert batch["contact"][b].tolist() == [frame % 4 for frame in frames]
            assert batch["next_contact"][b].tolist() == [(frame + 1) % 4 for frame in frames]
            assert batch["times"][b].tolist() == [frame - anchor for frame in frames]
            sent = actions[index]
            np.testing.assert_array_equal(batch["action"][b], sent[frames])
            rest = np.array([0, 0, 0, 0, 0, 0, sent[anchor, 6]], dtype=np.float32)
            np.testing.assert_array_equal(batch["previous_action"][b], [rest, *sent[np.array(frames[1:]) - 1]])
            went = (np.arange(1, len(sent) + 1) % 4 != Contact.BLOCKED)[:, None] * sent[:, :6]
            travel = [went[anchor:frame].sum(axis=0) for frame in frames]
            np.testing.assert_allclose(batch["travel"][b], travel, atol=1e-4)
            if frames[1] > 1:
                from_here, clips = from_here + (anchor > 0), clips + 1
            seen.add((index, frames[1]))
    assert from_here / clips == pytest.approx(FROM_HERE_FRACTION, abs=0.1)
    assert len(seen) > 100 and len({batches(step)["seed"].item() for step in range(5)}) == 5


class Reader:
    """Reads a text as one word, its length."""

    feature_dim, max_words = 1, 2

    def __init__(self):
        self.read = []

    def __call__(self, texts):
        self.read += texts
        return torch.tensor([[[len(text)], [0]] for text in texts], dtype=torch.float32)


def make_clips(caches, **changes) -> TokenClipBatches:
    settings = {"clip_length": 5, "batch_size": 16, "seed": 1}
    return TokenClipBatches(caches, [frame_names(cache) for cache in caches], **settings | changes)


def test_token_clips_are_consecutive_frames_with_their_actions_and_text(caches):
    reader = Reader()
    batches = make_clips(caches, text_encoder=reader)
    assert reader.read == ["left", "right"]
    untold, seen = 0, set()
    for step in range(20):
        batch = batches(step)
        assert batch["tokens"].shape == (16, 5, 1, 2) and batch["text"].shape == (16, 2, 1)
        for b in range(16):
            (index, *_), frames = batch["tokens"][b, :, 0].T.tolist()
            assert frames == list(range(frames[0], frames[0] + 5))
            sent = make_episode(index, 40 if index == 5 else 30 + index).actions
            np.testing.assert_array_equal(batch["action"][b, :-1], sent[frames[:-1]])
            text = batch["text"][b, :, 0].tolist()
            assert text in ([0, 0], [len(list(SCENES)[index % 2]), 0])
            untold += text == [0, 0]
            seen.add((index, frames[0]))
    assert 0.05 < untold / 320 < 0.15 and len(seen) > 80
    assert "text" not in make_clips(caches)(0)


def test_every_so_many_token_batches_hold_single_frames(caches):
    batches = make_clips(caches, image_every=3, text_encoder=Reader())
    shapes = [batches(step)["tokens"].shape[:2] for step in range(6)]
    assert shapes == [(80, 1), (16, 5), (16, 5)] * 2
    batch = batches(3)
    assert batch["action"].shape == (80, 1, 7)
    for (index, _), text in zip(batch["tokens"][:, 0, 0].tolist(), batch["text"][:, 0, 0].tolist(), strict=True):
        assert text in (0, len(list(SCENES)[index % 2]))
    again = make_clips(caches, image_every=3, text_encoder=Reader())(3)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(make_clips(caches)(0)["tokens"], make_clips(caches, seed=2)(0)["tokens"])


def test_imagined_clips_begin_where_their_rollout_did_and_aim_at_what_is_real(caches):
    cache = caches[0]
    imagined = frame_names(cache) + np.array([100, 0], dtype=np.uint8)  # another episode's name, the same frame's
    batches = make_batches([cache, cache], watched=[frame_names(cache)[..., 1] > 0] * 2, imagined=[None, imagined])
    filmed = 0
    for step in range(4):
        batch = batches(step)
        for seen, then in zip(batch["tokens"][:, :, 0], batch["next_tokens"][:, :, 0], strict=True):
            assert (then[:, 0] == then[0, 0]).all() and then[0, 0] < 4
            np.testing.assert_array_equal(seen[:, 1] + 1, then[:, 1])
            if seen[0, 0] < 100:
                filmed += 1
                assert torch.equal(seen[:, 0], then[:, 0])
            else:
                assert seen[0, 1] == 0 and torch.equal(seen[:, 0], then[:, 0] + 100)
    assert 0.3 < filmed / 128 < 0.7


def test_frames_of_another_size_are_named(caches, tokenizer):
    other = PatchTokenizer(replace(tokenizer.config, image_size=64)).eval()
    with pytest.raises(ValueError, match=r"caches0/a: frames must be 64 x 64, got 32 x 32"):
        encode_cache(other, caches[0])


def test_video_batches_alternate_clips_and_frames(caches):
    batches = VideoBatches(Mixture(caches), clip_length=5, batch_size=6, seed=0, image_every=3)
    episodes = {index: make_episode(index, 40 if index == 5 else 30 + index) for index in (0, 1, 2, 3, 5)}
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
    assert seen == {0, 1, 2, 3, 5}
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
    with pytest.raises(ValueError, match=r"caches0/a: clip_length must be at most 33, its longest episode, got 34"):
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
