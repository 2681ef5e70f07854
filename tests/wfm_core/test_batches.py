from dataclasses import replace

import numpy as np
import pytest
import torch
from wandering_block import LENGTHS, SCENES, make_caches, make_episode

from wfm_core.batches import DynamicsBatches, LatentClipBatches, TokenClipBatches, commanded_travel
from wfm_core.data.clip_cache import ClipCache
from wfm_core.encoding import encode_cache, latent_statistics
from wfm_core.models.motion import Contact
from wfm_core.tokenizers.batches import FROM_HERE_FRACTION, Mixture, TokenizerBatches
from wfm_core.tokenizers.patch import PatchTokenizer, PatchTokenizerConfig, to_float


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> list[ClipCache]:
    return make_caches(tmp_path_factory.mktemp("caches"))


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
    encode = tokenizer.encode

    def fail(frames):
        if len(frames) < 7:  # the last ones
            raise OSError("no space left")
        return encode(frames)

    with torch.no_grad():
        tokenizer.encoder[0].weight.mul_(2)
    monkeypatch.setattr(tokenizer, "encode", fail)
    with pytest.raises(OSError, match="no space"):
        encode_cache(tokenizer, caches[1], batch_size=7)
    monkeypatch.undo()
    assert encode_cache(tokenizer, caches[1]).shape == (40, 4, 2)


def test_continuous_latents_are_kept_beside_the_tokens(caches, tokenizer, monkeypatch):
    continuous = PatchTokenizer(replace(tokenizer.config, levels=(), latent_dim=3)).eval()
    latents = encode_cache(continuous, caches[1], batch_size=7)
    expected = continuous.encode(to_float(torch.from_numpy(np.array(caches[1].frames)))).detach()
    assert latents.shape == (40, 2, 2, 3) and latents.dtype == np.float16 and isinstance(latents, np.memmap)
    np.testing.assert_allclose(latents, expected.numpy(), atol=1e-3)
    monkeypatch.setattr(continuous, "encode", None)
    np.testing.assert_array_equal(encode_cache(continuous, caches[1]), latents)  # not encoded again
    with torch.no_grad():
        continuous.encoder[0].weight.mul_(-1)
    with pytest.raises(TypeError):  # but with other weights
        encode_cache(continuous, caches[1])


