import pytest
import torch

from wfm_core.tokenizers.objective import ReconstructionConfig, ReconstructionObjective
from wfm_core.tokenizers.video import VideoTokenizer, VideoTokenizerConfig
from wfm_core.train import TrainConfig, fit


def make(**weights) -> ReconstructionObjective:
    torch.manual_seed(0)
    sizes = {"space_factor": 8, "time_factor": 4, "dims": (16, 16), "num_blocks": 1, "num_heads": 2, "window": 2}
    return ReconstructionObjective(VideoTokenizer(VideoTokenizerConfig(**sizes)), ReconstructionConfig(**weights))


def batch(time: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Squares that slide over a grey ground."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.full((4, time, 32, 32, 3), 128, dtype=torch.uint8)
    for row in range(4):
        color = torch.randint(0, 256, (3,), generator=generator, dtype=torch.uint8)
        x, y = torch.randint(0, 16, (2,), generator=generator).tolist()
        for t in range(time):
            frames[row, t, y : y + 10, x + t : x + t + 10] = color
    return {"frames": frames}


def test_the_loss_is_the_weighted_sum_of_its_parts():
    weights = {"perceptual_weight": 0.2, "gram_weight": 0.3, "flow_weight": 0.4}
    objective = make(**weights)
    loss, parts = objective(batch(5))
    expected = parts["l1"] + sum(parts[name.removesuffix("_weight")] * weight for name, weight in weights.items())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(part > 0 for part in parts.values())
    loss, parts = make(perceptual_weight=0.0)(batch(5))
    assert parts.keys() == {"l1", "psnr"} and torch.equal(loss, parts["l1"])


def test_an_image_has_no_motion():
    assert "flow" not in make(flow_weight=1.0)(batch(1))[1]


def test_only_the_tokenizer_is_trained_and_saved():
    objective = make(flow_weight=1.0)
    assert all(name.startswith("tokenizer.") for name in objective.state_dict())
    objective(batch(5))[0].backward()
    assert all(weight.grad is not None for weight in objective.parameters())


def test_training_on_videos_and_images_learns_both(tmp_path):
    objective = make()
    before = [objective(batch(time, seed=99))[1]["psnr"].item() for time in (5, 1)]
    config = TrainConfig(num_steps=60, learning_rate=3e-3, warmup_steps=5, bf16=False)
    objective.load_state_dict(fit(objective, lambda step: batch((5, 1)[step % 2], step), config, tmp_path))
    after = [objective(batch(time, seed=99))[1]["psnr"].item() for time in (5, 1)]
    assert all(now > then + 3 for now, then in zip(after, before, strict=True))
