"""The network against formulas written out by hand, and what each token may see."""

import math

import pytest
import torch
from token_clips import SIZES, clip, make_decoder
from torch.nn import functional as F

from wfm_core.models.positions import RopeConfig, rotations, sinusoids
from wfm_core.models.transformer import Transformer, join_levels, nll_and_square, split_levels
from wfm_core.models.transformer_blocks import whole
from wfm_core.models.transformer_config import TransformerConfig
from wfm_core.sampling import random_hidden

S = 8  # tokens of a frame


def make_model(**changes) -> Transformer:
    return make_decoder(Transformer, **{"corruption": 0.0} | changes)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sees(before: torch.Tensor, after: torch.Tensor) -> list[tuple[int, ...]]:
    """Where features (1, T, S, D) differ: (frame, token) pairs."""
    return [tuple(index) for index in (before != after).any(dim=-1)[0].nonzero().tolist()]


# --- tokens and positions ------------------------------------------------------------------------------------------


def test_words_are_levels_or_one_number():
    levels = (3, 2, 4)
    every = torch.cartesian_prod(*map(torch.arange, levels))
    joined = join_levels(every, levels)
    assert sorted(joined.tolist()) == list(range(24))
    assert torch.equal(split_levels(joined, levels), every)
    assert join_levels(torch.tensor([2, 1, 3], dtype=torch.uint8), levels) == 2 + 3 * 1 + 6 * 3
    for factorised in (True, False):
        model = make_model(factorised=factorised)
        tokens, _ = clip(model, 2, 3)
        words = model.to_words(tokens)
        assert words.shape == (2, 3, S, 2 if factorised else 1)
        assert torch.equal(model.to_tokens(words), tokens) and model.to_tokens(words).dtype == torch.uint8
        second = tokens[0, 0, 0, 2:].long()  # the first cell's second group
        assert words[0, 0, 1].tolist() == (second.tolist() if factorised else [int(second[0] + 3 * second[1])])


def test_a_token_is_the_sum_of_its_words_embeddings_and_its_kind():
    model = make_model(num_cameras=2)
    words = model.to_words(clip(model, 1, 1)[0])[0, 0]
    lead = some(24)
    slots = torch.arange(17)
    x = model.inputs(F.pad(words, (0, 0, 1, 0)), lead, slots)
    hot = F.one_hot(words, 3).double().flatten(-2)
    # Camera 0, then camera 1, and within each the two groups of every cell.
    kinds = torch.tensor([1, 2] * 4 + [3, 4] * 4)
    torch.testing.assert_close(x[1:], hot @ model.embed_words.weight + model.embed_kind.weight[kinds])
    torch.testing.assert_close(x[0], lead + model.embed_kind.weight[0])
    assert model.places.tolist() == [[0, 0]] + 2 * [[r, c] for r in range(2) for c in range(2) for _ in range(2)]
    some_slots = torch.tensor([5, 0, 16])
    ragged = model.inputs(F.pad(words, (0, 0, 1, 0))[some_slots], lead, some_slots)
    assert torch.equal(ragged, x[some_slots])


def test_a_masked_copy_says_what_it_hides():
    model = make_model()
    words = F.pad(model.to_words(clip(model, 1, 1)[0])[0, 0], (0, 0, 1, 0))
    slots = torch.arange(9)
    hidden = torch.tensor([False, True, False] + [True] * 6)
    plain, copy = model.inputs(words, some(24), slots), model.inputs(words, some(24), slots, hidden)
    kinds, masked = model.embed_kind.weight[model.kinds], model.embed_masked.weight
    torch.testing.assert_close(copy[0], plain[0])
    torch.testing.assert_close(copy[2], plain[2] + masked[0])
    torch.testing.assert_close(copy[hidden], masked[1] + kinds[hidden])


