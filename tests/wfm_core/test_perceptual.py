import pytest
import torch

from wfm_core.metrics import frechet_distance
from wfm_core.tokenizers.perceptual import (
    GaborFeatures,
    gram,
    gram_loss,
    load_feature_network,
    perceptual_loss,
    pooled_features,
)


def stripes(angle: float, wavelength: float, shift: float = 0.0) -> torch.Tensor:
    """Grey stripes (1, 3, 64, 64) that vary along `angle`."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    angle, turn = torch.tensor(angle), 2 * torch.pi / wavelength
    return (turn * (x * angle.cos() + y * angle.sin() - shift)).sin().expand(1, 3, -1, -1)


def energy(image: torch.Tensor) -> torch.Tensor:
    """Mean response (scale, orientation) to luminance, away from the edges."""
    return torch.stack([maps[0, :4, 4:-4, 4:-4].mean(dim=(1, 2)) for maps in GaborFeatures()(image)])


def test_features_tell_orientation_and_scale():
    for k in range(4):
        for scale in range(3):
            response = energy(stripes(torch.pi * k / 4, 4.0 * 2**scale))
            assert response.argmax() == 4 * scale + k
    assert energy(torch.full((1, 3, 64, 64), 0.7)).max() < 2e-3


def test_features_hardly_notice_a_shift_that_pixels_do():
    here, there = stripes(0.0, 4.0), stripes(0.0, 4.0, shift=1.0)
    network = load_feature_network()
    moved = perceptual_loss(network(here)[:1], network(there)[:1])
    turned = perceptual_loss(network(here)[:1], network(stripes(torch.pi / 2, 4.0))[:1])
    assert (here - there).abs().mean() > 0.8 and turned > 2 * moved
    shapes = [maps.shape for maps in network(here)]
    assert shapes == [(1, 12, 64, 64), (1, 12, 32, 32), (1, 12, 16, 16)]


def test_blur_costs_more_in_features_than_brightness_of_the_same_error():
    generator = torch.Generator().manual_seed(0)
    sharp = torch.nn.functional.interpolate(torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1, scale_factor=2)
    blurred = torch.nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2)
    brighter = sharp + (blurred - sharp).square().mean().sqrt()
    network = load_feature_network()
    for loss in (perceptual_loss, gram_loss):
        assert loss(network(blurred), network(sharp)) > loss(network(brighter), network(sharp))
        assert loss(network(sharp), network(sharp)) == 0


def test_pooled_features_describe_what_is_seen_not_where():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 32, 32, generator=generator) * 2 - 1
    network = load_feature_network()
    seen = pooled_features(network, images)
    assert seen.shape == (40, 36)
    torch.testing.assert_close(seen[3, 12:24], network(images[3:4])[1][0].flatten(1).mean(dim=1))
    turned, blurred = images.flip(-1, -2), torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    near, far = (frechet_distance(seen.numpy(), pooled_features(network, x).numpy()) for x in (turned, blurred))
    assert abs(near) < 1e-3 * far


def test_gram_matrices_forget_where_but_not_with_what():
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("nchw,ndhw->ncd", features, features) / 20
    torch.testing.assert_close(gram(features), expected)
    torch.testing.assert_close(gram(features.flip(-1)), expected)
    assert (gram(features[:, [1, 0, 2]]) - expected).abs().max() > 0.1


def test_a_users_network_is_taken_by_path(tmp_path):
    path, given = tmp_path / "features.pt2", torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU())
    any_number = ({0: torch.export.Dim("N")},)
    torch.export.save(torch.export.export(given, (torch.randn(2, 3, 8, 8),), dynamic_shapes=any_number), path)
    images = torch.randn(5, 3, 8, 8, requires_grad=True)
    network = load_feature_network(str(path))
    torch.testing.assert_close(network(images), given(images))
    network(images).sum().backward()
    assert images.grad.abs().max() > 0
    assert not any(weight.requires_grad for weight in network.parameters())
    with pytest.raises(ValueError, match=r"one of \['gabor'\] or a file of torch.export, got 'vgg'"):
        load_feature_network("vgg")
    path.write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"features\.pt2 must be a file of torch.export"):
        load_feature_network(str(path))


def test_gradients_are_finite_where_nothing_is_to_be_seen():
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    sum(maps.sum() for maps in load_feature_network()(image)).backward()
    assert image.grad.isfinite().all()
