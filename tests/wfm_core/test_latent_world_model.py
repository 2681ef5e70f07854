"""Generation by diffusion: against the pass over whole clips, as a `WorldModel`, and in a world that is known."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from latent_clips import clip, make_diffusion
from torch.nn import functional as F

from wfm_core.models.denoising import DiffusionModel
from wfm_core.models.diffusion import Shown
from wfm_core.models.diffusion_config import ACTION_INJECTIONS, DiffusionConfig
from wfm_core.models.latent_world_model import LatentWorldModel
from wfm_core.models.positions import RopeConfig
from wfm_core.samplers import SAMPLERS, karras_levels, shifted_levels
from wfm_core.sampling import row_normal
from wfm_core.tokenizers.patch import PatchTokenizer, PatchTokenizerConfig
from wfm_core.train import TrainConfig, fit
from wfm_core.world_model import Reference, merge_rows, repeat_rows

make_model = partial(make_diffusion, DiffusionModel)
SHORTCUT = {"formulation": "flow", "sampler": "euler", "num_steps": 2, "shortcut": 0.5}
KINDS = {
    "edm": {"text_dim": 6, "guidance": 1.5, "latent_mean": (1.0, 2.0, 3.0), "latent_std": (0.5, 1.0, 2.0)},
    "flow": {"formulation": "flow", "sampler": "heun", "shift": 2.0, "action_injection": "cross_attention"},
    "shortcut": SHORTCUT | {"action_injection": "concat", "patch": 2},
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request) -> dict:
    return KINDS[request.param]


def text_of(model, batch: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"text": torch.randn(batch, 4, 6, generator=generator)} if model.config.text_dim else {}


def begin(model, batch: int = 2, context: int = 2, time: int = 7):
    latents, actions = clip(model, batch, time)
    state = model.start(latents[:, :context], actions[:, : context - 1], range(5, 5 + batch), **text_of(model, batch))
    return state, latents, actions


def uncached(model, past, actions, noise, text=None, fps=None):
    """Denoise the frames that follow, in one pass over all of the clip for every evaluation; (B, c, h, w, C).

    Args: past (B, T, h, w, C), actions (B, T - 1 + c, 7), noise (B, c, h, w, C).
    """
    config, time, count = model.config, past.shape[1], noise.shape[1]
    rows = len(past)
    pieces = model._pieces_of_clip(time + count - 1, time + count - 1, count)
    # The copies of the last chunk alone; those of earlier frames are nobody else's business.
    num = time + count - 1
    seen = [*pieces[:num], *pieces[num:]]
    frame = torch.cat([torch.arange(num), torch.arange(1, num + 1)])
    sight = model.sight(frame[None] * (1 if fps is None else 5.0 / fps), seen)
    read = None if text is None else model.read(text)
    level_past = model.level_of(torch.full((rows, num), config.context_sigma))
    shown_past = model.normalise(torch.cat([past, past[:, :1].expand(-1, count - 1, -1, -1, -1)], dim=1))
    lead = F.pad(actions, (0, 0, 1, 0))
    travel = lead[..., :6].cumsum(dim=1)[:, frame]
    lead = lead[:, frame]
    last = torch.cat([torch.arange(num) - 1, torch.full((num,), time - 1)])

    def denoise(x, level, told=True):
        levels = torch.cat([level_past, torch.full((rows, num), level)], dim=1)
        noising = model.noising(levels)
        copies = torch.cat([torch.zeros(rows, time - 1, *x.shape[2:]), x], dim=1)
        latents = torch.cat([shown_past * noising.scale[:, :num], copies], dim=1)
        known = (frame > 0) & (torch.arange(2 * num) < num if not told else torch.ones(2 * num, dtype=torch.bool))
        size = 1 / config.num_steps if config.shortcut else 0
        step = torch.where(torch.arange(2 * num) < num, 0.0, size).expand(rows, -1)
        before = latents[:, last] * (last >= 0).float()[:, None, None, None]
        shown = Shown(latents, before, levels, num, lead, travel, known.expand(rows, -1), step)
        may_read = torch.full((rows,), told)
        out = model.run(shown, sight, read, may_read, lambda _, own: own)[:, -count:]
        return noising.skip[:, -count:] * x + noising.out[:, -count:] * out

    def guided(x, level):
        plain = denoise(x, level)
        if config.guidance == 1:
            return plain
        return config.guidance * plain + (1 - config.guidance) * denoise(x, level, told=False)

    return model.restore(SAMPLERS[config.sampler](guided, noise, levels_of(config)))


def levels_of(config) -> list[float]:
    if config.formulation == "edm":
        return karras_levels(config.num_steps, config.sigma_min, config.sigma_max, config.rho)
    return shifted_levels(config.num_steps, config.shift)


def noise_of(model, seeds, steps) -> torch.Tensor:
    size = model.latent_shape[0] * model.latent_shape[1] * model.latent_shape[2]
    seeds = torch.tensor(seeds)
    draws = [row_normal(seeds, torch.full_like(seeds, step), 0, size) for step in steps]
    return torch.stack(draws, dim=1).unflatten(-1, model.latent_shape)


# --- the cached passes are the network over the whole clip ---------------------------------------------------------


@pytest.mark.parametrize(("window", "fps"), [(1, 5.0), (3, 10.0), (8, 5.0)])
def test_steps_equal_the_pass_over_the_whole_clip(kind, window, fps):
    model = make_model(window=window, **kind)
    latents, actions = clip(model, 2, 6)
    text = text_of(model, 2)
    state = model.start(latents[:, :2], actions[:, :1], [5, 6], **text, fps=fps)
    past = latents[:, :2]
    for t in range(4):
        state, made, _ = model.step(state, actions[:, t + 1])
        noise = noise_of(model, [5, 6], [t])
        expected = uncached(model, past, actions[:, : t + 2], noise, fps=torch.tensor([[fps]]), **text)
        torch.testing.assert_close(made, expected[:, 0], rtol=1e-3, atol=1e-3)
        past = torch.cat([past, made[:, None]], dim=1)
    assert made.dtype == torch.float32 and state["count"].tolist() == [6, 6] and state["step"].tolist() == [4, 4]


@pytest.mark.parametrize("window", [2, 8])
def test_a_chunk_equals_the_pass_over_the_whole_clip(kind, window):
    model = make_model(window=window, chunk=3, **kind)
    latents, actions = clip(model, 2, 6)
    text = text_of(model, 2)
    state = model.start(latents[:, :4], actions[:, :3], [5, 6], **text)
    after, made, _ = model.step_chunk(state, actions[:, 3:6])
    expected = uncached(model, latents[:, :4], actions, noise_of(model, [5, 6], [0, 1, 2]), **text)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
    again = model.start(torch.cat([latents[:, :4], made], dim=1), actions, [5, 6], **text)
    assert after["step"].tolist() == [3, 3] and again.keys() == after.keys()
    for name in again.keys() - {"step"}:  # what was generated is context like any other
        torch.testing.assert_close(again[name], after[name], rtol=1e-4, atol=1e-5)


def test_a_chunk_of_one_is_a_step(kind):
    model = make_model(chunk=2, **kind)
    state, _, actions = begin(model)
    one, two = model.step(state, actions[:, 1]), model.step_chunk(state, actions[:, 1:2])
    assert torch.equal(one[1], two[1][:, 0]) and torch.equal(one[2], two[2][:, 0])
    assert one[2].shape == (2,) and all(torch.equal(one[0][name], two[0][name]) for name in one[0])
    assert torch.equal(one[0]["cache0.0"], state["cache0.0"])
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"actions must be of 1 to 2 frames, the model's chunk, got {count}"):
            model.step_chunk(state, actions[:, :count])


def test_the_future_of_a_chunk_leaves_its_beginning_alone(kind):
    model = make_model(chunk=3, **kind)
    state, _, actions = begin(model)
    before = model.step_chunk(state, actions[:, 1:4])[1]
    for k in range(3):
        other = actions[:, 1:4].clone()
        other[:, k] += 0.02
        after = model.step_chunk(state, other)[1]
        assert torch.equal(after[:, :k], before[:, :k]) and (after[:, k:] != before[:, k:]).flatten(2).any(dim=-1).all()


def test_a_first_frame_is_imagined_from_its_text_alone(kind):
    model = make_model(window=4, **kind | {"text_dim": 6})
    latents, actions = clip(model, 2, 3)
    text = text_of(model, 2)["text"]
    state = model.start(latents[:, :0], actions[:, :0], [5, 6], text=text)
    after, first, _ = model.step(state, actions[:, 0])
    assert after["count"].tolist() == [1, 1] and not after["travel"].any()
    still, same, _ = model.step(state, 0 * actions[:, 0])  # no action leads to it
    assert torch.equal(first, same) and all(torch.equal(after[name], still[name]) for name in after)
    others = model.start(latents[:, :0], actions[:, :0], [5, 6], text=text.flip(0))
    assert not torch.equal(model.step(others, actions[:, 0])[1], first)
    # From there on the rollout is one that began with that frame.
    again = model.start(first[:, None], actions[:, :0], [5, 6], text=text)
    again["step"] = after["step"]
    torch.testing.assert_close(model.step(after, actions[:, 1])[1], model.step(again, actions[:, 1])[1])
    # It is denoised as a clip of one frame is in training.
    noise = noise_of(model, [5, 6], [0])
    sight = model.sight(torch.zeros(1, 1), model._pieces_of_clip(0, 1, 1))
    step = torch.full((2, 1), 1 / model.config.num_steps if model.config.shortcut else 0.0)

    def denoise(x, level, told=True):
        levels = torch.full((2, 1), level)
        nothing = torch.zeros(2, 1, 7), torch.zeros(2, 1, 6), torch.zeros(2, 1, dtype=torch.bool)
        shown, noising = Shown(x, 0 * x, levels, 0, *nothing, step), model.noising(levels)
        out = model.run(shown, sight, model.read(text), torch.full((2,), told), lambda _, own: own)
        return noising.skip * x + noising.out * out

    def guided(x, level):
        weight = model.config.guidance
        return weight * denoise(x, level) + (1 - weight) * (denoise(x, level, told=False) if weight != 1 else 0)

    expected = model.restore(SAMPLERS[model.config.sampler](guided, noise, levels_of(model.config)))
    torch.testing.assert_close(first, expected[:, 0], rtol=1e-3, atol=1e-3)


# --- states --------------------------------------------------------------------------------------------------------


def test_a_batch_equals_its_rows_and_a_branch_its_trunk(kind):
    model = make_model(**kind)
    state, latents, actions = begin(model, 3)
    alone = model.start(latents[1:2, :2], actions[1:2, :1], [6], **{k: v[1:2] for k, v in text_of(model, 3).items()})
    branched = repeat_rows(state, 2)
    for t in range(1, 4):
        state, made, doubt = model.step(state, actions[:, t])
        alone, lonely, lonely_doubt = model.step(alone, actions[1:2, t])
        branched, twice, _ = model.step(branched, actions[:, t].repeat_interleave(2, dim=0))
        torch.testing.assert_close(lonely, made[1:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lonely_doubt, doubt[1:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twice, made.repeat_interleave(2, dim=0), rtol=1e-4, atol=1e-5)


def test_rows_restart_without_disturbing_the_others(kind):
    model = make_model(**kind)
    state, latents, actions = begin(model)
    for t in range(1, 5):
        state, _, _ = model.step(state, actions[:, t])
    fresh = model.start(latents[:, 5:6], actions[:, :0], [1, 2], **text_of(model, 2))
    merged = merge_rows(torch.tensor([False, True]), fresh, state)
    expected = [model.step(state, actions[:, 5])[1], model.step(fresh, actions[:, 5])[1]]
    after, made, _ = model.step(merged, actions[:, 5])
    torch.testing.assert_close(made, torch.stack([expected[0][0], expected[1][1]]), rtol=1e-4, atol=1e-5)
    assert after["count"].tolist() == [7, 2] and after["step"].tolist() == [5, 1]


def test_states_are_values(kind):
    model = make_model(**kind)
    state, latents, actions = begin(model)
    assert all(len(value) == 2 for value in state.values())
    copy = {name: value.clone() for name, value in state.items()}
    latents.fill_(0)  # the caller's memory is not the state's
    after, made, _ = model.step(state, actions[:, 1])
    again, same, _ = model.step(state, actions[:, 1])
    model.step(after, actions[:, 2])
    assert state.keys() == copy.keys() == after.keys()
    assert all(torch.equal(state[name], copy[name]) for name in copy)
    assert torch.equal(made, same) and all(torch.equal(after[name], again[name]) for name in after)
    assert all(after[name].shape == state[name].shape for name in state)


def test_samples_depend_on_the_row_seed_and_step_alone(kind):
    model = make_model(**kind)
    latents, actions = clip(model, 1, 2)
    text = {name: value.expand(3, -1, -1) for name, value in text_of(model, 1).items()}
    state = model.start(latents[:, :1].expand(3, -1, -1, -1, -1), actions[:, :0].expand(3, -1, -1), [3, 9, 3], **text)
    _, made, _ = model.step(state, actions[:, 0].expand(3, -1))
    torch.testing.assert_close(made[0], made[2], rtol=1e-5, atol=1e-6)
    assert (made[0] - made[1]).abs().max() > 1e-3
    later = model.step({**state, "step": state["step"] + 1}, actions[:, 0].expand(3, -1))[1]
    assert (later[0] - made[0]).abs().max() > 1e-3


def test_guidance_of_one_is_none_and_others_go_beyond(monkeypatch):
    model = make_model(untold=0.1)
    state, _, actions = begin(model)
    asked, run = [], model.run
    monkeypatch.setattr(model, "run", lambda shown, *args: asked.append(shown) or run(shown, *args))
    plain = model.step(state, actions[:, 1])[1]
    assert len(asked) == 3 + 1 and all(shown.known.all() for shown in asked)  # three steps, and the frame is cached
    asked.clear()
    model.config = replace(model.config, guidance=1.5)
    assert not torch.equal(model.step(state, actions[:, 1])[1], plain)
    assert [bool(shown.known.all()) for shown in asked].count(False) == 3


def test_uncertainty_is_how_far_the_sample_lies_from_the_mean(monkeypatch):
    model = make_model(sigma_data=0.5)
    state, _, actions = begin(model)

    def run(shown, sight, text, told, look):
        """Of a world whose next frame is 0.3 or -0.3 throughout, as likely."""
        for i in range(2):
            look(i, state["cache0.0"])
        noising, x = model.noising(shown.level), shown.latents
        denoised = 0.3 * torch.tanh(0.3 * x.sum(dim=(2, 3, 4), keepdim=True) / shown.level[..., None, None, None] ** 2)
        return (denoised - noising.skip * x) / noising.out

    monkeypatch.setattr(model, "run", run)
    _, made, doubt = model.step(state, actions[:, 1])
    torch.testing.assert_close(made.abs(), torch.full_like(made, 0.6), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(doubt, torch.full((2,), 0.36 / 1.36), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("fps", [5.0, 2.5])
def test_a_still_world_looks_the_same_however_long_it_has_stood(fps):
    model = make_model(rope=RopeConfig(trained_frames=4, extension=1.5))
    latents, actions = clip(model, 1, 1)
    actions[..., :6] = 0
    state = model.start(latents, actions[:, :0], [0], fps=fps)
    still, looks = model.normalise(latents), []
    for _ in range(40):
        looks.append(model.step(state, actions[:, 0])[1])
        held = state["step"]
        state = {**model._remember(state, still, actions), "step": held}
    assert (looks[2] - looks[1]).abs().max() > 1e-3
    torch.testing.assert_close(looks[39], looks[20], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        model.start(latents, actions[:, :0], [0], fps=0)


# --- a whole small world -------------------------------------------------------------------------------------------


def moving_point(batch: int, time: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One cell of two numbers, x' = x + a: latents (B, T, 1, 1, 2) and physical actions (B, T, 7)."""
    actions = torch.zeros(batch, time, 7)
    actions[..., :2] = 0.1 * torch.rand(batch, time, 2, generator=generator) - 0.05
    moved = torch.cat([torch.zeros(batch, 1, 2), 20 * actions[:, :-1, :2].cumsum(dim=1)], dim=1)
    start = 2 * torch.rand(batch, 1, 2, generator=generator) - 1
    return (start + moved)[:, :, None, None], actions


