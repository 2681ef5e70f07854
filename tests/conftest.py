"""Process-wide settings that must hold before torch or mujoco is first imported."""

import os
from pathlib import Path

import pytest

# Two torch processes with two threads each on two cores are ten times slower than with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MUJOCO_GL", "egl")


@pytest.fixture
def threads():
    """Leave torch's number of threads as it was, whatever a command sets."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint folder of the autoregressive family, far too small to be good, with random weights."""
    from wfm_core.models.autoregressive import AutoregressiveConfig
    from wfm_core.models.revealing import AutoregressiveModel

    config = AutoregressiveConfig(
        levels=LEVELS, grid=2, width=16, num_heads=2, num_layers=3, time_layers=(1,), refiner_layers=1, window=4,
        temperature=1.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    return _checkpoint(folder, "autoregressive", config, AutoregressiveModel(config))


@pytest.fixture(scope="session")
def tiny_transformer(tmp_path_factory) -> Path:
    """A checkpoint folder of the transformer family that reads, likewise."""
    from wfm_core.models.decoding import TransformerModel
    from wfm_core.models.positions import RopeConfig
    from wfm_core.models.transformer_config import TransformerConfig

    config = TransformerConfig(
        levels=LEVELS, groups=1, grid=(2, 2), width=24, head_dim=8, num_layers=2, num_heads=4, num_kv_heads=2,
        ffn_dim=20, window=3, temperature=1.0, num_draft_heads=2, text_dim=256, text_encoder="bytes",
        rope=RopeConfig(trained_frames=4),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny_transformer"
    return _checkpoint(folder, "transformer", config, TransformerModel(config))


@pytest.fixture(scope="session")
def tiny_diffusion(tmp_path_factory) -> Path:
    """A checkpoint folder of the diffusion family that reads, likewise."""
    from wfm_core.models.denoising import DiffusionModel
    from wfm_core.models.diffusion_config import DiffusionConfig
    from wfm_core.models.positions import RopeConfig

    config = DiffusionConfig(
        latent_dim=3, grid=(2, 2), latent_mean=(0.1, 0.0, -0.1), latent_std=(0.5, 0.4, 0.3), width=24, head_dim=8,
        num_layers=2, num_heads=2, ffn_ratio=2, adaln_rank=4, window=3, chunk=2, num_steps=2, text_dim=256,
        text_encoder="bytes", rope=RopeConfig(trained_frames=4),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny_diffusion"
    return _checkpoint(folder, "diffusion", config, DiffusionModel(config), levels=())


LEVELS = (5, 4, 3)


def _checkpoint(folder: Path, kind: str, dynamics_config, dynamics, levels: tuple[int, ...] = LEVELS) -> Path:
    """Write a checkpoint with this dynamics, a tokenizer and heads; all weights are random."""
    import torch

    from tasks import TASKS
    from wfm_core.checkpoint import as_json, save_weights, write_config
    from wfm_core.tokenizers.patch import PatchTokenizer, PatchTokenizerConfig
    from worldsim.heads import Heads, HeadsConfig

    tokenizer_config = PatchTokenizerConfig(
        image_size=32, levels=levels, latent_dim=3, encoder_dim=16, encoder_blocks=1, decoder_dims=(8, 8, 8),
        decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    heads_config = HeadsConfig(
        tuple(task.instruction for task in TASKS.values()), (2, 2, 3), width=16, num_heads=2, num_layers=1
    )
    parts = {
        "tokenizer": (tokenizer_config, PatchTokenizer(tokenizer_config)),
        "dynamics": (dynamics_config, dynamics),
        "heads": (heads_config, Heads(heads_config)),
    }
    generator = torch.Generator().manual_seed(3)  # with others some episodes end at once
    for part, (_, module) in parts.items():
        for weight in module.parameters():
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
        save_weights(folder, part, module.state_dict())
    calibration = {"success_threshold": 0.6, "failure_threshold": 0.7, "uncertainty_limit": 0.9}
    configs = {part: as_json(config) for part, (config, _) in parts.items()}
    write_config(folder, {"kind": kind, "calibration": calibration} | configs)
    return folder
