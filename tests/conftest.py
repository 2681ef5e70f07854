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
    import torch

    from tasks import TASKS
    from wfm_core.checkpoint import as_json, save_weights, write_config
    from wfm_core.models.autoregressive import AutoregressiveConfig, AutoregressiveModel
    from wfm_core.tokenizers.discrete import DiscreteTokenizer, DiscreteTokenizerConfig
    from worldsim.heads import Heads, HeadsConfig

    levels = (5, 4, 3)
    configs = {
        "tokenizer": DiscreteTokenizerConfig(
            image_size=32, levels=levels, encoder_dim=16, encoder_blocks=1, decoder_dims=(8, 8, 8),
            decoder_blocks=(1, 1, 1),
        ),
        "dynamics": AutoregressiveConfig(
            levels=levels, grid=2, width=16, num_heads=2, num_layers=3, time_layers=(1,), refiner_layers=1, window=4,
            temperature=1.0,
        ),
        "heads": HeadsConfig(
            tuple(task.instruction for task in TASKS.values()), (2, 2, 3), width=16, num_heads=2, num_layers=1
        ),
    }  # fmt: skip
    builders = {"tokenizer": DiscreteTokenizer, "dynamics": AutoregressiveModel, "heads": Heads}
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    generator = torch.Generator().manual_seed(3)  # with others some episodes end at once
    for part, config in configs.items():
        module = builders[part](config)
        for weight in module.parameters():
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
        save_weights(folder, part, module.state_dict())
    calibration = {"success_threshold": 0.6, "failure_threshold": 0.7, "uncertainty_limit": 0.9}
    write_config(
        folder,
        {"kind": "autoregressive", "calibration": calibration} | {part: as_json(c) for part, c in configs.items()},
    )
    return folder