@pytest.mark.parametrize(
    "kind",
    [
        {"num_steps": 6, "noise_std": 1.5, "sigma_max": 10.0},
        SHORTCUT | {"shortcut": 0.25, "num_steps": 1},
    ],
)
def test_a_small_world_is_learnt(tmp_path, kind):
    torch.manual_seed(0)
    config = DiffusionConfig(
        latent_dim=2, grid=(1, 1), width=48, head_dim=12, num_layers=2, num_heads=4, ffn_ratio=2, adaln_rank=8,
        window=3, chunk=2, untold=0.0, context_mean=-4.0, latent_mean=(0.0, 0.0), latent_std=(1.0, 1.0),
        rope=RopeConfig(trained_frames=4), **kind,
    )  # fmt: skip
    model = DiffusionModel(config)

    def batch_fn(step: int) -> dict[str, torch.Tensor]:
        latents, actions = moving_point(64, 4, torch.Generator().manual_seed(step))
        return {"latents": latents, "action": actions, "seed": torch.tensor(step)}

    settings = TrainConfig(num_steps=250, learning_rate=5e-3, warmup_steps=10, ema_decay=0.95, bf16=False)
    model.load_state_dict(fit(model, batch_fn, settings, tmp_path))
    model.eval().requires_grad_(False)
    latents, actions = moving_point(64, 4, torch.Generator().manual_seed(10_000))
    state = model.start(latents[:, :2], actions[:, :1], range(64))
    _, together, _ = model.step_chunk(state, actions[:, 1:3])
    state, first, doubt = model.step(state, actions[:, 1])
    _, second, _ = model.step(state, actions[:, 2])
    standing = (latents[:, 2] - latents[:, 1]).square().mean().sqrt()
    for made, real in ((first, latents[:, 2]), (second, latents[:, 3]), (together, latents[:, 2:])):
        assert (made - real).square().mean().sqrt() < 0.4 * standing
    assert doubt.mean() < 0.1