def test_actions_are_normalised_by_their_ranges():
    model = make_model()
    seen = []
    model.embed_action[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.lead(torch.tensor([[0.05] * 3 + [0.25] * 3 + [1.0], [-0.05] * 3 + [-0.25] * 3 + [0.0]]))
    torch.testing.assert_close(seen[0], torch.tensor([[1.0] * 7, [-1.0] * 7], dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_absolute_embedding_is_added_in_every_block_and_no_later_than_trained():
    model = make_model(num_layers=3, rope=RopeConfig(trained_frames=4))
    for block in model.blocks:
        block.attention.out.weight.zero_()
        block.ffn.down.weight.zero_()
    slots, times = torch.tensor([0, 7]), torch.tensor([[2, 9]])
    sight = model.sight(times, slots, whole(2, torch.zeros(1, 1, 2, 2, dtype=torch.float64)))
    x = some(1, 2, 24)
    waves = sinusoids(torch.tensor([[2, 0, 0], [3, 1, 1]]), 24).double()  # slot 7 is of the last cell
    expected = x + 3 * waves @ model.embed_position.weight.T
    torch.testing.assert_close(model.run(x, sight, None, lambda _, own: own), model.norm(expected))
    cosines, _ = rotations(torch.tensor([[2, 0, 0], [9, 1, 1]]), 8, model.config.rope)  # turns go on
    assert torch.equal(sight.cosines[0, 0], cosines)


def test_frame_rates_stretch_time(monkeypatch):
    model = make_model(window=8)
    tokens, actions = clip(model, 2, 4)
    words = model.to_words(tokens)
    fps = torch.tensor([5.0, 10.0])
    both, _ = model.clip_features(words, actions[:, :-1], fps=fps)
    plain, _ = model.clip_features(words, actions[:, :-1])
    torch.testing.assert_close(both[0], plain[0])
    assert ((both[1] - plain[1]).abs().amax(dim=(1, 2)) > 1e-3).all()
    seen, sight = [], model.sight
    monkeypatch.setattr(model, "sight", lambda times, *args: seen.append(times) or sight(times, *args))
    model.clip_features(words, actions[:, :-1], fps=fps)
    assert seen[0].unflatten(1, (4, 9))[..., 0].tolist() == [[0, 1, 2, 3], [0, 0.5, 1, 1.5]]


# --- who sees what -------------------------------------------------------------------------------------------------


def features_of(model, words, actions, **more):
    return model.clip_features(words, actions[:, :-1], **more)


def test_a_token_sees_those_before_it_in_the_window_and_the_first_frame():
    model = make_model(num_layers=1)  # so that nothing is passed on; the window is of three frames
    tokens, actions = clip(model, 1, 6)
    words = model.to_words(tokens)
    before, _ = features_of(model, words, actions)
    for frame, reached in ((0, [1, 2, 3, 4, 5]), (1, [2, 3]), (3, [4, 5]), (4, [5])):
        for token in (0, 4, 7):
            other = words.clone()
            other[0, frame, token, 0] = (other[0, frame, token, 0] + 1) % 3
            later = [(frame - 1, s) for s in range(token + 1, S)] if frame else []
            expected = later + [(f - 1, s) for f in reached for s in range(S)]
            assert sees(before, features_of(model, other, actions)[0]) == expected


def test_later_tokens_and_actions_leave_earlier_features_alone():
    model = make_model(window=8)
    tokens, actions = clip(model, 1, 5)
    words = model.to_words(tokens)
    before, _ = features_of(model, words, actions)
    for frame in range(4):
        other = actions.clone()
        other[0, frame] += 0.02
        expected = [(f, s) for f in range(frame, 4) for s in range(S)]  # feature f is of frame f + 1
        assert sees(before, features_of(model, words, other)[0]) == expected
        other = words.clone()
        other[0, frame, 3, 1] = 1 - other[0, frame, 3, 1]
        own = [(frame - 1, s) for s in range(4, S)] if frame else []
        assert sees(before, features_of(model, other, actions)[0]) == own + expected


def test_a_first_frame_that_no_action_led_to_is_not_one_that_rest_led_to():
    model = make_model()
    tokens, actions = clip(model, 1, 2)
    before, _ = features_of(model, model.to_words(tokens), actions)
    model.embed_no_action.weight += 1
    assert len(sees(before, features_of(model, model.to_words(tokens), actions)[0])) == S


def test_a_masked_copy_sees_itself_and_earlier_frames_but_not_what_it_hides():
    model = make_model(num_layers=1)
    tokens, actions = clip(model, 1, 6)
    words = model.to_words(tokens)
    hidden = torch.rand(1, 5, S, generator=torch.Generator().manual_seed(0)) < 0.5
    plain, _ = features_of(model, words, actions)
    raster, copies = features_of(model, words, actions, masked=(words[:, 1:], hidden))
    torch.testing.assert_close(raster, plain)  # the copies are nobody else's business

    def change(where):
        return torch.where(where[..., None], 1 - words.clamp(max=1), words)

    secret = change(F.pad(hidden, (0, 0, 1, 0)))
    same = features_of(model, words, actions, masked=(secret[:, 1:], hidden))[1]
    assert torch.equal(copies, same)
    for frame, reached in ((0, [1, 2, 3, 4, 5]), (1, [2, 3]), (3, [4, 5]), (5, [])):
        only = torch.zeros(1, 6, S, dtype=torch.bool)
        only[0, frame] = True
        after = features_of(model, change(only), actions, masked=(words[:, 1:], hidden))[1]
        assert sees(copies, after) == [(f - 1, s) for f in reached for s in range(S)]
        if frame:
            shown = features_of(model, words, actions, masked=(change(only)[:, 1:], hidden))[1]
            assert sees(copies, shown) == [(frame - 1, s) for s in range(S)]


def test_a_deep_copy_never_sees_its_own_frame_by_way_of_others():
    model = make_model(num_layers=3)
    tokens, actions = clip(model, 1, 4)
    words, hidden = model.to_words(tokens), torch.ones(1, 3, S, dtype=torch.bool)
    copies = features_of(model, words, actions, masked=(words[:, 1:], hidden))[1]
    other = words.clone()
    other[:, 2:, :, 0] = (other[:, 2:, :, 0] + 1) % 3
    after = features_of(model, other, actions, masked=(other[:, 1:], hidden))[1]
    assert sees(copies, after) == [(2, s) for s in range(S)]  # only the copy of the last frame, by way of the third


def test_cameras_are_told_apart():
    model = make_model(num_cameras=2)
    tokens, actions = clip(model, 1, 2)
    words = model.to_words(tokens)
    swapped = torch.cat([words[:, :, S:], words[:, :, :S]], dim=2)
    hidden = torch.zeros(1, 1, 2 * S, dtype=torch.bool)

    def swaps_along() -> bool:
        first, second = (
            features_of(model, words, actions, masked=(copied[:, 1:], hidden))[1] for copied in (words, swapped)
        )
        return torch.allclose(torch.cat([first[:, :, S:], first[:, :, :S]], dim=2), second)

    assert not swaps_along()
    model.embed_kind.weight[3:] = model.embed_kind.weight[1:3]
    assert swaps_along()


def test_text_counts_only_when_given():
    model = make_model(text_dim=6)
    tokens, actions = clip(model, 2, 3)
    words, text = model.to_words(tokens), some(2, 4, 6)
    without, _ = features_of(model, words, actions)
    told, _ = features_of(model, words, actions, text=text)
    assert ((told - without).abs().amax(dim=-1) > 1e-3).all()
    # No words are no text, and what pads a text is not part of it.
    padded = torch.stack([text[0], 0 * text[1]])
    mixed, _ = features_of(model, words, actions, text=padded)
    torch.testing.assert_close(mixed, torch.stack([told[0], without[1]]))
    longer, _ = features_of(model, words, actions, text=F.pad(text, (0, 0, 0, 3)))
    torch.testing.assert_close(longer, told)
    other, _ = features_of(model, words, actions, text=text.flip(0))
    assert ((other - told).abs().amax(dim=-1) > 1e-3).all()
    with pytest.raises(ValueError, match="text_dim above 0, got 0"):
        make_model().read(text)


# --- training ------------------------------------------------------------------------------------------------------


def training_batch(model: Transformer, seed: int = 3) -> dict[str, torch.Tensor]:
    tokens, actions = clip(model, 4, 5)
    tokens[:, 1:, :2] = tokens[:, :1, :2]  # half of the cells stand still
    return {"tokens": tokens, "action": actions, "seed": torch.tensor(seed)}


@pytest.mark.parametrize("factorised", [True, False])
def test_the_training_loss_by_hand(factorised):
    model = make_model(num_draft_heads=2, factorised=factorised, draft_weight=0.3, draft_decay=0.5, parallel=0.25)
    batch = training_batch(model)
    loss, metrics = model(batch)
    words = model.to_words(batch["tokens"])
    target = words[:, 1:]
    _, hidden = model._draw(batch["tokens"], batch["seed"])
    raster, copies = features_of(model, words, batch["action"], masked=(target, hidden))

    def nll(features, word):
        logits = (model.head.weight @ features).view(model.config.num_parts, model.config.num_words)
        if factorised:
            logits[1, 2] = float("-inf")  # the second dimension has two levels
        total = logits.exp().sum(dim=-1)
        return -(logits.gather(1, word[:, None])[:, 0].exp() / total).log().mean(), (total.log() ** 2).mean()

    def mean(values):
        return sum(values) / len(values)

    index = [(b, t, s) for b in range(4) for t in range(4) for s in range(S)]
    plain = [nll(raster[i], target[i]) for i in index]
    masked = [nll(copies[i], target[i]) for i in index if hidden[i]]
    expected = 0.75 * (mean([x for x, _ in plain]) + 3e-4 * mean([z for _, z in plain]))
    expected += 0.25 * (mean([x for x, _ in masked]) + 3e-4 * mean([z for _, z in masked]))
    for k, weight in ((1, 0.3), (2, 0.15)):
        head = model.draft_heads[k - 1]
        drafts = []
        for b, t, s in index:
            if s + k < S:
                features = raster[b, t, s]
                drafted = features + F.silu(head.weight @ features + head.bias)
                drafts.append(nll(drafted, target[b, t, s + k])[0])
        expected += weight * mean(drafts)
        torch.testing.assert_close(metrics[f"draft{k}_nll"], mean(drafts))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["nll"], mean([x for x, _ in plain]))
    torch.testing.assert_close(metrics["masked_nll"], mean([x for x, _ in masked]))
    chosen = model.logits(raster).argmax(dim=-1)
    moved = [i for i in index if (target[i] != words[i]).any()]
    hits = [float((chosen[i] == target[i]).double().mean()) for i in moved]
    assert metrics["changed_accuracy"].item() == pytest.approx(mean(hits))
    assert 0 < len(moved) < len(index)


def test_a_single_frame_is_told_from_its_text():
    model = make_model(text_dim=6, parallel=0.25)
    tokens, actions = clip(model, 3, 1)
    batch = {"tokens": tokens, "action": actions, "seed": torch.tensor(0), "text": some(3, 2, 6)}
    words = model.to_words(tokens)
    seen, _ = model.clip_features(words, actions[:, :0], text=batch["text"])
    for s in range(S):  # token s is told by the text and by those before it
        other = words.clone()
        other[:, :, s:] = (other[:, :, s:] + 1) % 2
        again, _ = model.clip_features(other, actions[:, :0], text=batch["text"])
        torch.testing.assert_close(again[:, 0, : s + 1], seen[:, 0, : s + 1])
        assert s == S - 1 or (again[:, 0, s + 1] - seen[:, 0, s + 1]).abs().max() > 1e-3
    loss, metrics = model(batch)
    nll, square = nll_and_square(model.logits(seen), words)
    torch.testing.assert_close(metrics["nll"], nll.mean())
    _, hidden = model._draw(tokens, batch["seed"])
    _, copies = model.clip_features(words, actions[:, :0], masked=(words, hidden), text=batch["text"])
    masked_nll, masked_square = (part[hidden].mean() for part in nll_and_square(model.logits(copies), words))
    expected = 0.75 * (nll.mean() + 3e-4 * square.mean()) + 0.25 * (masked_nll + 3e-4 * masked_square)
    torch.testing.assert_close(loss, expected)
    assert model(batch | {"action": actions + 1})[0] == loss != model(batch | {"text": some(3, 2, 6, seed=9)})[0]


def test_a_model_that_begins_to_read_is_as_it_was():
    torch.manual_seed(0)
    deaf = Transformer(TransformerConfig(**SIZES))
    reader = Transformer(TransformerConfig(**SIZES, text_dim=6))
    reader.load_state_dict(reader.state_dict() | deaf.state_dict())
    batch = training_batch(deaf)
    assert torch.equal(reader(batch | {"text": some(4, 3, 6).float()})[0], deaf(batch)[0])


def test_z_loss_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0]]], dtype=torch.float64)
    nll, square = nll_and_square(logits, torch.tensor([[1, 0]]))
    torch.testing.assert_close(nll, torch.tensor([(math.log(4 / 3) + math.log(2)) / 2], dtype=torch.float64))
    expected = (math.log(4) ** 2 + (5 + math.log(2)) ** 2) / 2
    torch.testing.assert_close(square, torch.tensor([expected], dtype=torch.float64))


