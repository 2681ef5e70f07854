"""The diffusion decoder: what it is told, that it draws one of the latents behind tokens, and how it is loaded."""

from dataclasses import replace

import pytest
import torch

from wfm_core.checkpoint import (
    as_json,
    load_patch_tokenizer,
    load_world_model,
    read_config,
    save_weights,
    write_config,
)
from wfm_core.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig, LatentDenoiser
from wfm_core.train import TrainConfig, fit
from wfm_core.world_model import Reference

SIZES = DiffusionDecoderConfig(
    code_dim=2, latent_dim=3, grid=(2, 2), width=24, num_layers=2, num_heads=2, ffn_ratio=2, num_steps=3
)
NAMES = ("codes", "reference_codes", "reference_latents")


def make_model(**changes) -> LatentDenoiser:
    """Large random weights, so that every input matters."""
    torch.manual_seed(0)
    model = LatentDenoiser(replace(SIZES, **changes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.requires_grad_(False)


def batch_of(rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dims = {"latents": 3, "codes": 2, "reference_latents": 3, "reference_codes": 2}
    made = {name: torch.randn(rows, 2, 2, dim, generator=generator) for name, dim in dims.items()}
    return made | {"seed": torch.tensor(5)}


def test_the_loss_is_that_of_a_rectified_flow(monkeypatch):
    model, batch = make_model(latent_mean=(1.0, 2.0, 3.0), latent_std=(0.5, 1.0, 2.0)), batch_of()
    loss, metrics = model(batch)
    noise, level = model._draw(batch["latents"], batch["seed"])
    normal = (batch["latents"] - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([0.5, 1.0, 2.0])
    wide = level[:, None, None, None]
    given = model.conditions(*(batch[name] for name in NAMES))
    x = (1 - wide) * normal + wide * noise
    error = (model._velocity(x, level, given) - (noise - normal)).square()
    torch.testing.assert_close(loss, error.mean())
    denoised = x - wide * model._velocity(x, level, given)
    torch.testing.assert_close(metrics["denoised"], (denoised - normal).square().mean())
    assert model(batch)[0] == loss != model(batch | {"seed": torch.tensor(6)})[0]


def test_a_frame_is_told_of_itself_and_its_reference_alone():
    model, batch = make_model(), batch_of()
    before = model.sample(model.conditions(*(batch[name] for name in NAMES)))
    for name in NAMES:
        other = {key: value.clone() for key, value in batch.items()}
        other[name][1, 0, 1] += 1
        change = (model.sample(model.conditions(*(other[key] for key in NAMES))) - before).abs().amax(dim=(1, 2, 3))
        assert change[1] > 1e-3 and change[0] < 1e-5 and change[2] < 1e-5


def test_like_frames_are_drawn_alike_whatever_the_batch():
    model = make_model()
    given = model.conditions(*(batch_of(1)[name] for name in NAMES)).expand(4, -1, -1, -1)
    drawn = model.sample(given)
    torch.testing.assert_close(drawn, model.sample(given[:1]).expand_as(drawn))
    assert drawn.dtype == torch.float32 and not torch.equal(drawn, model.sample(given, num_steps=1))


def test_everything_is_trained():
    torch.manual_seed(0)
    model = LatentDenoiser(SIZES)
    for weight in model.parameters():
        if not weight.any():  # what begins at zero hides what is before it
            weight.data.normal_(std=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(batch_of(8))
    loss.backward()
    assert loss.dtype == torch.float32
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_one_of_the_latents_behind_tokens_is_drawn_not_their_mean(tmp_path):
    """A code says how large a latent is, not of which sign, one for all its numbers: what is drawn has one."""
    model = LatentDenoiser(replace(SIZES, num_steps=16))

    def batches(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        size = 0.5 + torch.rand(64, 1, 1, 1, generator=generator)
        sign = torch.randint(2, (64, 1, 1, 1), generator=generator) * 2.0 - 1
        still = {"reference_latents": torch.zeros(64, 2, 2, 3), "reference_codes": torch.zeros(64, 2, 2, 2)}
        latents, codes = (size * sign).expand(-1, 2, 2, 3), size.expand(-1, 2, 2, 2)
        return {"latents": latents, "codes": codes, "seed": torch.tensor(step)} | still

    torch.manual_seed(0)
    settings = TrainConfig(num_steps=500, learning_rate=4e-3, warmup_steps=20, ema_decay=0.98, bf16=False)
    model.load_state_dict(fit(model, batches, settings, tmp_path))
    sizes = torch.linspace(0.6, 1.4, 9)
    codes = sizes.view(-1, 1, 1, 1).expand(-1, 2, 2, 2)
    drawn = model.sample(model.conditions(codes, 0 * codes, torch.zeros(9, 2, 2, 3))).flatten(1)
    assert (drawn.sign() == drawn[:, :1].sign()).all()
    torch.testing.assert_close(drawn.abs(), sizes[:, None].expand_as(drawn), atol=0.35, rtol=0)
    mean = model.sample(model.conditions(codes, 0 * codes, torch.zeros(9, 2, 2, 3)), num_steps=1)
    assert mean.abs().mean() < 0.5


@pytest.fixture
def checkpoint(tiny_checkpoint, tiny_diffusion, tmp_path):
    """The tiny one with a diffusion decoder that draws the latents of the other's tokenizer."""
    import shutil

    shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    model = make_model(code_dim=3, latents_of=str(tiny_diffusion))
    save_weights(tmp_path / "tiny", "decoder", model.state_dict())
    write_config(tmp_path / "tiny", read_config(tiny_checkpoint) | {"decoder": as_json(model.config)})
    return tmp_path / "tiny"


def test_pixels_are_drawn_through_the_other_tokenizer(checkpoint, tiny_diffusion):
    plain, model = (
        load_world_model(checkpoint, dtype=torch.float32, decoder=name) for name in ("tokenizer", "diffusion")
    )
    frames = torch.randint(256, (2, 1, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = model.encode(frames)
    assert torch.equal(codes, plain.encode(frames))
    reference = Reference(frames[:, 0], codes[:, 0])
    made = model.decode(codes[:, 0], reference)
    assert made.shape == (2, 32, 32, 3) and made.dtype == torch.uint8
    assert not torch.equal(made, plain.decode(codes[:, 0], reference))
    continuous = load_patch_tokenizer(tiny_diffusion)
    denoiser = make_model(code_dim=3)
    for name, value in model.decoder.denoiser.state_dict().items():
        torch.testing.assert_close(value, denoiser.state_dict()[name], atol=1e-3, rtol=1e-3)
    pixels = frames[:, 0].permute(0, 3, 1, 2) / 127.5 - 1
    latents = continuous.encode(pixels)
    drawn = model.decoder.denoiser.sample(denoiser.conditions(codes[:, 0], codes[:, 0], latents))
    expected = continuous.decode(drawn, pixels, latents)
    torch.testing.assert_close((made.permute(0, 3, 1, 2) / 127.5 - 1), expected.clamp(-1, 1), atol=0.005, rtol=0)
    half = load_world_model(checkpoint, dtype=torch.bfloat16, decoder="diffusion")
    assert half.decoder.tokenizer.position.dtype == torch.bfloat16
    assert next(half.decoder.tokenizer.encoder.parameters()).dtype == torch.float32
    assert (half.decode(codes[:, 0], reference).float() - made.float()).abs().mean() < 4


def test_what_does_not_fit_is_named(checkpoint, tiny_checkpoint, tiny_diffusion):
    with pytest.raises(ValueError, match=r"decoder must be one of \('tokenizer', 'diffusion'\), got 'gan'"):
        load_world_model(checkpoint, decoder="gan")
    with pytest.raises(ValueError, match="must describe the part 'decoder'"):
        load_world_model(tiny_checkpoint, decoder="diffusion")
    with pytest.raises(ValueError, match=r"bridge-nano-diffusion must have latents \(2, 4, 3\), got \(2, 2, 3\)"):
        DiffusionDecoder(make_model(grid=(2, 4)), load_patch_tokenizer(tiny_diffusion))
    with pytest.raises(ValueError, match="width must be a multiple of num_heads, got 24 and 5"):
        replace(SIZES, num_heads=5)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        replace(SIZES, num_steps=0)
