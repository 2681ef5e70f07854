"""Generation against the whole-sequence pass, in three ways, and in a world small enough to be learnt by heart."""

from dataclasses import replace

import pytest
import torch
from token_clips import check_rows_and_branches, clip, make_decoder
from torch.nn import functional as F

from wfm_core.models.decoding import TransformerModel
from wfm_core.models.positions import RopeConfig
from wfm_core.models.transformer_config import TransformerConfig
from wfm_core.sampling import choose, reveal_counts, row_uniform
from wfm_core.train import TrainConfig, fit
from wfm_core.world_model import merge_rows

S = 8  # tokens of a frame
WAYS = ("raster", "speculative", "parallel")


def make_model(**changes) -> TransformerModel:
    return make_decoder(TransformerModel, **{"num_draft_heads": 3} | changes)


def roll_out(model, tokens, actions, *, context: int = 1, seeds=None, **more):
    """The clip's context followed by what the model makes of it, (B, T, ...), the uncertainties, the last state."""
    seeds = range(5, 5 + len(tokens)) if seeds is None else seeds
    state = model.start(tokens[:, :context], actions[:, : context - 1], seeds, **more)
    frames, doubts = [tokens[:, :context]], []
    for t in range(context - 1, actions.shape[1]):
        state, doubt = model.step(state, actions[:, t])
        frames.append(state["tokens"][:, None])
        doubts.append(doubt)
    return torch.cat(frames, dim=1), torch.stack(doubts, dim=1), state


def count_passes(model, monkeypatch) -> list[tuple[int, ...]]:
    """The shape of what each pass through the blocks takes."""
    shapes, run = [], model.run

    def watched(x, *args):
        shapes.append(tuple(x.shape))
        return run(x, *args)

    monkeypatch.setattr(model, "run", watched)
    return shapes


