"""One of the processes that train a tiny transformer together; started by tests with accelerate's variables set."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from wfm_core.distributed import joined_processes
from wfm_core.models.transformer import Transformer
from wfm_core.models.transformer_config import TransformerConfig
from wfm_core.train import TrainConfig, fit

CONFIG = TransformerConfig(
    levels=(3, 2), groups=2, grid=(2, 2), width=60, head_dim=8, num_layers=2, num_heads=8, num_kv_heads=4, ffn_dim=33,
    window=3, text_dim=5,
)  # fmt: skip
LOOP = TrainConfig(
    num_steps=8, accumulate=4, warmup_steps=2, learning_rate=3e-3, bf16=False, checkpoint_every=4, log_every=1
)


def batch_fn(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    levels = torch.tensor(CONFIG.cell_levels)
    tokens = (torch.rand(3, 4, 4, 4, generator=generator) * levels).to(torch.uint8)
    action = 0.05 * torch.rand(3, 4, 7, generator=generator)
    text = torch.randn(3, 2, 5, generator=generator)
    return {"tokens": tokens, "action": action, "seed": torch.tensor(number), "text": text}


def train(run_dir: Path, width: int, *, accumulate: int = 4, stop_at: int = 0) -> dict[str, torch.Tensor]:
    """Train, or be killed before step `stop_at`; the averaged weights. Muon trains matrices wider than 63."""
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, width=width))
    loop = replace(LOOP, accumulate=accumulate)

    def batches(number: int) -> dict[str, torch.Tensor]:
        if stop_at and number >= stop_at * accumulate:
            raise KeyboardInterrupt
        return batch_fn(number)

    with joined_processes("cpu") as processes:
        return fit(model, batches, loop, run_dir, processes=processes)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), stop_at=int(sys.argv[3]))
