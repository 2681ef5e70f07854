"""The diffusion network: who sees what, what its loss is, and that all of it is trained."""

import math
from functools import partial

import pytest
import torch
from latent_clips import SIZES, clip, make_diffusion
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from wfm_core.models import blocks
from wfm_core.models.diffusion import NOISIEST, Diffusion, Draws, Shown
from wfm_core.models.diffusion_blocks import level_waves
from wfm_core.models.diffusion_config import (
    ACTION_INJECTIONS,
    FINEST_STEPS,
    DiffusionConfig,
    count_parameters,
    training_cost,
)
from wfm_core.models.positions import RopeConfig
from wfm_core.models.transformer_config import frames_in_sight
from wfm_core.samplers import edm, flow

make_model = partial(make_diffusion, Diffusion)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(model, latents, actions, draws: Draws, monkeypatch, **more) -> torch.Tensor:
    """What the network gives for the frames that are denoised, (B, T', h, w, C), under given draws."""
    seen, run = [], model.run
    monkeypatch.setattr(model, "_draw", lambda *_: draws)
    monkeypatch.setattr(model, "run", lambda *args: seen.append(run(*args)) or seen[-1])
    model({"latents": latents, "action": actions, "seed": torch.tensor(0)} | more)
    monkeypatch.undo()
    return seen[-1][:, max(0, latents.shape[1] - 1) :]