# --- the cached passes are the network over the whole clip ---------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"window": 1}, {}),
        ({"window": 8}, {"fps": 10.0}),
        ({"factorised": False, "temperature": 0.9}, {}),
        ({"num_cameras": 2, "temperature": 0.7, "num_kv_heads": 4}, {}),
        ({"text_dim": 6, "rope": RopeConfig(extension=2.0)}, {"text": torch.linspace(-1, 1, 36).view(2, 3, 6)}),
    ],
)
def test_token_by_token_equals_the_whole_sequence(changes, more):
    model = make_model(decoding="raster", **changes)
    config = model.config
    given, actions = clip(model, 2, 6)
    tokens, doubts, _ = roll_out(model, given, actions, context=2, **more)
    told = {name: torch.full((2,), value) if name == "fps" else value for name, value in more.items()}
    features, _ = model.clip_features(model.to_words(tokens), actions, **told)
    logits = model.logits(features)[:, 1:]  # of the frames after the context
    words = model.to_words(tokens)[:, 2:]
    for step in range(5):
        numbers = row_uniform(torch.tensor([5, 6]), torch.full((2,), step), 0, config.frame_tokens * config.num_parts)
        expected = choose(logits[:, step], config.temperature, numbers.view(words[:, step].shape))
        assert torch.equal(words[:, step], expected)
    log_p = logits.log_softmax(dim=-1).gather(-1, words[..., None]).squeeze(-1).mean(dim=-1)
    torch.testing.assert_close(doubts.double(), 1 - log_p.exp().mean(dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_whole_frame_at_once_equals_the_masked_copy_of_the_whole_sequence(window):
    model = make_model(refine_steps=1, window=window)
    given, actions = clip(model, 2, 6)
    tokens, doubts, _ = roll_out(model, given, actions, context=2)
    words = model.to_words(tokens)
    hidden = torch.ones(2, 6, S, dtype=torch.bool)
    _, copies = model.clip_features(words, actions, masked=(words[:, 1:], hidden))
    log_p, expected = model.logits(copies)[:, 1:].log_softmax(dim=-1).max(dim=-1)
    assert torch.equal(words[:, 2:], expected)
    torch.testing.assert_close(doubts.double(), 1 - log_p.mean(dim=-1).exp().mean(dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decoding", WAYS)
def test_what_was_generated_is_context_like_any_other(decoding):
    model = make_model(decoding=decoding, temperature=0.8)
    given, actions = clip(model, 2, 5)
    tokens, _, state = roll_out(model, given, actions)
    again = model.start(tokens, actions, [5, 6])
    assert state["step"].tolist() == [5, 5] and again["step"].tolist() == [0, 0]
    assert again.keys() == state.keys()
    for name in again.keys() - {"step"}:
        torch.testing.assert_close(again[name], state[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("window", [1, 2, 8])
def test_a_frame_that_waits_is_seen_as_if_it_did_not(window):
    """Between frames decoded at once, one that is not; what follows is as if all had been context."""
    model = make_model(refine_steps=2, window=window)
    given, actions = clip(model, 2, 5)
    tokens, _, state = roll_out(model, given, actions[:, :3])
    raster = make_model(decoding="raster", window=window)
    settled = raster.start(tokens, actions[:, :3], [5, 6])
    expected, _ = raster.step(settled, actions[:, 3])
    got, _ = model.step_token_by_token(state, actions[:, 3])
    assert "lead" in state and got.keys() == expected.keys()
    for name in got.keys() - {"step"}:
        torch.testing.assert_close(got[name], expected[name])
    again = model.start(torch.cat([tokens, got["tokens"][:, None]], dim=1), actions[:, :4], [5, 6])
    assert torch.equal(model.step(again, actions[:, 4])[0]["tokens"], model.step(got, actions[:, 4])[0]["tokens"])


# --- drafts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("factorised", [True, False])
def test_drafts_change_nothing_but_the_number_of_passes(factorised, temperature):
    model = make_model(decoding="speculative", temperature=temperature, factorised=factorised)
    plain = make_model(decoding="raster", temperature=temperature, factorised=factorised)
    given, actions = clip(model, 4, 5)
    both = [roll_out(m, given, actions) for m in (model, plain)]
    assert torch.equal(both[0][0], both[1][0])
    torch.testing.assert_close(both[0][1], both[1][1])
    for name, value in both[0][2].items():
        torch.testing.assert_close(value, both[1][2][name])
    state = model.start(given[:, :1], actions[:, :0], range(4))
    by_token = model.step_token_by_token(state, actions[:, 0])[0]
    assert torch.equal(by_token["tokens"], model.step(state, actions[:, 0])[0]["tokens"])


def test_right_drafts_save_passes_and_wrong_ones_cost_none(monkeypatch):
    model = make_model(decoding="speculative")
    given, actions = clip(model, 3, 1)
    state = model.start(0 * given, actions[:, :0], range(3))
    shapes = count_passes(model, monkeypatch)

    def always(features):
        return torch.tensor([0.5, 1.0, 0.0]).expand(*features.shape[:-1], 2, 3)

    monkeypatch.setattr(model, "logits", always)
    after, _ = model.step(state, actions[:, 0])
    assert (after["tokens"] == 1).all()
    assert shapes == [(3, 4, 24)] * 3  # 9 slots: one, as the tokens of the frame before were wrong, then twice four
    still, _ = model.step({**state, "tokens": after["tokens"]}, actions[:, 0])
    assert torch.equal(still["tokens"], after["tokens"]) and len(shapes) == 3 + 3  # four, four, one
    shapes.clear()
    config, model.config = model.config, replace(model.config, temperature=1.0)
    drawn, _ = model.step(state, actions[:, 0])  # a draft is drawn by the number of the token that it guesses
    assert len(shapes) == 3 and len(drawn["tokens"].unique()) == 3
    model.config = config
    shapes.clear()

    def never(features):
        return always(features) * (-1 if features.shape[1] == 1 else 1)  # a draft is of one token a row

    monkeypatch.setattr(model, "logits", never)
    assert torch.equal(model.step(state, actions[:, 0])[0]["tokens"], after["tokens"])
    assert shapes == [(3, 4, 24)] * 9


def test_rows_accept_drafts_at_their_own_pace(monkeypatch):
    model = make_model(decoding="speculative", temperature=0.3)
    given, actions = clip(model, 4, 2)
    shapes = count_passes(model, monkeypatch)

    def passes(rows) -> tuple[int, torch.Tensor]:
        state = model.start(given[rows, :1], actions[rows, :0], torch.arange(4)[rows].tolist())
        shapes.clear()
        after, _ = model.step(state, actions[rows, 0])
        return len(shapes), after["tokens"]

    alone = [passes(slice(row, row + 1)) for row in range(4)]
    together, tokens = passes(slice(None))
    assert together == max(count for count, _ in alone) and min(count for count, _ in alone) < together
    assert torch.equal(tokens, torch.cat([mine for _, mine in alone]))


# --- refinement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine_steps", [1, 2, 5])
def test_refinement_reveals_everything_once_the_surest_first(monkeypatch, refine_steps):
    model = make_model(refine_steps=refine_steps, temperature=0.7)
    given, actions = clip(model, 3, 1)
    state = model.start(given, actions[:, :0], [1, 2, 3])
    calls, one_pass = [], model._pass

    waited = []

    def watched(canvas, words, slots, hidden, waiting):
        features = one_pass(canvas, words, slots, hidden, waiting)
        calls.append((words[:, 1:], hidden[:, 1:], model.logits(features[:, 1:])))
        waited.append(waiting is not None)
        return features

    monkeypatch.setattr(model, "_pass", watched)
    final = model.to_words(model.step(state, actions[:, 0])[0]["tokens"])
    refined = calls
    assert waited == [True] + [False] * (refine_steps - 1)  # the frame before comes along once
    assert len(refined) == refine_steps and refined[0][1].all()
    for draw, ((words, hidden, logits), count) in enumerate(zip(refined, reveal_counts(S, refine_steps), strict=True)):
        after = refined[draw + 1][1] if draw + 1 < refine_steps else torch.zeros_like(hidden)
        revealed = hidden & ~after
        assert not (after & ~hidden).any() and revealed.sum(dim=1).tolist() == [count] * 3
        assert torch.equal(words[~hidden], final[~hidden])
        numbers = row_uniform(state["seed"], state["step"], draw, 2 * S).view(3, S, 2)
        proposal = choose(logits, 0.7, numbers)
        assert torch.equal(final[revealed], proposal[revealed])
        confidence = logits.log_softmax(dim=-1).gather(-1, proposal[..., None]).squeeze(-1).mean(dim=-1)
        for row in range(3):
            left = confidence[row][after[row]]
            assert not len(left) or not count or confidence[row][revealed[row]].min() >= left.max()


# --- states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", WAYS)
def test_a_batch_equals_its_rows_and_a_branch_its_trunk(decoding):
    model = make_model(decoding=decoding, temperature=0.8)
    given, actions = clip(model, 3, 4)
    check_rows_and_branches(model, given, actions)


@pytest.mark.parametrize("decoding", WAYS)
def test_rows_restart_without_disturbing_the_others(decoding):
    model = make_model(decoding=decoding, temperature=0.5)
    given, actions = clip(model, 2, 6)
    _, _, state = roll_out(model, given[:, :1], actions[:, :4])
    fresh = model.start(given[:, 5:6], actions[:, :0], [1, 2])
    merged = merge_rows(torch.tensor([False, True]), fresh, state)
    expected = [model.step(state, actions[:, 4])[0], model.step(fresh, actions[:, 4])[0]]
    got, _ = model.step(merged, actions[:, 4])
    for name, value in got.items():
        torch.testing.assert_close(value, torch.stack([expected[0][name][0], expected[1][name][1]]))
    waiting = int(decoding == "parallel")
    assert got["count"].tolist() == [6 - waiting, 2 - waiting] and got["step"].tolist() == [5, 1]


@pytest.mark.parametrize("decoding", WAYS)
def test_states_are_values(decoding):
    model = make_model(decoding=decoding, temperature=1.0, text_dim=6)
    given, actions = clip(model, 2, 4)
    context = given[:, :2].clone()
    state = model.start(context, actions[:, :1], [0, 1], text=torch.ones(2, 3, 6))
    assert all(len(value) == 2 for value in state.values())
    copy = {name: value.clone() for name, value in state.items()}
    context.fill_(0)  # the caller's memory is not the state's
    after, _ = model.step(state, actions[:, 1])
    kept = {name: value.clone() for name, value in after.items()}
    again, _ = model.step(state, actions[:, 1])
    model.step(after, actions[:, 2])
    assert state.keys() == copy.keys() and all(torch.equal(state[name], copy[name]) for name in copy)
    assert all(torch.equal(after[name], again[name]) and torch.equal(after[name], kept[name]) for name in after)


@pytest.mark.parametrize("decoding", WAYS)
def test_samples_depend_on_the_row_seed_and_step_alone(decoding):
    model = make_model(decoding=decoding, temperature=2.0)
    given, actions = clip(model, 1, 1)
    four = model.start(given.expand(4, -1, -1, -1), actions[:, :0].expand(4, -1, -1), [3, 9, 3, 10])
    after, _ = model.step(four, actions[:, 0].expand(4, -1))
    assert torch.equal(after["tokens"][0], after["tokens"][2])
    assert (after["tokens"][0] != after["tokens"][1]).any() and (after["tokens"][1] != after["tokens"][3]).any()
    later, _ = model.step({**four, "step": four["step"] + 1}, actions[:, 0].expand(4, -1))
    assert (later["tokens"] != after["tokens"]).any()


@pytest.mark.parametrize("decoding", WAYS)
def test_levels_that_do_not_exist_are_never_chosen(decoding):
    model = make_model(decoding=decoding, temperature=100.0)
    given, actions = clip(model, 8, 3)
    tokens, doubts, state = roll_out(model, given[:, :1], actions)
    levels = torch.tensor(model.config.cell_levels)
    seen = F.one_hot(tokens[:, 1:].long(), 3).bool().flatten(0, 2).any(dim=0)
    assert torch.equal(seen, torch.arange(3) < levels[:, None])
    assert state["tokens"].dtype == torch.uint8 and ((0 <= doubts) & (doubts <= 1)).all()


# --- long rollouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", WAYS)
def test_a_rollout_ten_windows_long_takes_no_more_memory_than_a_short_one(decoding):
    model = make_model(decoding=decoding)
    given, actions = clip(model, 1, 30)
    states = [roll_out(model, given[:, :1], actions[:, :time])[2] for time in (1, 30)]
    held = [{name: value.untyped_storage().nbytes() for name, value in state.items()} for state in states]
    assert held[0] == held[1] and states[1]["count"].tolist() == [30 if decoding == "parallel" else 31]
    assert sum(held[1].values()) < 8 * 2 * 2 * 3 * 2 * 9 * 8 + 400  # float64: layers, keys and values, window, ...


@pytest.mark.parametrize("decoding", ["raster", "parallel"])
@pytest.mark.parametrize("fps", [5.0, 2.5])
def test_a_still_world_looks_the_same_however_long_it_has_stood(fps, decoding):
    model = make_model(rope=RopeConfig(trained_frames=4, extension=1.5), decoding=decoding)
    given, actions = clip(model, 1, 1)
    state = model.start(given, actions[:, :0], [0], fps=fps)
    words, slots = F.pad(model.to_words(given)[:, 0], (0, 0, 1, 0)), torch.arange(9)[None]
    looks = []
    for _ in range(60):
        lead = model.lead(actions[:, 0])
        canvas = model._open(state, lead)
        looks.append(model._pass(canvas, words, slots, waiting=canvas.waiting))
        first = canvas.seen.shape[1] - (0 if canvas.waiting is None else model.config.frame_slots)
        state = model._commit(state, canvas, first) | ({} if canvas.waiting is None else {"lead": lead})
    assert (looks[2] - looks[1]).abs().max() > 0.01
    torch.testing.assert_close(looks[59], looks[20], rtol=1e-4, atol=1e-4)  # angles are float32


def test_frame_rates_must_be_positive():
    model = make_model()
    given, actions = clip(model, 1, 1)
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        model.start(given, actions[:, :0], [0], fps=0)


# --- a whole small world -------------------------------------------------------------------------------------------


def small_world(batch: int, time: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A light in one of four cells: this action says which column, the action before which row; it leaves a trail.

    The dimensions of a cell's two tokens: lit, lit a frame ago; and two that differ from clip to clip and never change.
    """
    moves = torch.randint(0, 2, (batch, time, 2), generator=generator)
    row = F.pad(moves[:, :-1, 1], (1, 0))
    place = torch.cat([torch.randint(0, 4, (batch, 1), generator=generator), 2 * row + moves[..., 0]], dim=1)
    lit = F.one_hot(place, 4)
    trail = F.pad(lit[:, :-1], (0, 0, 1, 0))
    decor = (torch.rand(batch, 1, 4, 2, generator=generator) * torch.tensor([2, 3])).long().expand(-1, time + 1, -1, -1)
    tokens = torch.cat([torch.stack([lit, 2 * trail], dim=-1), decor], dim=-1).to(torch.uint8)
    actions = torch.zeros(batch, time, 7)
    actions[..., :2] = 0.05 * moves
    return tokens, actions


def test_a_small_world_is_learnt_by_heart_and_rolled_out_exactly_in_all_three_ways(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = TransformerConfig(
        levels=(2, 3), groups=2, grid=(2, 2), width=64, head_dim=16, num_layers=2, num_heads=4, num_kv_heads=2,
        ffn_dim=128, window=3, num_draft_heads=3, corruption=0.0, rope=RopeConfig(trained_frames=5),
    )  # fmt: skip
    model = TransformerModel(config)

    def batch_fn(step: int) -> dict[str, torch.Tensor]:
        tokens, actions = small_world(24, 4, torch.Generator().manual_seed(step))
        return {"tokens": tokens, "action": F.pad(actions, (0, 0, 0, 1)), "seed": torch.tensor(step)}

    settings = TrainConfig(num_steps=300, learning_rate=5e-3, warmup_steps=10, ema_decay=0.9, bf16=False)
    model.load_state_dict(fit(model, batch_fn, settings, tmp_path))
    model.eval().requires_grad_(False)
    tokens, actions = small_world(8, 20, torch.Generator().manual_seed(10_000))
    shapes, passes = count_passes(model, monkeypatch), {}
    for way in WAYS:
        model.config = replace(config, decoding=way)
        shapes.clear()
        for context in (1, 3):
            made, doubts, _ = roll_out(model, tokens, actions, context=context)
            assert torch.equal(made, tokens), way
            assert doubts.max() < 0.2
        passes[way] = len(shapes)
    assert passes["parallel"] == 2 + 38 * 2 and passes["raster"] == 4 + 38 * 9
    assert passes["speculative"] <= 4 + 38 * 5  # 3 if no draft were ever wrong


@pytest.mark.parametrize("decoding", WAYS)
def test_the_likeliest_alone_is_what_temperature_zero_gives(decoding):
    tokens, actions = clip(make_model(), 2, 4)
    sure = roll_out(make_model(decoding=decoding), tokens, actions)[0]
    narrow = roll_out(make_model(decoding=decoding, temperature=1.0, top_p=1e-6), tokens, actions)[0]
    wide = roll_out(make_model(decoding=decoding, temperature=1.0), tokens, actions)[0]
    assert torch.equal(sure, narrow) and not torch.equal(sure, wide)