def test_a_loss_is_a_function_of_batch_and_seed():
    model = make_model()
    assert model(training_batch(model))[0] == model(training_batch(model))[0]
    assert model(training_batch(model))[0] != model(training_batch(model, seed=4))[0]


@pytest.mark.parametrize("bf16", [False, True])
def test_everything_is_trained(bf16):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SIZES, num_draft_heads=2, text_dim=6))
    for block in model.blocks:
        block.text_attention.out.weight.data.normal_()  # it begins at zero, and hides what is before it
    batch = training_batch(model) | {"text": some(4, 3, 6).float(), "fps": torch.full((4,), 10.0)}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, metrics = model(batch)
    loss.backward()
    assert loss.dtype == torch.float32 and all(value.ndim == 0 for value in metrics.values())
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name


def test_half_of_the_frames_are_hidden_whole():
    hidden = random_hidden((100, 40), S, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert hidden.shape == (100, 40, S)
    whole = hidden.all(dim=-1).float().mean()
    assert 0.5 < whole < 0.75  # some of the other half come out whole by chance
    assert 0.4 < hidden[~hidden.all(dim=-1)].float().mean() < 0.65


def test_corruption_moves_levels_by_one_and_spares_the_first_frame():
    model = make_model(corruption=0.8)
    tokens = clip(model, 64, 5)[0]
    seen, _ = model._draw(tokens, torch.tensor(0))
    moved = seen - tokens.long()
    assert not moved[:, 0].any() and set(moved.unique().tolist()) == {-1, 0, 1}
    assert ((seen >= 0) & (seen < torch.tensor(model.config.cell_levels))).all()
    assert 0.15 < (moved[:, 1:] != 0).float().mean() < 0.4  # 0.4 of them, less those that hit an end
    assert torch.equal(make_model()._draw(tokens, torch.tensor(0))[0], tokens.long())
    batch = training_batch(model)
    other = make_model()
    other.load_state_dict(model.state_dict())
    assert model(batch)[0] != other(batch)[0]


def test_clips_must_fit_the_rotary_positions():
    model = make_model(rope=RopeConfig(trained_frames=3, extension=1.5))
    tokens, actions = clip(model, 1, 5)
    batch = {"tokens": tokens, "action": actions, "seed": torch.tensor(0)}
    with pytest.raises(ValueError, match="span at most 4.5 frames at 5 Hz, got 5: raise rope.extension"):
        model(batch)
    assert model(batch | {"fps": torch.tensor([10.0])})[0].isfinite()