def quiet_draws(model, latents, chunk: int = 1) -> Draws:
    """Noise on the copies alone, and so much of it that nothing of the frames themselves is left."""
    shape = (2, latents.shape[0], max(1, latents.shape[1] - 1))
    noise = some(*shape, *latents.shape[2:], seed=9)
    noise[1] = 0
    level = torch.full(shape, 0.5)
    if model.config.formulation == "flow":
        level[0] = 1.0
    return Draws(chunk, noise, level, torch.ones(shape[1], dtype=torch.bool), torch.zeros(shape[1:]))


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Which frames of a batch of one differ."""
    return (before != after).flatten(2).any(dim=-1)[0].nonzero().flatten().tolist()


# --- who sees what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_copy_sees_the_past_before_its_chunk_and_its_chunk_up_to_itself(monkeypatch, chunk):
    model = make_model(num_layers=1, formulation="flow")  # so that nothing is passed on; the window is of three frames
    latents, actions = clip(model, 1, 6)
    draws = quiet_draws(model, latents, chunk)
    before = outputs(model, latents, actions, draws, monkeypatch)
    for frame in range(6):
        other = latents.clone()
        other[0, frame] += 1
        begun = [k - k % chunk + 1 for k in range(5)]  # the first frame of each copy's chunk
        expected = [k for k in range(5) if {frame, frame + 1} & set(frames_in_sight(begun[k], 3))]
        assert changed(before, outputs(model, other, actions, draws, monkeypatch)) == expected
    for k in range(5):
        noise = draws.noise.clone()
        noise[0, 0, k] += 1
        after = outputs(model, latents, actions, draws._replace(noise=noise), monkeypatch)
        assert changed(before, after) == [j for j in range(k, 5) if j // chunk == k // chunk]


@pytest.mark.parametrize("injection", ACTION_INJECTIONS)
def test_nothing_of_the_future_reaches_an_earlier_frame(monkeypatch, injection):
    model = make_model(num_layers=3, window=8, action_injection=injection, formulation="flow")
    latents, actions = clip(model, 1, 5)
    draws = quiet_draws(model, latents, 2)
    before = outputs(model, latents, actions, draws, monkeypatch)
    for frame in range(5):
        other = latents.clone()
        other[0, frame] += 1
        expected = [k for k in range(4) if k - k % 2 + 1 > frame]
        assert changed(before, outputs(model, other, actions, draws, monkeypatch)) == expected
    for t in range(5):  # action t leads to copy t, and to frame t + 1 of the past; the last one leads nowhere
        other = actions.clone()
        other[0, t] += 0.02
        reached = [k for k in range(4) if k >= t]
        assert changed(before, outputs(model, latents, other, draws, monkeypatch)) == reached


def test_a_noise_level_reaches_its_frame_and_later_ones_of_its_chunk(monkeypatch):
    model = make_model(window=8)
    latents, actions = clip(model, 1, 5)
    draws = quiet_draws(model, latents, 2)
    before = outputs(model, latents, actions, draws, monkeypatch)
    for k, reached in ((0, [0, 1]), (1, [1]), (2, [2, 3]), (3, [3])):
        level = draws.level.clone()
        level[0, 0, k] = 0.7
        after = outputs(model, latents, actions, draws._replace(level=level), monkeypatch)
        assert changed(before, after) == reached
    level = draws.level.clone()
    level[1, 0, 2] = 0.7  # of the third frame of the past, which later frames are told of
    assert changed(before, outputs(model, latents, actions, draws._replace(level=level), monkeypatch)) == [2, 3]


def test_the_past_is_told_from_what_is_denoised():
    model = make_model(window=8)
    latents, actions = clip(model, 1, 2)
    sight = model.sight(torch.tensor([[0, 1]]), model._pieces_of_clip(2, 0, 1))
    known = torch.ones(1, 2, dtype=torch.bool)
    travel, step = torch.zeros(1, 2, 6), torch.zeros(1, 2)
    shown = Shown(latents, 0 * latents, torch.full((1, 2), 0.3), 2, actions, travel, known, step)
    first, second = (model.run(shown._replace(past=past), sight, None, None, lambda _, own: own) for past in (1, 2))
    assert changed(first, second) == [1]


def test_places_and_frame_rates_count(monkeypatch):
    model = make_model(window=8, patch=2)
    assert model.places.tolist() == [[0, 0], [0, 1]]
    latents, actions = clip(model, 2, 4)
    draws = quiet_draws(model, latents)
    plain = outputs(model, latents, actions, draws, monkeypatch)
    both = outputs(model, latents, actions, draws, monkeypatch, fps=torch.tensor([5.0, 10.0]))
    torch.testing.assert_close(both[0], plain[0])
    assert ((both[1] - plain[1]).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize("patch", [1, 2])
def test_a_patch_goes_in_and_comes_out_where_it_was(patch):
    """With blocks that do nothing and a head that undoes the embedding, what goes in comes out."""
    model = make_model(patch=patch, width=48)
    for block in model.blocks:
        for gated in (block.modulate_attention, block.modulate_mlp):
            gated.up.weight.zero_()
    for layer in (model.modulate, model.modulate_last, model.embed_patch, model.embed_position, model.head):
        for weight in layer.parameters():
            weight.zero_()
    dim = model.config.token_dim
    model.embed_patch.weight[:dim, :dim] = torch.eye(dim)
    model.head.weight[:, :dim] = torch.eye(dim)
    model.norm.weight.fill_(1.0)
    latents, actions = clip(model, 2, 1)
    known = torch.ones(2, 1, dtype=torch.bool)
    travel, level = torch.zeros(2, 1, 6), torch.full((2, 1), 1e-4)
    shown = Shown(latents, 0 * latents, level, 0, actions, travel, known, torch.zeros(2, 1))
    sight = model.sight(torch.zeros(1, 1), model._pieces_of_clip(0, 1, 1))
    out = model.run(shown, sight, None, None, lambda _, own: own)
    model.embed_patch.weight[:dim] = model.embed_patch.weight[:dim].roll(dim, dims=1)  # the frame before goes there too
    swapped = shown._replace(latents=0 * latents, before=latents)
    torch.testing.assert_close(model.run(swapped, sight, None, None, lambda _, own: own), out, rtol=1e-3, atol=1e-3)
    cells = latents.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 1, rows, columns, C, p, q)
    size = (cells.square().sum(dim=(-3, -2, -1)) / 48).sqrt()
    scaled = latents / size.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[..., None]
    torch.testing.assert_close(out, scaled, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("injection", ACTION_INJECTIONS)
def test_text_and_actions_count_only_where_told(monkeypatch, injection):
    model = make_model(text_dim=6, action_injection=injection)
    latents, actions = clip(model, 2, 3)
    text, draws = some(2, 4, 6), quiet_draws(model, latents)

    def seen(text, told=(True, True), actions=actions) -> torch.Tensor:
        mine = draws._replace(told=torch.tensor(told))
        return outputs(model, latents, actions, mine, monkeypatch, **{} if text is None else {"text": text})

    told = seen(text)
    assert ((told - seen(text.flip(0))).abs().amax(dim=(2, 3, 4)) > 1e-4).all()
    torch.testing.assert_close(seen(F.pad(text, (0, 0, 0, 3))), told)
    torch.testing.assert_close(seen(torch.stack([text[0], 0 * text[1]]))[0], told[0])
    secret = seen(text, (True, False))
    assert torch.equal(secret[0], told[0]) and (secret[1] != told[1]).any()
    # The past knows its text and actions all the same; the first copy's past is a frame without an action.
    moved = actions.clone()
    moved[:, 0] += 0.02
    again = seen(text, (True, False), moved)
    assert torch.equal(again[1, 0], secret[1, 0]) and not torch.equal(again[1, 1], secret[1, 1])
    assert not torch.equal(again[0, 0], secret[0, 0])
    with pytest.raises(ValueError, match="text_dim above 0, got 0"):
        make_model(action_injection=injection).read(text)


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formulation", ["edm", "flow"])
def test_the_training_loss_by_hand(monkeypatch, formulation):
    model = make_model(
        formulation=formulation, sigma_data=0.7, latent_mean=(0.5, -1.0, 0.0), latent_std=(2.0, 0.5, 1.0), chunk=2
    )
    latents, actions = clip(model, 2, 4)
    batch = {"latents": latents, "action": actions, "seed": torch.tensor(3)}
    loss, metrics = model(batch)
    draws = model._draw(latents[:, 1:], batch["seed"])
    normal = (latents - torch.tensor([0.5, -1.0, 0.0])) / torch.tensor([2.0, 0.5, 1.0]) * 0.7
    torch.testing.assert_close(model.restore(normal), latents)
    target, level = normal[:, 1:], draws.level[0][..., None, None, None]
    out = outputs(model, latents, actions, draws, monkeypatch)
    if formulation == "edm":
        x, total = target + level * draws.noise[0], (level**2 + 0.49).sqrt()
        denoised = 0.49 / total**2 * x + level * 0.7 / total * out
        weight, told = total**2 / (level * 0.7) ** 2, draws.level[0].log() / 4
    else:
        x = (1 - level) * target + level * draws.noise[0]
        denoised, weight, told = x - level * out, 1 / level**2, draws.level[0]
        velocity = draws.noise[0] - target
        torch.testing.assert_close(metrics["error"], (out - velocity).square().mean(), rtol=1e-3, atol=1e-4)
    squared = weight * (denoised - target) ** 2
    error = squared.mean(dim=(2, 3, 4))
    log_error = (level_waves(told).double() @ model.head_log_error.weight[0]).float()
    torch.testing.assert_close(loss, (error / log_error.exp() + log_error).mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(metrics["error"], error.mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(metrics["denoised"], (denoised - target).square().mean(), rtol=1e-3, atol=1e-4)
    watched = some(*latents.shape[:-1]) > 0.5
    weight = (1 + (model.config.watched_weight - 1) * watched[:, 1:])[..., None].expand_as(squared)
    error = (weight * squared).sum(dim=(2, 3, 4)) / weight.sum(dim=(2, 3, 4))
    attending, same = model(batch | {"watched": watched})
    torch.testing.assert_close(attending, (error / log_error.exp() + log_error).mean(), rtol=1e-3, atol=1e-4)
    assert same == metrics and not torch.allclose(attending, loss)


@pytest.mark.parametrize("formulation", ["edm", "flow"])
def test_draws_have_the_distributions_of_the_configuration(formulation):
    model = make_model(formulation=formulation, noise_mean=0.4, noise_std=0.8, shift=3.0, chunk=6, untold=0.25)
    target = torch.zeros(300, 40, 1, 1, 1)
    draws = [model._draw(target, torch.tensor(seed)) for seed in range(3)]
    level, past = draws[0].level
    if formulation == "edm":
        logs, past_logs = level.log(), past.log()
    else:
        time = level / (3 - 2 * level)
        logs, past_logs = time.logit(), past.logit()
    high = logs > 0.4 + 2 * 0.8
    share = NOISIEST + (1 - NOISIEST) * 0.0228
    assert high.float().mean().item() == pytest.approx(share, abs=0.006)
    if formulation == "edm":  # evenly up to the highest level, in the logarithm
        assert logs.max() < math.log(80) and logs[high].mean().item() == pytest.approx((2 + math.log(80)) / 2, abs=0.4)
    else:
        assert time.max() <= 1 and time[high].mean().item() == pytest.approx((1 / (1 + math.exp(-2)) + 1) / 2, abs=0.02)
    for values, mean, std in ((logs[~high], 0.4 - 0.8 * 0.0553, 0.8 * 0.9416), (past_logs, -3.0, 1.0)):
        assert values.mean().item() == pytest.approx(mean, abs=0.04)
        assert values.std().item() == pytest.approx(std, abs=0.04)
    told = torch.stack([each.told for each in draws]).float().mean()
    assert 0.65 < told < 0.85 and draws[0].step.abs().max() == 0
    chunks = [model._draw(target[:2, :2], torch.tensor(seed)).chunk for seed in range(400)]
    counts = [chunks.count(size) for size in range(1, 7)]
    assert 160 < counts[0] < 240 and counts[3] == counts[4] == 0 and min(counts[1], counts[2], counts[5]) > 40
    assert not torch.equal(draws[0].noise, draws[1].noise) and draws[0].noise.std().item() == pytest.approx(1, abs=0.02)
    assert {make_model()._draw(target[:2, :2], torch.tensor(seed)).chunk for seed in range(20)} == {1}


def test_a_loss_is_a_function_of_batch_and_seed():
    model = make_model(chunk=2, untold=0.5)
    latents, actions = clip(model, 2, 4)
    losses = [model({"latents": latents, "action": actions, "seed": torch.tensor(seed)})[0] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_a_single_frame_is_denoised_from_its_text_alone(monkeypatch):
    model = make_model(text_dim=6)
    latents, actions = clip(model, 2, 1)
    draws, text = quiet_draws(model, latents), some(2, 3, 6)
    out = outputs(model, latents, actions, draws, monkeypatch, text=text)
    assert out.shape == latents.shape
    assert torch.equal(outputs(model, latents, actions + 0.02, draws, monkeypatch, text=text), out)
    assert not torch.equal(outputs(model, latents, actions, draws, monkeypatch, text=text.flip(0)), out)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("injection", ACTION_INJECTIONS)
def test_everything_is_trained(injection, bf16):
    torch.manual_seed(0)
    more = {"formulation": "flow", "sampler": "euler", "num_steps": 2, "shortcut": 0.5} if bf16 else {}
    model = Diffusion(DiffusionConfig(**SIZES | more, action_injection=injection, text_dim=6, patch=2, chunk=2))
    for weight in model.parameters():
        if not weight.any():  # what begins at zero hides what is before it
            weight.data.normal_(std=0.3)
    latents, actions = clip(model, 8, 5)
    batch = {"latents": latents, "action": actions, "seed": torch.tensor(3), "text": some(8, 3, 6)}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, metrics = model(batch | {"fps": torch.full((8,), 10.0)})
    loss.backward()
    assert loss.dtype == torch.float32 and all(value.ndim == 0 for value in metrics.values())
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name


def test_a_model_that_begins_predicts_nothing_and_its_blocks_do_nothing():
    torch.manual_seed(0)
    model = Diffusion(DiffusionConfig(**SIZES, formulation="flow"))
    latents, actions = clip(model, 4, 3)
    _, metrics = model({"latents": latents, "action": actions, "seed": torch.tensor(0)})
    noise = model._draw(latents[:, 1:], torch.tensor(0)).noise[0]
    torch.testing.assert_close(metrics["error"], (noise - latents[:, 1:]).square().mean())


def test_clips_must_fit_the_rotary_positions():
    model = make_model(rope=RopeConfig(trained_frames=3))
    latents, actions = clip(model, 1, 5)
    batch = {"latents": latents, "action": actions, "seed": torch.tensor(0)}
    with pytest.raises(ValueError, match="span at most 3 frames at 5 Hz, got 5: raise rope.extension"):
        model(batch)
    model = make_model(rope=RopeConfig(trained_frames=8))
    model(batch | {"times": torch.tensor([[0, 4, 5, 6, 7]])})
    with pytest.raises(ValueError, match="span at most 8 frames at 5 Hz, got 9"):
        model(batch | {"times": torch.tensor([[0, 5, 6, 7, 8]])})


@pytest.mark.parametrize(("chunk", "learnt"), [(1, [1, 2]), (2, [2]), (3, [])])
def test_a_chunk_after_a_gap_is_seen_not_learnt(monkeypatch, chunk, learnt):
    model = make_model(window=8, rope=RopeConfig(trained_frames=32))
    latents, actions = clip(model, 2, 4)
    batch = {"latents": latents, "action": actions, "seed": torch.tensor(0)}
    times, travel = torch.tensor([[0, 1, 2, 3], [0, 9, 10, 11]]), some(2, 4, 6)
    draws = quiet_draws(model, latents)
    out = outputs(model, latents, actions, draws, monkeypatch, times=times, travel=travel)
    for name, values in (("times", times + torch.tensor([0, 1, 1, 1])), ("travel", travel + 0.1)):
        other = outputs(
            model, latents, actions, draws, monkeypatch, **{"times": times, "travel": travel} | {name: values}
        )
        assert ((other - out).abs().amax(dim=(2, 3, 4)) > 1e-5).all()
    draws = model._draw(latents[:, 1:], batch["seed"])._replace(chunk=chunk)
    monkeypatch.setattr(model, "run", lambda shown, *_: 0 * shown.latents)
    monkeypatch.setattr(model, "_draw", lambda *_: draws)
    alone, gap = (model(batch | {"times": times[k].expand(2, -1)})[1]["error"] for k in (0, 1))
    mine = model.noising(draws.level[0])
    wanted = latents[:, 1:] - mine.skip * (latents[:, 1:] + draws.level[0][..., None, None, None] * draws.noise[0])
    error = (wanted / mine.out).square().mean(dim=(2, 3, 4))
    torch.testing.assert_close(alone, error.mean())
    torch.testing.assert_close(gap, error[:, learnt].mean() if learnt else torch.tensor(0.0))


def test_the_past_may_be_shown_as_it_was_imagined(monkeypatch):
    model = make_model(window=8, latent_mean=(0.5, -1.0, 0.0), latent_std=(2.0, 0.5, 1.0))
    latents, actions = clip(model, 1, 4)
    draws, seen = quiet_draws(model, latents), some(1, 4, 2, 4, 3)
    out = outputs(model, latents, actions, draws, monkeypatch, seen=seen)
    for k in range(4):
        other = seen.clone()
        other[0, k] += 1
        assert changed(out, outputs(model, latents, actions, draws, monkeypatch, seen=other)) == list(range(k, 3))
    assert torch.equal(outputs(model, latents, actions, draws, monkeypatch, seen=latents), outputs(
        model, latents, actions, draws, monkeypatch
    ))  # fmt: skip
    batch = {"latents": latents, "action": actions, "seed": torch.tensor(0), "seen": seen}
    monkeypatch.setattr(model, "run", lambda shown, *_: 0 * shown.latents)
    assert model(batch)[0] == model(batch | {"seen": latents})[0]  # what is to be learnt stays


@pytest.mark.parametrize("chunk", [1, 2])
def test_copies_of_a_clip_are_denoised_apart(monkeypatch, chunk):
    """Three copies are as three passes over the same past, each with its own noise."""
    model, alone = make_model(window=8, copies=3, chunk=2), make_model(window=8, chunk=2)
    latents, actions = clip(model, 2, 4)
    batch = {"latents": latents, "action": actions, "seed": torch.tensor(0), "times": torch.tensor([[0, 2, 3, 4]])}
    batch["watched"] = some(*latents.shape[:-1]) > 0.5
    draws = model._draw(latents[:, 1:].repeat(1, 3, 1, 1, 1), torch.tensor(1))._replace(chunk=chunk)
    assert draws.step.shape == (2, 9)
    monkeypatch.setattr(model, "_draw", lambda *_: draws)
    loss, metrics = model(batch)
    losses = []
    for k in range(3):
        mine = slice(3 * k, 3 * k + 3)
        noise = torch.stack([draws.noise[0, :, mine], draws.noise[1, :, :3]])
        level = torch.stack([draws.level[0, :, mine], draws.level[1, :, :3]])
        own = draws._replace(noise=noise, level=level, step=draws.step[:, mine])
        monkeypatch.setattr(alone, "_draw", lambda *_, own=own: own)
        losses.append(alone(batch))
    torch.testing.assert_close(loss, torch.stack([each for each, _ in losses]).mean())
    torch.testing.assert_close(metrics["error"], torch.stack([each["error"] for _, each in losses]).mean())
    assert not torch.allclose(losses[0][0], losses[1][0])


def test_travel_is_the_sum_of_the_actions_unless_told(monkeypatch):
    model = make_model()
    latents, actions = clip(model, 2, 4)
    draws = quiet_draws(model, latents)
    travel = F.pad(actions[:, :-1, :6].cumsum(dim=1), (0, 0, 1, 0))
    plain = outputs(model, latents, actions, draws, monkeypatch)
    assert torch.equal(outputs(model, latents, actions, draws, monkeypatch, travel=travel), plain)


# --- shortcuts -------------------------------------------------------------------------------------------------------

SHORTCUT = {"formulation": "flow", "sampler": "euler", "num_steps": 2, "shortcut": 0.4}


def test_shortcuts_are_drawn_on_the_grid_of_their_steps():
    model = make_model(**SHORTCUT)
    draws = model._draw(torch.zeros(200, 50, 1, 1, 1), torch.tensor(0))
    learns = draws.step > 0
    assert learns.float().mean().item() == pytest.approx(0.4, abs=0.02)
    sizes, level = draws.step[learns], draws.level[0][learns]
    assert sorted(sizes.unique().tolist()) == [2.0**-k for k in range(6, -1, -1)]
    assert sizes.min() == 2 / FINEST_STEPS
    steps_left = level / sizes
    assert torch.equal(steps_left, steps_left.round()) and steps_left.min() >= 1 and level.max() == 1
    assert level[sizes == 0.5].unique().tolist() == [0.5, 1.0]
    assert not ((draws.level[0][~learns] * 128).round() == draws.level[0][~learns] * 128).all()


def test_frames_that_learn_shortcuts_aim_at_two_half_steps(monkeypatch):
    model = make_model(**SHORTCUT)
    latents, actions = clip(model, 1, 4)
    draws = quiet_draws(model, latents)
    level, step = draws.level.clone(), torch.tensor([[0.5, 0.0, 2 / FINEST_STEPS]])
    level[0, 0] = torch.tensor([1.0, 0.3, 0.5])
    draws = draws._replace(level=level, step=step)
    seen, run = [], model.run

    def watched(shown, *args):
        seen.append((shown, run(shown, *args)))
        return seen[-1][1]

    monkeypatch.setattr(model, "_draw", lambda *_: draws)
    monkeypatch.setattr(model, "run", watched)
    _, metrics = model({"latents": latents, "action": actions, "seed": torch.tensor(0)})
    (first, v1), (second, v2), (whole, out) = ((shown, made[:, 3:]) for shown, made in seen)
    assert first.step[0, 3:].tolist() == [0.25, 0, 0]  # the finest steps are as good as endless many
    assert whole.step[0].tolist() == [0, 0, 0, 0.5, 0, 2 / FINEST_STEPS]
    torch.testing.assert_close(second.level[0, 3:], torch.tensor([0.75, 0.3, 0.5 - 1 / FINEST_STEPS]))
    moved = first.latents[:, 3:] - torch.tensor([0.25, 0, 1 / FINEST_STEPS])[:, None, None, None] * v1
    torch.testing.assert_close(second.latents[:, 3:], moved)
    wanted = (v1 + v2) / 2
    wanted[:, 1] = draws.noise[0, :, 1] - latents[:, 2]
    torch.testing.assert_close(metrics["error"], (out - wanted).square().mean(), rtol=1e-4, atol=1e-5)


def test_a_flow_that_is_straight_has_no_more_to_learn_from_shortcuts(monkeypatch):
    """Where all data is one point, one step goes as far as two: a network that knows it has no error."""
    model = make_model(**SHORTCUT | {"shortcut": 0.99}, latent_mean=(0.3, 0.2, 0.1), latent_std=(1.0, 1.0, 1.0))
    latents = torch.tensor([0.3, 0.2, 0.1]).expand(2, 4, 2, 4, 3)
    monkeypatch.setattr(model, "run", lambda shown, *_: shown.latents / shown.level[..., None, None, None])
    _, metrics = model({"latents": latents, "action": clip(model, 2, 4)[1], "seed": torch.tensor(0)})
    assert metrics["error"] < 1e-9


def test_without_shortcuts_there_is_no_step_to_tell():
    assert not any("embed_step" in name for name, _ in make_model(formulation="flow").named_parameters())
    assert any("embed_step" in name for name, _ in make_model(**SHORTCUT).named_parameters())


# --- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formulation": "ddpm"}, r"formulation must be one of \('edm', 'flow'\), got 'ddpm'"),
        ({"sampler": "dpm"}, r"sampler must be one of \('euler', 'heun', 'multistep'\), got 'dpm'"),
        ({"action_injection": "sum"}, "action_injection must be one of .*, got 'sum'"),
        ({"patch": 3}, r"patch must divide the grid, got 3 and \(2, 4\)"),
        ({"latent_std": (1.0, 2.0)}, r"latent_std must have latent_dim = 3 entries or none, got \(1.0, 2.0\)"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"copies": 0}, "copies must be at least 1, got 0"),
        ({"sigma_min": 90.0}, r"sigma_min must lie in \(0, sigma_max\), got 90.0 and 80.0"),
        ({"untold": 1.0}, r"untold and shortcut must lie in \[0, 1\), got 1.0 and 0.0"),
        ({"guidance": 2.0, "untold": 0.0}, "guidance needs untold above 0, got guidance=2.0 and untold=0"),
        ({"text_encoder": "bytes"}, "text_encoder='bytes' needs its features' size as text_dim, got 0"),
        ({"shortcut": 0.2}, r"shortcut needs formulation=flow, sampler=euler and shift=1, got \('edm', 'multistep', 1"),
        (SHORTCUT | {"num_steps": 3}, "shortcut needs num_steps that divide 128, got 3"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**SIZES | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch": 2, "text_dim": 6},
        {"copies": 3},
        {"action_injection": "cross_attention"},
        {"action_injection": "concat"},
        {"action_injection": "cross_attention", "text_dim": 6},
        SHORTCUT,
    ],
)
def test_costs_are_counted(changes, monkeypatch):
    monkeypatch.setattr(blocks, "HAS_TILES", False)  # the counter does not know the fused kernel of a CPU
    config = DiffusionConfig(**SIZES | changes)
    model = Diffusion(config)
    assert count_parameters(config) == sum(weight.numel() for weight in model.parameters())
    latents, actions = clip(model, 1, 6)
    batch = {"latents": latents, "action": actions, "seed": torch.tensor(0)}
    if config.text_dim:
        batch["text"] = torch.ones(1, 3, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch)
    cost = training_cost(config, num_frames=6, text_words=3 if config.text_dim else 0)
    passes = 3 / (1 + 2 / 3) if config.shortcut else 1  # the cost is a third of a step's, backward pass included
    # Positions are embedded once for all passes.
    assert cost.frame_flops * 5 * passes == pytest.approx(counter.get_total_flops(), rel=0.05 if passes > 1 else 1e-3)
    assert cost.parameters == count_parameters(config) and cost.token_flops * config.frame_tokens == cost.frame_flops


def test_noising_is_that_of_the_formulation():
    level = torch.tensor([[0.3, 0.9]])
    for formulation, expected in (("edm", edm(level, 0.7)), ("flow", flow(level))):
        model = make_model(formulation=formulation, sigma_data=0.7)
        got = model.noising(level)
        assert torch.equal(got.told, expected.told) and torch.equal(got.out.flatten(1), expected.out)
        sigma = model.level_of(torch.tensor([0.25])) / model.noising(model.level_of(torch.tensor([[0.25]]))).scale
        torch.testing.assert_close(sigma.flatten(), torch.tensor([0.25]))
