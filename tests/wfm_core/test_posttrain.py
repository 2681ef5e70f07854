"""Weights for another network: every tensor is accounted for, and what is not expected is refused."""

from dataclasses import replace

import pytest
import torch

from wfm_core.data.actions import ActionSpace
from wfm_core.models.autoregressive import Autoregressive, AutoregressiveConfig
from wfm_core.models.diffusion import Diffusion
from wfm_core.models.diffusion_config import DiffusionConfig
from wfm_core.posttrain import begin_at_zero, load_adapted, new_parts

SMALL = AutoregressiveConfig(
    levels=(5, 4, 3), grid=2, groups=1, width=16, num_heads=2, num_layers=2, time_layers=(1,), refiner_layers=1,
    window=2, self_forcing=0.0, corruption=0.0, stalling=0.0,
)  # fmt: skip
OTHER = ActionSpace(low=(-1.0, 0.0), high=(1.0, 2.0), travel_scale=())


def adapted(before: AutoregressiveConfig, after: AutoregressiveConfig):
    torch.manual_seed(0)
    old, new = Autoregressive(before), Autoregressive(after)
    parts = new_parts(before, after)
    report = load_adapted(new, old.state_dict(), parts)
    begin_at_zero(new, parts)
    return old, new, report


def test_a_new_action_space_has_a_new_projection_that_is_silent_at_first():
    old, new, report = adapted(SMALL, replace(SMALL, actions=OTHER))
    names = {f"embed_action.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert set(report.new) == set(report.left) == names and not report.resized
    assert set(report.loaded) == old.state_dict().keys() - names
    hot = torch.zeros(1, 1, 4, 15)
    unknown = {"travel": torch.zeros(1, 1, 0), "contact": torch.zeros(1, 1, dtype=torch.int64)}
    actions = torch.rand(2, 1, 1, 2)
    silent = new.input_features(hot, actions[0], actions[0], **unknown)
    assert torch.equal(silent, new.input_features(hot, actions[1] * torch.nan, actions[1], **unknown))
    unknown["travel"] = torch.zeros(1, 1, 6)
    nothing = torch.full((1, 1, 7), torch.nan)
    assert torch.equal(silent, old.input_features(hot, nothing, nothing, **unknown))
    assert "new: embed_action" in str(report) and f"loaded: {len(report.loaded)}" in str(report)


def test_text_and_rays_and_cameras_begin_anew_beside_what_is_there():
    after = replace(SMALL, text_dim=6, rays=True, num_cameras=2)
    old, new, report = adapted(SMALL, after)
    assert set(report.new) == {"embed_text.weight", "embed_rays.weight", "embed_camera"} and not report.left
    assert not new.embed_text.weight.any() and not new.embed_rays.weight.any() and new.embed_camera.any()
    inner = ("norm1.", "qkv.", "out.", "norm2.", "mlp.")
    shared = {name for name in old.state_dict() if not any(part in name for part in inner)}
    assert set(report.loaded) == shared and len(report.copied) == 2 * (len(old.state_dict()) - len(shared))
    assert f"copied: {len(report.copied)} tensors" in str(report)
    told = replace(after, num_cameras=1)
    back = Autoregressive(SMALL)
    left = load_adapted(back, Autoregressive(told).state_dict(), new_parts(told, SMALL)).left
    assert set(left) == set(report.new) - {"embed_camera"}


def test_each_camera_begins_as_the_only_one_and_learns_for_itself():
    old, new, _ = adapted(SMALL, replace(SMALL, num_cameras=2))
    new.embed_camera.data.zero_()
    hot, features = torch.rand(3, 4, 15), torch.rand(3, 4, 16)
    hidden = torch.ones(3, 4, 1, dtype=torch.bool)
    alone = old.refine(features, hot, hot, hidden)
    twice = [torch.cat([each, each], dim=1) for each in (features, hot, hot, hidden)]
    torch.testing.assert_close(new.refine(*twice), torch.cat([alone, alone], dim=1))
    wrist = new.refiner[0].mlp.each[1]
    wrist.down.weight.data.add_(1)
    changed = new.refine(*twice)
    torch.testing.assert_close(changed[:, :4], alone)
    assert not torch.allclose(changed[:, 4:], alone)


def test_positions_of_a_larger_frame_are_interpolated():
    torch.manual_seed(0)
    old, new = Autoregressive(SMALL), Autoregressive(replace(SMALL, grid=4))
    slope = torch.tensor([0.0, 1.0, 0.0, 1.0])  # from left to right
    old.position.data = slope[:, None].expand(4, 16).clone()
    report = load_adapted(new, old.state_dict(), [])
    assert report.resized == ("position",)
    rows = new.position.detach()[:, 0].view(4, 4)
    torch.testing.assert_close(rows, rows[:1].expand(4, 4))
    assert (rows[0].diff() > 0).all() and abs(rows.mean() - 0.5) < 1e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 32}, r"other shapes of \['contact"),
        ({"num_layers": 3}, r"lacks \['layers.2"),
        ({"num_layers": 1, "time_layers": (0,)}, "no place for"),
    ],
)
def test_what_is_not_expected_is_refused_by_name(change, said):
    with pytest.raises(ValueError, match=said):
        load_adapted(Autoregressive(replace(SMALL, **change)), Autoregressive(SMALL).state_dict(), [])


def test_the_diffusion_family_too():
    before = DiffusionConfig(latent_dim=3, grid=(2, 2), width=24, head_dim=8, num_layers=1, num_heads=2, adaln_rank=4)
    after = replace(before, actions=OTHER, text_dim=8)
    new = Diffusion(after)
    parts = new_parts(before, after)
    report = load_adapted(new, Diffusion(before).state_dict(), parts)
    begin_at_zero(new, parts)
    assert {name.split(".")[0] for name in report.left} == {"embed_action"}
    assert any("context_attention" in name for name in report.new)
    told = new.embed_action(torch.rand(3, 2))
    assert told.shape == (3, 24) and not told.any()