def test_statistics_are_those_of_all_latents_at_once():
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(n, 2, 3, 2)) * [3, 0] + [0.5, 7]).astype(np.float16) for n in (30, 9000)]
    mean, std = latent_statistics(parts)
    every = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(mean, every.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(std, [every[..., 0].std(), 0.01])  # what never varies is not blown up


def test_travel_is_what_was_commanded_so_far():
    actions = np.arange(35, dtype=np.float32).reshape(5, 7)
    contact = np.full(5, Contact.HELD)
    travel = commanded_travel(actions[:, :6], np.array([0, 3]), np.array([3, 2]), contact)
    assert travel.dtype == np.float32
    first = actions[:, :6]
    np.testing.assert_array_equal(travel, [0 * first[0], first[0], first[0] + first[1], 0 * first[0], first[3]])
    contact[[1, 4]] = Contact.BLOCKED, Contact.HELD_BLOCKED  # what led to these frames came to nothing
    travel = commanded_travel(actions[:, :6], np.array([0, 3]), np.array([3, 2]), contact)
    np.testing.assert_array_equal(travel, [0 * first[0], 0 * first[0], first[1], 0 * first[0], 0 * first[0]])


def test_travel_does_not_drift_over_many_episodes():
    rng = np.random.default_rng(0)
    actions = rng.normal(scale=0.05, size=(200_000, 7)).astype(np.float32) + 0.03
    starts = np.arange(0, 200_000, 50)
    travel = commanded_travel(actions[:, :6], starts, np.full(4000, 50), np.zeros(200_000))
    alone = commanded_travel(actions[-50:, :6], np.array([0]), np.array([50]), np.zeros(50))
    np.testing.assert_allclose(travel[-50:], alone, atol=1e-6)
    assert not travel[starts].any()


def test_dynamics_clips_are_what_a_rollout_would_see(caches):
    """An anchor, perhaps a gap, then consecutive frames; all from one episode, counted from the anchor."""
    batches = make_batches(caches)
    actions = {index: make_episode(index).actions for index in LENGTHS}
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
            sent = make_episode(index).actions
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


def test_latent_clips_are_token_clips_of_latents_whatever_the_cache(caches):
    names = [frame_names(cache) for cache in caches]
    latents = [part[:, :, None].astype(np.float16) for part in names]
    settings = {"clip_length": 5, "batch_size": 16, "seed": 1, "image_every": 3, "text_encoder": Reader()}
    for step in range(4):
        made, expected = LatentClipBatches(caches, latents, **settings)(step), make_clips(caches, **settings)(step)
        assert torch.equal(made.pop("latents")[:, :, :, 0].to(torch.uint8), expected.pop("tokens"))
        length = expected["action"].shape[1]
        assert torch.equal(made.pop("times"), torch.arange(length).expand(expected["action"].shape[:2]))
        travel = expected["action"][..., :6].cumsum(dim=1) - expected["action"][..., :6]
        torch.testing.assert_close(made.pop("travel"), travel)
        assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


def test_latent_clips_begin_with_their_episodes_first_frame_where_that_is_in_sight(caches):
    latents = [frame_names(cache)[:, :, None].astype(np.float16) for cache in caches]
    names = [frame_names(cache)[..., 1] % 3 == 0 for cache in caches]
    batches = LatentClipBatches(caches, latents, clip_length=5, batch_size=32, seed=1, span=9, watched=names)
    back, near = 0, 0
    for step in range(12):
        batch = batches(step)
        for b in range(32):
            (index, *others), frames = batch["latents"][b, :, 0, 0].T.int().tolist()
            sent = make_episode(index).actions
            assert set(others) == {index} and frames[1:] == list(range(frames[1], frames[1] + 4))
            assert frames[0] in (0, frames[1] - 1) and batch["times"][b].tolist() == [f - frames[0] for f in frames]
            travel = [sent[frames[0] : frame, :6].sum(axis=0) for frame in frames]
            np.testing.assert_allclose(batch["travel"][b], travel, atol=1e-5)
            np.testing.assert_array_equal(
                batch["action"][b, :-1], sent[np.array(frames[1:]) - 1]
            )  # sent before the next
            assert frames[-1] < 9 or frames[0] == frames[1] - 1
            watched = batch["watched"][b].flatten(1)
            assert batch["watched"].shape == batch["latents"].shape[:-1]
            assert torch.equal(watched, torch.tensor([[frame % 3 == 0] for frame in frames]).expand_as(watched))
            if 1 < frames[1] and frames[-1] < 9:
                back, near = back + (frames[0] == 0), near + 1
    assert back / near == pytest.approx(1 - FROM_HERE_FRACTION, abs=0.12)


def test_latent_clips_may_show_what_was_imagined_and_aim_at_what_is_real(caches):
    cache = caches[0]
    real = frame_names(cache)[:, :, None].astype(np.float16)
    imagined = real + np.array([100, 0], dtype=np.float16)  # another episode's name, the same frame's
    sizes = {"clip_length": 5, "batch_size": 32, "seed": 1, "span": 50}
    batches = LatentClipBatches([cache, cache], [real, real], imagined=[None, imagined], **sizes)
    filmed = 0
    for step in range(4):
        batch = batches(step)
        for seen, true in zip(batch["seen"][:, :, 0, 0], batch["latents"][:, :, 0, 0], strict=True):
            assert torch.equal(seen[:, 1], true[:, 1]) and (true[:, 0] < 4).all()
            if torch.equal(seen, true):
                filmed += 1
            else:
                assert seen[0, 1] == 0 and torch.equal(seen[:, 0], true[:, 0] + 100)
    assert 0.3 < filmed / 128 < 0.7
    near = LatentClipBatches([cache], [real], imagined=[imagined], **sizes | {"span": 6})
    for batch in map(near, range(4)):  # a clip that does not reach back to its episode's first frame is as filmed
        shown, true = batch["seen"][:, :, 0, 0], batch["latents"][:, :, 0, 0]
        begun = shown[:, 0, 1] == 0
        assert 0 < begun.sum() < 32 and torch.equal(shown[~begun], true[~begun])
        assert torch.equal(shown[begun][..., 0], true[begun][..., 0] + 100)
    assert not {"seen", "watched"} & LatentClipBatches([cache], [real], **sizes)(0).keys()


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