# --- the world model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PatchTokenizer:
    torch.manual_seed(0)
    sizes = {"encoder_dim": 16, "encoder_blocks": 1, "decoder_dims": (8, 8, 8), "decoder_blocks": (1, 1, 1)}
    return PatchTokenizer(PatchTokenizerConfig(image_size=32, levels=(), latent_dim=3, **sizes)).eval()


def small(**changes) -> DiffusionModel:
    return make_model(grid=(2, 2), **changes).float()


class Counter:
    feature_dim, max_words = 6, 5

    def __call__(self, texts):
        return torch.stack([F.pad(torch.ones(len(text), 6), (0, 0, 0, 4 - len(text))) for text in texts])


def test_a_world_model_passes_latents_on(tokenizer):
    model = LatentWorldModel(tokenizer, small(chunk=2))
    frames = torch.randint(0, 256, (2, 3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    actions = 0.05 * torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(1))
    latents = model.encode(frames)
    assert latents.shape == (2, 3, *model.latent_shape) == (2, 3, 2, 2, 3) and latents.dtype == torch.float32
    state = model.start(latents, actions[:, :2], [1, 2], ["push", "pull"])  # this one does not read
    after, made, doubt = model.step(state, actions[:, 2])
    expected = model.dynamics.step(model.dynamics.start(latents, actions[:, :2], [1, 2]), actions[:, 2])
    assert torch.equal(made, expected[1]) and torch.equal(doubt, expected[2]) and after.keys() == state.keys()
    assert made.shape == (2, 2, 2, 3) and made.dtype == torch.float32 and ((0 <= doubt) & (doubt <= 1)).all()
    chunk = model.step_chunk(state, actions[:, 1:])
    assert torch.equal(chunk[1], model.dynamics.step_chunk(state, actions[:, 1:])[1])
    decoded = model.decode(made, Reference(frames[:, 0], latents[:, 0]))
    assert decoded.shape == (2, 32, 32, 3) and decoded.dtype == torch.uint8


def test_who_reads_is_told_what_to_do(tokenizer):
    model = LatentWorldModel(tokenizer, small(text_dim=6), Counter())
    latents, actions = torch.zeros(2, 1, 2, 2, 3), torch.zeros(2, 1, 7)
    made = {}
    for texts in (None, ("a", "ab"), ("a", "abcd")):
        state = model.start(latents, actions[:, :0], [1, 2], texts)
        assert texts is None or state["text_bias"].shape[-1] == 6
        made[texts] = model.step(state, actions[:, 0])[1]
    silent, short, long = made.values()
    torch.testing.assert_close(short[0], long[0])
    assert (silent != short).flatten(1).any(dim=1).all() and not torch.allclose(short[1], long[1], atol=1e-4)


@pytest.mark.parametrize("injection", ACTION_INJECTIONS)
def test_half_precision_comes_close(tokenizer, injection):
    calm = small(action_injection=injection)
    for weight in calm.parameters():
        weight.mul_(0.5)
    model, half = LatentWorldModel(tokenizer, calm), LatentWorldModel(tokenizer, small(action_injection=injection))
    half.dynamics.load_state_dict(calm.state_dict())
    half.compute_in(torch.bfloat16)
    latents, actions = clip(calm, 2, 3)
    made = [m.step(m.start(latents[:, :2], actions[:, :1], [0, 1]), actions[:, 1])[1] for m in (model, half)]
    assert made[1].dtype == torch.float32 and half.dynamics.dtype == torch.bfloat16
    assert (made[1] - made[0]).abs().mean() < 0.05 * made[0].abs().mean()


def test_parts_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"share grid and latent_dim, got .*\(2, 2, 3\) and \(2, 4, 3\)"):
        LatentWorldModel(tokenizer, make_model())
