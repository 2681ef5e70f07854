"""The baseline: what its parts see, that it denoises, and a small world that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from wfm_core.models.diffusion_config import DiffusionConfig, count_parameters
from wfm_core.models.irasim import BETAS, NOISE_STEPS, Irasim, IrasimConfig, noise_levels
from wfm_core.train import TrainConfig, fit
from wfm_core.world_model import merge_rows

SIZES = IrasimConfig(
    latent_dim=3, grid=(2, 4), width=24, num_layers=2, num_heads=2, ffn_ratio=2, num_frames=5, num_steps=4
)


def make_model(**changes) -> Irasim:
    """Large random weights, so that every input matters."""
    torch.manual_seed(0)
    model = Irasim(replace(SIZES, **changes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model.double().requires_grad_(False)


def inputs(model: Irasim, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (B, T, h, w, C) and actions (B, T - 1, 7)."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, model.config.num_frames, *model.latent_shape, generator=generator)
    return latents, 0.05 * torch.rand(batch, model.config.chunk, 7, generator=generator)


def test_it_has_as_many_parameters_as_what_it_is_compared_with():
    with torch.device("meta"):
        ours = sum(weight.numel() for weight in Irasim(IrasimConfig()).parameters())
    assert ours == pytest.approx(count_parameters(DiffusionConfig()), rel=0.05)


def test_noise_levels_are_those_of_the_published_schedule():
    levels = noise_levels()
    kept = np.cumprod(1 - np.linspace(*BETAS, NOISE_STEPS))
    np.testing.assert_allclose(1 / (1 + levels.numpy() ** 2), kept)
    assert levels[0] == pytest.approx(0.01, rel=1e-3) and levels[-1] > 150


def test_cells_see_their_frame_and_its_action_and_all_frames_and_actions_over_time():
    def moved(model: Irasim, change: str) -> torch.Tensor:
        """Which cells (T - 1, h, w) of the first row come out otherwise if something changes."""
        latents, actions = inputs(model)
        step, sigma = torch.tensor([400.0, 400.0]), torch.tensor([1.5, 1.5])
        before = model._noise_in(latents[:, 0], latents[:, 1:], step, sigma, actions)
        first, noisy, actions = latents[:, 0].clone(), latents[:, 1:].clone(), actions.clone()
        match change:
            case "first":
                first[0, 0, 0, 0] += 1
            case "cell":
                noisy[0, 2, 1, 3, 0] += 1
            case "action":
                actions[0, 2, 0] += 0.05
            case "other row":
                noisy[1] += 1
            case "level":
                step = step + torch.tensor([200.0, 0])
        after = model._noise_in(first, noisy, step, sigma, actions)
        return ((after - before)[0].abs() > 1e-9).any(dim=-1)

    space, both = make_model(num_layers=1), make_model()
    assert not moved(both, "other row").any() and moved(both, "level").all()
    assert not moved(space, "first").any() and moved(both, "first").all()
    for change in ("cell", "action"):
        seen = moved(space, change)
        assert seen[2].all() and seen.sum() == 8  # nothing but that frame
        assert moved(both, change).all()  # before it, too


def test_a_network_that_knows_the_data_leads_there_from_any_noise(monkeypatch):
    model = make_model(latent_mean=(1.0, 2.0, 3.0), latent_std=(0.5, 1.0, 2.0))
    latents, actions = inputs(model)
    data, seen = model.normalise(latents)[:, 1:], []

    def knows(first, noisy, step, sigma, told):
        seen.append((int(step[0]), float(sigma[0]), told))
        torch.testing.assert_close(first, model.normalise(latents)[:, 0])
        return (noisy - data) / sigma[:, None, None, None, None]

    monkeypatch.setattr(model, "_noise_in", knows)
    state = model.start(latents[:, :1], actions[:, :0], [3, 4])
    after, made, doubt = model.step_chunk(state, actions[:, :3])
    torch.testing.assert_close(made, latents[:, 1:4], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(after["last"], made[:, -1])
    assert after["step"].tolist() == [3, 3] and (doubt < 1e-4).all()
    assert [step for step, _, _ in seen] == [1000, 667, 334, 1]
    assert [sigma for _, sigma, _ in seen] == pytest.approx(noise_levels()[[999, 666, 333, 0]].tolist())
    assert torch.equal(seen[0][2], torch.cat([actions[:, :3], actions[:, 2:3]], dim=1))  # the last one goes on


def test_the_loss_is_that_of_the_noise(monkeypatch):
    model = make_model()
    latents, actions = inputs(model, 512)
    batch = {"latents": latents, "action": F.pad(actions, (0, 0, 0, 1)), "seed": torch.tensor(1)}
    steps = []

    def finds_most(first, noisy, step, sigma, told):
        steps.append(step)
        sigma = sigma[:, None, None, None, None]
        return (noisy - latents[:, 1:]) / sigma + 0.5

    monkeypatch.setattr(model, "_noise_in", finds_most)
    loss, metrics = model(batch)
    assert loss.item() == pytest.approx(0.25, rel=1e-3) and metrics["error"] == loss
    assert (
        steps[0].min() >= 1 and steps[0].max() <= NOISE_STEPS and steps[0].float().mean() == pytest.approx(500, abs=40)
    )
    monkeypatch.setattr(model, "_noise_in", lambda first, noisy, *rest: torch.zeros_like(noisy))
    assert model(batch)[0].item() == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="clips must have 5 frames, got 4"):
        model(batch | {"latents": latents[:, :4]})


def test_rows_are_their_own_and_states_are_values():
    model = make_model()
    latents, actions = inputs(model, 3)
    state = model.start(latents[:, :2], actions[:, :1], [7, 8, 9])
    copy = {name: value.clone() for name, value in state.items()}
    after, made, _ = model.step_chunk(state, actions)
    assert all(torch.equal(state[name], copy[name]) for name in copy)
    alone, mine, _ = model.step_chunk({name: value[1:2] for name, value in state.items()}, actions[1:2])
    torch.testing.assert_close(mine[0], made[1])
    merged = merge_rows(torch.tensor([True, False, False]), state, after)
    assert torch.equal(merged["last"][1:], after["last"][1:]) and torch.equal(alone["step"], after["step"][1:2])
    one, frame, doubt = model.step(state, actions[:, 0])
    assert frame.shape == (3, 2, 4, 3) and doubt.shape == (3,) and one["step"].tolist() == [1, 1, 1]
    other, again, _ = model.step_chunk({**state, "seed": state["seed"] + 1}, actions)
    assert (again != made).any()
    with pytest.raises(ValueError, match="1 to 4 frames, the model's chunk, got 5"):
        model.step_chunk(state, torch.zeros(3, 5, 7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 26, "num_heads": 4}, "width must be a multiple of num_heads, got 26 and 4"),
        ({"num_frames": 1}, "num_frames must be at least 2, the given one and the next, got 1"),
        ({"num_steps": 0}, r"num_steps must lie in \[1, 1000\], got 0"),
        ({"latent_std": (1.0,)}, "latent_std must have latent_dim = 3 entries or none"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SIZES, **changes)


def test_a_small_world_is_learnt(tmp_path):
    """Every number goes up or down with the first entry of the action; nothing of that can be seen in the noise."""
    torch.manual_seed(0)
    model = Irasim(replace(SIZES, width=48))

    def world(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        actions = torch.zeros(batch, 5, 7)
        actions[..., 0] = 0.05 * torch.randint(-1, 2, (batch, 5), generator=generator)
        level = torch.randn(batch, 1, generator=generator) + F.pad(10 * actions[:, :4, 0], (1, 0)).cumsum(dim=1)
        return level[..., None, None, None].expand(-1, -1, *model.latent_shape), actions

    def batch_fn(step: int) -> dict[str, torch.Tensor]:
        latents, actions = world(32, step)
        return {"latents": latents, "action": actions, "seed": torch.tensor(step)}

    settings = TrainConfig(num_steps=300, learning_rate=4e-3, warmup_steps=10, ema_decay=0.95, bf16=False)
    model.load_state_dict(fit(model, batch_fn, settings, tmp_path))
    latents, actions = world(64, 10_000)
    step = torch.full((64,), 500.0)
    sigma = noise_levels()[499].float().expand(64)
    noise = torch.randn(latents[:, 1:].shape, generator=torch.Generator().manual_seed(1))
    noisy = latents[:, 1:] + sigma[:, None, None, None, None] * noise
    with torch.no_grad():
        found = noisy - sigma[:, None, None, None, None] * model._noise_in(
            latents[:, 0], noisy, step, sigma, actions[:, :4]
        )
    error = (found - latents[:, 1:]).square().mean().sqrt()
    still = (latents[:, :1] - latents[:, 1:]).square().mean().sqrt()
    assert sigma[0] > 3 and error < 0.5 * still
