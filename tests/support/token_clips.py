"""Clips and checks for the networks that predict tokens."""

import torch

from wfm_core.models.token_world_model import TokenDynamics
from wfm_core.models.transformer import Transformer
from wfm_core.models.transformer_config import TransformerConfig
from wfm_core.world_model import repeat_rows

SIZES = {
    "levels": (3, 2), "groups": 2, "grid": (2, 2), "width": 24, "head_dim": 8, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "ffn_dim": 20, "window": 3,
}  # fmt: skip


def make_decoder[Decoder: Transformer](kind: type[Decoder], **changes) -> Decoder:
    """A model with large random weights, so that every input matters, in float64, so that equal means equal."""
    torch.manual_seed(0)
    model = kind(TransformerConfig(**SIZES | changes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model.double().requires_grad_(False)


def clip(model: Transformer, batch: int, time: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, T, n, groups * C) and physical actions (B, T, 7) that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(model.config.cell_levels)
    num_cells = model.config.frame_tokens // model.config.groups
    tokens = (torch.rand(batch, time, num_cells, len(levels), generator=generator) * levels).to(torch.uint8)
    return tokens, 0.05 * torch.rand(batch, time, 7, generator=generator)


def check_rows_and_branches(model: TokenDynamics, tokens: torch.Tensor, actions: torch.Tensor) -> None:
    """A batch of three clips of four frames equals its rows, and a branch its trunk."""
    together = model.start(tokens[:, :2], actions[:, :1], [4, 5, 6])
    alone = model.start(tokens[1:2, :2], actions[1:2, :1], [5])
    branched = repeat_rows(together, 2)
    for t in range(1, 4):
        together, doubt = model.step(together, actions[:, t])
        alone, doubt_alone = model.step(alone, actions[1:2, t])
        branched, _ = model.step(branched, actions[:, t].repeat_interleave(2, dim=0))
        assert torch.equal(alone["tokens"], together["tokens"][1:2])
        torch.testing.assert_close(doubt_alone, doubt[1:2])
        assert torch.equal(branched["tokens"], together["tokens"].repeat_interleave(2, dim=0))
