"""The model against the clip-wise pass, its own masks and a world small enough to be learnt by heart."""

import pytest
import torch
from token_clips import check_rows_and_branches
from torch.nn import functional as F

from wfm_core.data.actions import TRAVEL_SCALE, ActionSpace
from wfm_core.models.autoregressive import (
    LONGEST_STALL,
    RAYS_DIM,
    UNTOLD_ACTIONS,
    UNTOLD_CLIPS,
    AutoregressiveConfig,
)
from wfm_core.models.motion import Contact, Motion, is_blocked
from wfm_core.models.revealing import AutoregressiveModel
from wfm_core.models.text import pooled
from wfm_core.sampling import random_hidden, reveal_counts
from wfm_core.train import TrainConfig, fit
from wfm_core.world_model import merge_rows

SIZES = {
    "levels": (5, 3, 4, 2), "grid": 3, "groups": 2, "width": 16, "num_heads": 2, "mlp_ratio": 2, "num_layers": 4,
    "time_layers": (1, 3), "refiner_layers": 1, "window": 3, "refine_steps": 3,
}  # fmt: skip
LEVELS = torch.tensor(SIZES["levels"])


def make_model(**changes) -> AutoregressiveModel:
    """A model with large random weights, so that every input matters, in float64, so that equal means equal."""
    torch.manual_seed(0)
    model = AutoregressiveModel(AutoregressiveConfig(**SIZES | changes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.double().requires_grad_(False)


def clip(batch: int, time: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, T + 1, n, C) and physical actions (B, T, 7) that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.rand(batch, time + 1, 9, 4, generator=generator) * LEVELS).to(torch.uint8)
    scale = torch.tensor([0.05] * 3 + [0.25] * 3 + [0.5])
    actions = (2 * torch.rand(batch, time, 7, generator=generator) - 1) * scale + torch.tensor([0.0] * 6 + [0.5])
    return tokens, actions


def some_contacts(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    """(B, T) contact that means nothing, of every kind."""
    return torch.randint(0, len(Contact), (batch, time), generator=torch.Generator().manual_seed(seed))


def motion_of(actions: torch.Tensor, contact: torch.Tensor | None = None) -> Motion:
    """What went on over clips that begin with their episode: actions (B, T, 7); contact is unknown if None."""
    rest = torch.zeros_like(actions[:, :1])
    rest[..., 6] = actions[:, :1, 6]
    contact = torch.full(actions.shape[:2], Contact.UNKNOWN) if contact is None else contact
    went = ~is_blocked(contact[:, 1:, None])
    travel = F.pad((actions[:, :-1, :6] * went).cumsum(dim=1), (0, 0, 1, 0))
    times = torch.arange(actions.shape[1]).expand(actions.shape[:2])
    return Motion(actions, torch.cat([rest, actions[:, :-1]], dim=1), travel, times, contact)


def batch_of(tokens: torch.Tensor, actions: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    clip = {"tokens": tokens[:, :-1], "next_tokens": tokens[:, 1:], "seed": torch.tensor(seed)}
    clip["next_watched"] = torch.zeros(clip["tokens"].shape[:-1], dtype=torch.bool)
    clip["next_contact"] = torch.full(actions.shape[:2], Contact.UNKNOWN)
    return clip | motion_of(actions)._asdict()


def spy_on_refine(model, monkeypatch) -> list[dict]:
    calls, tell, refine = [], model.tell, model.refine
    told = {}

    def heard(features, next_contact):
        told.update(features=features, next_contact=next_contact)
        return tell(features, next_contact)

    def watched(features, current, known, hidden):
        logits = refine(features, current, known, hidden)
        calls.append(told | {"current": current, "known": known, "hidden": hidden.clone(), "logits": logits})
        return logits

    monkeypatch.setattr(model, "tell", heard)
    monkeypatch.setattr(model, "refine", watched)
    return calls


def dims(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden (..., groups) of two groups to hidden (..., 4 dimensions)."""
    return hidden.repeat_interleave(2, dim=-1)


# --- the cached steps are the network over the whole clip ----------------------------------------------------------


@pytest.mark.parametrize("changes", [{"window": 1}, {"window": 3}, {"window": 8}, {"patch_size": 3}])
def test_cached_steps_equal_the_whole_clip(changes):
    model = make_model(refine_steps=1, **changes)
    tokens, actions = clip(2, 7)
    contact = some_contacts(2, 8) % Contact.UNKNOWN
    contact[:, 0] = Contact.UNKNOWN
    current = model.one_hot(tokens[:, :-1])
    features = model.tell(model.trunk(current, motion_of(actions, contact[:, :-1])), contact[:, 1:])
    hidden = torch.ones(2, 7, 9, 2, dtype=torch.bool)
    logits = model.refine(features, current, torch.zeros_like(current), hidden)
    state = model.start(tokens[:, :1], actions[:, :0], [0, 1])
    for t in range(7):
        told = state | {"tokens": tokens[:, t], "next_contact": contact[:, t + 1]}
        state, uncertainty = model.step(told, actions[:, t])
        assert torch.equal(state["contact"], contact[:, t + 1])
        assert torch.equal(state["tokens"], logits[:, t].argmax(dim=-1).to(torch.uint8))
        log_p = logits[:, t].log_softmax(dim=-1).amax(dim=-1).unflatten(-1, (2, 2)).mean(dim=-1)
        torch.testing.assert_close(uncertainty.double(), 1 - log_p.exp().mean(dim=(1, 2)))
        assert state["step"].tolist() == [t + 1] * 2


@pytest.mark.parametrize("time", [1, 2, 6])
def test_a_start_with_context_equals_stepping_through_it(time):
    model = make_model()
    tokens, actions = clip(2, time)
    begun = model.start(tokens[:, :time], actions[:, : time - 1], [5, 6])
    state = model.start(tokens[:, :1], actions[:, :0], [5, 6])
    for t in range(time - 1):
        state, _ = model.step({**state, "next_contact": torch.full((2,), Contact.FREE)}, actions[:, t])
        told = {"contact": torch.full((2,), Contact.UNKNOWN), "step": torch.zeros(2, dtype=torch.int64)}
        state = {**state, "tokens": tokens[:, t + 1], **told}
    assert begun.keys() == state.keys()
    for name, value in begun.items():
        torch.testing.assert_close(value, state[name], equal_nan=True)
    torch.testing.assert_close(begun["travel"], actions[:, : time - 1, :6].sum(dim=1))
    assert begun["previous_action"].isnan().all() == (time == 1)


def test_the_action_before_the_first_is_rest_with_the_gripper_as_it_is(monkeypatch):
    model = make_model()
    tokens, actions = clip(1, 3)
    seen, embed = [], model.input_features

    def watched(hot, action, previous, travel, contact, told):
        seen.append((previous, travel))
        return embed(hot, action, previous, travel, contact, told)

    monkeypatch.setattr(model, "input_features", watched)
    state = model.start(tokens[:, :2], actions[:, :1], [0])
    state, _ = model.step({**state, "next_contact": torch.full((1,), Contact.HELD)}, actions[:, 1])
    model.step(state, actions[:, 2])
    rest = torch.zeros(1, 1, 7)
    rest[..., 6] = actions[0, 0, 6]
    for t, (previous, travel) in enumerate(seen):
        assert torch.equal(previous, actions[:, t - 1 : t] if t else rest)
        torch.testing.assert_close(travel, actions[:, :t, :6].sum(dim=1, keepdim=True))


def test_inputs_are_normalised_by_their_ranges():
    model = make_model()
    seen = []
    model.embed_action.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    high = torch.tensor([0.05, 0.05, 0.05, 0.25, 0.25, 0.25, 1.0])
    low = torch.tensor([-0.05, -0.05, -0.05, -0.25, -0.25, -0.25, 0.0])
    travel = torch.tensor(TRAVEL_SCALE) / 2
    hot, contact = model.one_hot(clip(1, 0)[0]), torch.zeros(1, 1, dtype=torch.int64)
    model.input_features(hot, high[None, None], low[None, None], travel[None, None], contact)
    expected = torch.tensor([1.0] * 7 + [-1.0] * 7 + [0.5] * 6, dtype=torch.float64)
    torch.testing.assert_close(seen[0][0, 0], expected, atol=1e-6, rtol=0)


def test_later_frames_and_actions_leave_earlier_features_alone():
    model = make_model(window=8)
    tokens, actions = clip(1, 6)
    hot = model.one_hot(tokens[:, :-1])
    whole = model.trunk(hot, motion_of(actions))
    other_tokens, other_actions = clip(1, 6, seed=1)
    later = torch.arange(6)[None, :, None] >= 3
    mixed = torch.where(later, other_actions, actions)
    hot_mixed = torch.where(later[..., None], model.one_hot(other_tokens[:, :-1]), hot)
    changed = (model.trunk(hot_mixed, motion_of(mixed)) != whole).flatten(2).any(dim=-1)[0]
    assert changed.tolist() == [False] * 3 + [True] * 3


def test_the_anchor_stays_in_sight_and_other_frames_leave_the_window():
    model = make_model(time_layers=(1,))
    tokens, actions = clip(1, 6)
    hot = model.one_hot(tokens[:, :-1])
    whole = model.trunk(hot, motion_of(actions))
    for frame, reached in ((0, [0, 1, 2, 3, 4, 5]), (1, [1, 2, 3]), (4, [4, 5])):
        other = hot.clone()
        other[:, frame] = model.one_hot(clip(1, 6, seed=1)[0][:, frame])
        changed = (model.trunk(other, motion_of(actions)) != whole).flatten(2).any(dim=-1)[0]
        assert changed.nonzero().flatten().tolist() == reached


# --- generation ----------------------------------------------------------------------------------------------------


def test_a_batch_equals_its_rows_and_a_branch_its_trunk():
    model = make_model(temperature=0.8)
    tokens, actions = clip(3, 4)
    check_rows_and_branches(model, tokens, actions)


def test_rows_restart_without_disturbing_the_others():
    model = make_model(temperature=0.5)
    tokens, actions = clip(2, 6)
    state = model.start(tokens[:, :1], actions[:, :0], [1, 2])
    for t in range(4):
        state, _ = model.step(state, actions[:, t])
    fresh = model.start(tokens[:, 5:6], actions[:, :0], [1, 2])
    merged = merge_rows(torch.tensor([False, True]), fresh, state)
    expected_old, _ = model.step(state, actions[:, 4])
    expected_new, _ = model.step(fresh, actions[:, 4])
    got, _ = model.step(merged, actions[:, 4])
    assert torch.equal(got["tokens"][0], expected_old["tokens"][0])
    assert torch.equal(got["tokens"][1], expected_new["tokens"][1])
    assert got["travel"].isfinite().all() and got["step"].tolist() == [5, 1]


def test_states_are_values():
    model = make_model(temperature=1.0)
    tokens, actions = clip(2, 4)
    state = model.start(tokens[:, :2], actions[:, :1], [0, 1])
    copy = {name: value.clone() for name, value in state.items()}
    buffer = actions[:, 1].clone()
    after, _ = model.step(state, buffer)
    again, _ = model.step(state, actions[:, 1])
    model.step_token_by_token(state, actions[:, 1])
    assert state.keys() == copy.keys() and all(torch.equal(state[name], copy[name]) for name in copy)
    buffer.fill_(9)  # the caller's memory is not the state's
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_samples_depend_on_the_row_seed_and_step_alone():
    model = make_model(temperature=2.0, refine_steps=1)
    tokens, actions = clip(1, 1)
    four = model.start(tokens[:, :1].expand(4, -1, -1, -1), actions[:, :0].expand(4, -1, -1), [3, 9, 3, 10])
    after, _ = model.step(four, actions[:, 0].expand(4, -1))
    assert torch.equal(after["tokens"][0], after["tokens"][2])
    assert (after["tokens"][0] != after["tokens"][1]).any() and (after["tokens"][1] != after["tokens"][3]).any()
    later, _ = model.step({**four, "step": four["step"] + 1}, actions[:, 0].expand(4, -1))
    assert (later["tokens"] != after["tokens"]).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_levels_that_do_not_exist_are_never_chosen(temperature):
    model = make_model(temperature=temperature)
    tokens, actions = clip(16, 8)
    state = model.start(tokens[:, :1], actions[:, :0], range(16))
    seen = torch.zeros(4, 5, dtype=torch.bool)
    for t in range(8):
        state, uncertainty = model.step(state, actions[:, t])
        assert (state["tokens"] < LEVELS).all() and state["tokens"].dtype == torch.uint8
        assert ((0 <= uncertainty) & (uncertainty <= 1)).all()
        seen |= F.one_hot(state["tokens"].long(), 5).bool().flatten(0, 1).any(dim=0)
    if temperature > 1:
        assert torch.equal(seen, torch.arange(5) < LEVELS[:, None])
    current = model.one_hot(tokens[:, 0])
    features = torch.randn(16, 9, 16).double()
    logits = model.refine(features, current, torch.zeros_like(current), torch.ones(16, 9, 2))
    assert torch.equal(logits == float("-inf"), (torch.arange(5) >= LEVELS[:, None]).expand_as(logits))


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("refine_steps", [1, 2, 7])
def test_refinement_reveals_everything_once_the_surest_first(monkeypatch, refine_steps, one_by_one):
    model = make_model(refine_steps=refine_steps, temperature=0.7)
    tokens, actions = clip(3, 1)
    state = model.start(tokens[:, :1], actions[:, :0], [1, 2, 3])
    calls = spy_on_refine(model, monkeypatch)
    step = model.step_token_by_token if one_by_one else model.step
    final = model.one_hot(step(state, actions[:, 0])[0]["tokens"]).unflatten(-1, (4, 5))
    counts = [2] * 9 if one_by_one else reveal_counts(18, refine_steps)
    assert len(calls) == len(counts) and calls[0]["hidden"].all() and not calls[0]["known"].any()
    for k, (call, count) in enumerate(zip(calls, counts, strict=True)):
        hidden = call["hidden"]
        after = calls[k + 1]["hidden"] if k + 1 < len(calls) else torch.zeros_like(hidden)
        assert not (after & ~hidden).any()
        assert (hidden & ~after).sum(dim=(1, 2)).tolist() == [count] * 3
        # What is known is what the frame ends up with, and nothing of what is hidden.
        assert torch.equal(call["known"].unflatten(-1, (4, 5)), final * ~dims(hidden)[..., None])
        assert torch.equal(call["current"], calls[0]["current"])


def test_the_surest_tokens_are_revealed_first(monkeypatch):
    model = make_model(refine_steps=2)
    tokens, actions = clip(1, 1)
    state = model.start(tokens[:, :1], actions[:, :0], [0])
    calls = spy_on_refine(model, monkeypatch)
    model.step(state, actions[:, 0])
    confidence = calls[0]["logits"].log_softmax(dim=-1).amax(dim=-1).unflatten(-1, (2, 2)).mean(dim=-1)[0]
    revealed = ~calls[1]["hidden"][0]
    assert confidence[revealed].min() > confidence[~revealed].max()


def test_known_tokens_change_the_prediction_of_the_others():
    model = make_model()
    tokens, _ = clip(1, 1)
    current, known = model.one_hot(tokens[:, 0]), model.one_hot(tokens[:, 1])
    hidden = torch.ones(1, 9, 2, dtype=torch.bool)
    hidden[0, 4, 1] = False
    features = torch.zeros(1, 9, 16, dtype=torch.float64)
    with_known = model.refine(features, current, known * ~dims(hidden).repeat_interleave(5, dim=-1), hidden)
    without = model.refine(features, current, torch.zeros_like(known), torch.ones_like(hidden))
    finite = without.isfinite()
    assert (with_known[finite] - without[finite]).abs().min() > 0  # every cell hears of it
    held = model.tell(features, torch.tensor([Contact.HELD]))
    held = model.refine(held, current, torch.zeros_like(known), torch.ones_like(hidden))
    assert (held[finite] - without[finite]).abs().min() > 0  # and of what is touched


def test_contact_is_drawn_once_a_frame_as_often_as_it_is_likely(monkeypatch):
    model = make_model(refine_steps=1, contact_temperature=1.0)
    tokens, actions = clip(1, 2)
    calls = spy_on_refine(model, monkeypatch)

    def drawn(seeds: list[int]) -> torch.Tensor:
        many = len(seeds)
        state = model.start(tokens[:, :1].expand(many, -1, -1, -1), actions[:, :0].expand(many, -1, -1), seeds)
        assert (state["contact"] == Contact.UNKNOWN).all()
        state, _ = model.step(state, actions[:, 0].expand(many, -1))
        assert torch.equal(calls[-1]["next_contact"], state["contact"])  # the frame shows what was drawn
        return state["contact"]

    frequency = drawn(list(range(3000))).bincount(minlength=len(Contact)) / 3000
    likely = model.contact_logits(calls[-1]["features"][0]).softmax(dim=-1)
    torch.testing.assert_close(frequency, likely, atol=0.04, rtol=0)
    assert likely.max() < 0.9
    assert torch.equal(drawn([5, 8, 5])[[0, 2, 1]], drawn([5, 5, 8]))
    model = make_model(refine_steps=1, contact_temperature=0.0)
    calls = spy_on_refine(model, monkeypatch)
    assert (drawn(list(range(50))) == likely.argmax()).all()


@pytest.mark.parametrize("contact", Contact)
def test_a_blocked_arm_does_not_travel(contact):
    tokens, actions = clip(2, 1)
    model = make_model(refine_steps=1, contact_temperature=0.0)
    model.contact_head.bias[contact] = 1e4  # drawn, not told
    state, _ = model.step(model.start(tokens[:, :1], actions[:, :0], [0, 1]), actions[:, 0])
    went = contact not in (Contact.BLOCKED, Contact.HELD_BLOCKED)
    torch.testing.assert_close(state["travel"], went * actions[:, 0, :6])


def test_the_next_frame_depends_on_the_contact_before():
    model = make_model()
    tokens, actions = clip(1, 1)
    free, held = (torch.full((1, 1), contact) for contact in (Contact.FREE, Contact.HELD))
    hot = model.one_hot(tokens[:, :1])
    assert (model.trunk(hot, motion_of(actions, free)) != model.trunk(hot, motion_of(actions, held))).all()


def test_an_open_gate_copies_the_scene_whatever_the_action():
    model = make_model()
    model.copy_gate.weight.zero_()
    model.copy_gate.bias.fill_(1e4)
    tokens, actions = clip(2, 5)
    state = model.start(tokens[:, :1], actions[:, :0], [0, 1])
    for t in range(5):
        state, uncertainty = model.step(state, actions[:, t])
        assert torch.equal(state["tokens"], tokens[:, 0])
    torch.testing.assert_close(uncertainty, torch.zeros(2))
    model.copy_gate.bias[0] = 0  # each group of dimensions has its own gate
    state, _ = model.step(state, actions[:, 0])
    assert torch.equal(state["tokens"][..., 2:], tokens[:, 0, :, 2:])
    assert (state["tokens"][..., :2] != tokens[:, 0, :, :2]).any()


# --- training ------------------------------------------------------------------------------------------------------


def training_batch(seed: int = 3) -> dict[str, torch.Tensor]:
    tokens, actions = clip(4, 5)
    tokens[:, 1:, :6] = tokens[:, :1, :6]  # most cells stand still
    return batch_of(tokens, actions, seed)


def test_the_training_loss_by_hand(monkeypatch):
    model = make_model(corruption=0.0, stalling=0.0, self_forcing=0.0, unchanged_weight=0.1, watched_weight=5.0)
    calls = spy_on_refine(model, monkeypatch)
    batch = training_batch()
    batch["next_watched"][..., 1::4] = True
    batch["next_contact"] = some_contacts(4, 5)
    loss, metrics = model(batch)
    (call,) = calls
    before, after = batch["tokens"].long(), batch["next_tokens"].long()
    assert torch.equal(call["current"], model.one_hot(before))
    hidden = dims(call["hidden"])
    # Nothing leaks: the network is told the targets exactly where they are not asked for.
    told = model.one_hot(after).unflatten(-1, (4, 5)) * ~hidden[..., None]
    assert torch.equal(call["known"].unflatten(-1, (4, 5)), told)
    log_p = call["logits"].float().log_softmax(dim=-1)
    total = weights = hits = moving = 0.0
    for index in hidden.nonzero().tolist():
        b, t, n, c = index
        changed = bool((before[b, t, n] != after[b, t, n]).any())
        weight = 5.0 if n % 4 == 1 else 1.0 if changed else 0.1
        total -= weight * log_p[b, t, n, c, after[b, t, n, c]].item()
        weights += weight
        hits += changed and log_p[b, t, n, c].argmax().item() == after[b, t, n, c].item()
        moving += changed
    assert torch.equal(call["next_contact"], batch["next_contact"])
    contact_log_p = model.contact_logits(call["features"]).log_softmax(dim=-1)
    contact_nll = -contact_log_p.gather(-1, batch["next_contact"][..., None]).mean().item()
    assert metrics["contact_nll"].item() == pytest.approx(contact_nll, rel=1e-4)
    assert loss.item() == pytest.approx(total / weights + contact_nll, rel=1e-4)
    assert metrics["changed_dim_accuracy"] == pytest.approx(hits / moving, abs=1e-5)


def test_who_is_to_say_where_things_are_learns_it_beside_the_rest():
    plain, model = make_model(), make_model(places_weight=0.5)
    model.load_state_dict(plain.state_dict(), strict=False)
    batch = batch_of(*clip(2, 5), seed=1)
    places = torch.full((2, 5, 2, 3), float("nan"), dtype=torch.float64)
    loss, told = model(batch | {"places": places})
    assert loss == plain(batch)[0] and told["places_off"] == 0
    places[:, :, 0] = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)
    model.place_head.requires_grad_(True)
    fitted = torch.optim.Adam(model.place_head.parameters(), lr=0.1)
    errors = []
    for _ in range(60):
        loss, told = model(batch | {"places": places})
        fitted.zero_grad()
        loss.backward()
        fitted.step()
        errors.append(told["places_off"].item())
    assert loss > plain(batch)[0] and errors[-1] < 0.6 * errors[0]


def test_a_loss_is_a_function_of_batch_and_seed():
    model = make_model()
    assert model(training_batch())[0] == model(training_batch())[0]
    assert model(training_batch())[0] != model(training_batch(seed=4))[0]


def test_half_of_the_frames_are_hidden_whole():
    hidden = random_hidden((100, 20), 9 * 2, torch.Generator().manual_seed(0), torch.device("cpu"))
    hidden = hidden.unflatten(-1, (9, 2))
    assert hidden.shape == (100, 20, 9, 2)
    whole = hidden.flatten(2).all(dim=-1).float().mean()
    assert 0.5 < whole < 0.65  # some of the other half come out whole by chance
    rest = hidden[~hidden.flatten(2).all(dim=-1)].float().mean()
    assert 0.5 < rest < 0.65  # the mean of cos over a quarter turn is 2 / pi


@pytest.mark.parametrize("refine_steps", [1, 2])
def test_who_generates_a_frame_at_once_is_never_shown_a_part_of_one(refine_steps, monkeypatch):
    model = make_model(refine_steps=refine_steps)
    calls = spy_on_refine(model, monkeypatch)
    batch = training_batch()
    model(batch)
    assert calls[-1]["hidden"].shape == (*batch["tokens"].shape[:-1], model.config.groups)
    assert calls[-1]["hidden"].all() == (refine_steps == 1)


def test_corruption_jitters_by_one_level_or_lags_by_one_frame():
    model = make_model(corruption=0.8, stalling=0.0, self_forcing=0.0)
    tokens = clip(64, 5)[0][:, :-1]
    motion = motion_of(clip(64, 5)[1])
    out = model._corrupt(tokens, motion, motion.contact, torch.Generator().manual_seed(0))
    assert torch.equal(out[:, 0], tokens[:, 0].long())  # the anchor is real
    assert ((out >= 0) & (out < LEVELS)).all()
    late = torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1).long()
    lagged = (out == late).all(dim=-1)
    assert ((out - tokens.long()).abs() <= 1)[~lagged].all()
    changed = (out != tokens.long()).any(dim=-1)[:, 1:].float().mean()
    assert 0.2 < changed < 0.4  # half of 0.8 is picked; three in five of those jitter, of which some keep their level
    still = make_model(corruption=0.0, stalling=0.0, self_forcing=0.0)
    assert torch.equal(still._corrupt(tokens, motion, motion.contact, torch.Generator().manual_seed(0)), tokens.long())


def test_self_forcing_feeds_the_model_its_own_prediction():
    model = make_model(corruption=0.0, stalling=0.0, self_forcing=0.5, self_forcing_depth=3)
    tokens, actions = clip(4, 6)
    motion, tokens = motion_of(actions, some_contacts(4, 6)), tokens[:, :-1].long()
    next_contact = some_contacts(4, 6, seed=1)
    rolled = [tokens]  # by no step, by one, two and three
    for _ in range(3):
        current = model.one_hot(rolled[-1])
        hidden = torch.ones(4, 6, 9, 2, dtype=torch.bool)
        features = model.trunk(current, motion)
        told = model.tell(features, next_contact)
        own = model.refine(told, current, torch.zeros_like(current), hidden).argmax(dim=-1)
        rolled.append(torch.cat([tokens[:, :2], own[:, 1:-1]], dim=1))  # nothing predicts the first two
    depths = []
    for seed in range(80):  # 0.5 of all clips: all clips of half of the batches
        out = model._corrupt(tokens, motion, next_contact, torch.Generator().manual_seed(seed))
        depths.append([torch.equal(out, own) for own in rolled].index(True))
    assert 25 < depths.count(0) < 55
    assert all(5 < depths.count(depth) < 25 for depth in (1, 2, 3))


def test_a_stalled_clip_repeats_a_frame_and_then_goes_on():
    model = make_model(corruption=0.0, stalling=0.5, self_forcing=0.0)
    tokens, actions = clip(200, 9)
    motion, tokens = motion_of(actions), tokens[:, :-1].long()
    out = model._corrupt(tokens, motion, motion.contact, torch.Generator().manual_seed(0))
    moved = (out != tokens).flatten(2).any(dim=-1)  # (200, 9)
    stalls = 0
    for row in range(200):
        frames = moved[row].nonzero().flatten().tolist()
        if not frames:
            continue
        stalls += 1
        assert frames == list(range(frames[0], frames[-1] + 1)) and frames[0] >= 2 and len(frames) <= LONGEST_STALL
        assert torch.equal(out[row, frames], tokens[row, frames[0] - 1].expand(len(frames), -1, -1))
    assert 70 < stalls < 130


def test_contact_is_withheld_where_a_rollout_begins_and_over_the_context_of_some():
    contact = torch.full((2000, 6), Contact.HELD)
    motion = motion_of(torch.zeros(2000, 6, 7), contact)
    withheld = make_model()._withhold(motion, torch.Generator().manual_seed(0))
    told, hidden = withheld.contact, withheld.action.isnan().all(dim=2)
    assert not hidden[:, 1:].any() and hidden[:, 0].float().mean() == pytest.approx(UNTOLD_ACTIONS, abs=0.03)
    untold = (told == Contact.UNKNOWN).sum(dim=1)
    assert torch.equal(told == Contact.UNKNOWN, torch.arange(6) < untold[:, None])  # a beginning, not a gap
    assert set(untold.tolist()) == set(range(1, 7))
    assert (untold > 1).float().mean() == pytest.approx(UNTOLD_CLIPS * 5 / 6, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "multiple of num_heads, got 16 and 3"),
        ({"groups": 3}, "groups must divide the 4 FSQ dimensions, got 3"),
        ({"time_layers": (1, 4)}, r"lie in \[0, 4\), got \(1, 4\)"),
        ({"patch_size": 2}, "patch_size must divide grid, got 2 and 3"),
        ({"patch_size": 3, "rays": True}, "patch_size must be 1, got 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoregressiveConfig(**SIZES | changes)


# --- a whole small world -------------------------------------------------------------------------------------------


def small_world(batch: int, time: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A light in one of four cells: this action says which column, the action before which row; it leaves a trail.

    The dimensions of a cell's token: lit, lit a frame ago, and two that differ from clip to clip and never change.
    """
    moves = torch.randint(0, 2, (batch, time, 2), generator=generator)
    row = F.pad(moves[:, :-1, 1], (1, 0))
    place = torch.cat([torch.randint(0, 4, (batch, 1), generator=generator), 2 * row + moves[..., 0]], dim=1)
    lit = F.one_hot(place, 4)
    trail = F.pad(lit[:, :-1], (0, 0, 1, 0))
    decor = (torch.rand(batch, 1, 4, 2, generator=generator) * torch.tensor([2, 4])).long().expand(-1, time + 1, -1, -1)
    tokens = torch.cat([torch.stack([lit, 2 * trail], dim=-1), decor], dim=-1).to(torch.uint8)
    actions = torch.zeros(batch, time, 7)
    actions[..., :2] = 0.05 * (2 * moves - 1)
    return tokens, actions


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_small_world_is_learnt_by_heart_and_rolled_out_exactly(tmp_path, patch_size):
    torch.manual_seed(0)
    model = AutoregressiveModel(
        AutoregressiveConfig(
            levels=(2, 3, 2, 4), grid=2, groups=2, width=64, num_heads=4, mlp_ratio=2, num_layers=2, time_layers=(1,),
            refiner_layers=1, window=4, corruption=0.0, stalling=0.0, self_forcing=0.0, unchanged_weight=0.1,
            patch_size=patch_size,
        )
    )  # fmt: skip

    def batch_fn(step: int) -> dict[str, torch.Tensor]:
        tokens, actions = small_world(32, 5, torch.Generator().manual_seed(step))
        return batch_of(tokens, actions, step)

    config = TrainConfig(num_steps=160, learning_rate=5e-3, warmup_steps=10, ema_decay=0.9, bf16=False)
    model.load_state_dict(fit(model, batch_fn, config, tmp_path))
    model.eval().requires_grad_(False)
    tokens, actions = small_world(8, 20, torch.Generator().manual_seed(10_000))
    for context in (1, 3):
        state = model.start(tokens[:, :context], actions[:, : context - 1], range(8))
        for t in range(context - 1, 20):
            state, uncertainty = model.step(state, actions[:, t])
            assert torch.equal(state["tokens"], tokens[:, t + 1])
            assert uncertainty.max() < 0.2


# --- what else a clip is told --------------------------------------------------------------------------------------


def told_models() -> dict[str, AutoregressiveModel]:
    return {
        "text": make_model(text_dim=5, refine_steps=1),
        "rays": make_model(rays=True, refine_steps=1),
        "cameras": make_model(num_cameras=2, grid=2, refine_steps=1),
        "space": make_model(actions=ActionSpace((-1.0, 0.0), (1.0, 3.0), (0.5,)), refine_steps=1),
    }


@pytest.mark.parametrize("kind", list(told_models()))
def test_steps_and_clips_are_told_the_same(kind):
    model = told_models()[kind]
    model.forget_contact()  # or what is drawn would differ from what a clip is told
    generator = torch.Generator().manual_seed(1)
    cells, dim, steps = model.num_cells, model.config.actions.dim, model.config.actions.travel_dim
    tokens = (torch.rand(2, 4, cells, 4, generator=generator) * LEVELS).to(torch.uint8)
    actions = 0.05 * torch.rand(2, 3, dim, generator=generator)
    text = torch.rand(2, 3, 5, generator=generator) if kind == "text" else None
    rays = torch.rand(2, 3, cells, RAYS_DIM, generator=generator) if kind == "rays" else None
    previous = torch.cat([actions[:, :1], actions[:, :-1]], dim=1)
    previous[:, 0, :steps] = 0
    travel = F.pad(actions[:, :-1, :steps].cumsum(dim=1), (0, 0, 1, 0))
    contact = torch.full((2, 3), Contact.UNKNOWN)
    motion = Motion(actions, previous, travel, torch.arange(3).expand(2, 3), contact)
    current = model.one_hot(tokens[:, :-1])
    told = model.told(None if text is None else pooled(text), rays)
    features = model.tell(model.trunk(current, motion, told), contact)
    assert torch.equal(model.trunk(current, motion), model.trunk(current, motion, told)) == (told is None)
    hidden = torch.ones(2, 3, cells, 2, dtype=torch.bool)
    logits = model.refine(features, current, torch.zeros_like(current), hidden)
    state = model.start(tokens[:, :1], actions[:, :0], [0, 1], text)
    for t in range(3):
        given = state | {"tokens": tokens[:, t]} | ({} if rays is None else {"rays": rays[:, t]})
        state, _ = model.step(given, actions[:, t])
        assert torch.equal(state["contact"], contact[:, t])
        assert torch.equal(state["tokens"], logits[:, t].argmax(dim=-1).to(torch.uint8))


def test_the_mean_over_words_leaves_out_where_there_is_none():
    features = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [0.0, 0.0]], [[0.0, 0.0]] * 3])
    assert pooled(features).tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_unknown_actions_say_nothing_and_known_ones_do():
    model = make_model()
    tokens, actions = clip(2, 3)
    current = model.one_hot(tokens[:, :-1])
    motion = motion_of(actions)
    hidden = motion._replace(action=actions * torch.nan)
    silent = model.trunk(current, hidden)
    assert silent.isfinite().all()
    assert torch.equal(silent, model.trunk(current, hidden._replace(previous_action=actions, travel=motion.travel + 1)))
    assert not torch.equal(silent, model.trunk(current, motion))
    state = model.start(tokens[:, :1], actions[:, :0], [0, 1])
    for t in range(3):
        state, _ = model.step(state, actions[:, t] * torch.nan)
    assert not state["travel"].any()


def test_each_camera_has_cells_of_its_own():
    model = make_model(num_cameras=2)
    assert model.num_cells == 18 and model.layout.cells == (2, 3, 3)
    places = model._places()
    torch.testing.assert_close(places[9:] - places[:9], (model.embed_camera[1] - model.embed_camera[0]).expand(9, -1))


def test_a_patch_is_a_square_of_one_camera():
    model = make_model(grid=4, num_cameras=2, patch_size=2)
    cells = torch.arange(32)[:, None]
    patches = model._patched(cells)
    assert patches[:3].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13]] and patches[4].tolist() == [
        16,
        17,
        20,
        21,
    ]
    assert torch.equal(model._unpatched(patches), cells) and model.num_patches == len(patches) == 8
    tokens = torch.zeros(1, 1, 32, 4, dtype=torch.uint8)
    state = model.start(tokens, torch.zeros(1, 0, 7), [0])
    assert state["cache1.0"].shape[2] == 8 and state["tokens"].shape == (1, 32, 4)


def test_forgotten_contact_is_unknown():
    model = make_model()
    model.forget_contact()
    tokens, actions = clip(2, 1)
    state, _ = model.step(model.start(tokens[:, :1], actions[:, :0], [0, 1]), actions[:, 0])
    assert (state["contact"] == Contact.UNKNOWN).all()


@pytest.mark.parametrize(
    ("change", "said"), [({"num_cameras": 0}, "num_cameras"), ({"text_encoder": "bytes"}, "text_dim")]
)
def test_wrong_settings_of_what_is_told_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        AutoregressiveConfig(**SIZES | change)
