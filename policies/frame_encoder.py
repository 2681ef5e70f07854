"""Frozen frame encoders: frames as the vector that a policy without its own vision reads as "environment state"."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from policies.actor import ActorConfig, instruction_id
from policies.bc import BCNetwork, load_network
from policies.latents import LatentView


class FrameEncoder(Protocol):
    """Maps frames to vectors, rows independent."""

    dim: int

    def encode(self, pixels: np.ndarray, instruction: str) -> np.ndarray:
        """Encode (B, H, W, 3) uint8 frames to (B, dim) float32."""
        ...


class KeypointEncoder:
    """The keypoints of a behaviour-cloning network and a one-hot instruction."""

    def __init__(self, network: BCNetwork) -> None:
        self.network = network.eval()
        self.dim = 3 * network.config.num_keypoints + len(network.config.instructions)

    @torch.no_grad()
    def encode(self, pixels: np.ndarray, instruction: str) -> np.ndarray:
        """Encode (B, H, W, 3) uint8 frames to (B, dim) float32.

        Raises:
            ValueError: the network does not know the instruction.
        """
        which = instruction_id(self.network.config, instruction)
        embedding = self.network.instruction(torch.full((len(pixels),), which))
        keypoints = self.network.see(torch.from_numpy(np.ascontiguousarray(pixels)), embedding)
        return _with_instruction(keypoints.numpy(), which, len(self.network.config.instructions))


class LatentEncoder:
    """The flattened latents of a world model's tokenizer and a one-hot instruction.

    Args:
        tokenizer: name or path of a world model's checkpoint.
        instructions: the instructions of the one-hot part, in order.
    """

    def __init__(self, tokenizer: str, instructions: list[str]) -> None:
        self.view = LatentView(tokenizer)
        self.known = ActorConfig(instructions)
        self.dim = int(np.prod(self.view.tokenizer.latent_shape)) + len(instructions)

    def encode(self, pixels: np.ndarray, instruction: str) -> np.ndarray:
        """Encode (B, H, W, 3) uint8 frames to (B, dim) float32.

        Raises:
            ValueError: the instruction is not one of the encoder's, or frames have another size than the tokenizer's.
        """
        latents = self.view.of({"pixels": pixels})
        which = instruction_id(self.known, instruction)
        return _with_instruction(latents.flatten(1).float().numpy(), which, len(self.known.instructions))


def load_frame_encoder(spec: Mapping[str, Any], folder: Path) -> FrameEncoder:
    """Build the encoder that a policy's `worldsim.json` describes.

    Args:
        spec: {"kind": "keypoints", "path": <folder of a BC policy, relative to `folder`>} or
            {"kind": "latents", "world_model": <name or path>, "instructions": [...]}.
        folder: the policy's folder.

    Raises:
        ValueError: another kind, a missing entry, or what it names cannot be loaded.
    """
    try:
        if spec["kind"] == "keypoints":
            return KeypointEncoder(load_network(folder / spec["path"]))
        if spec["kind"] == "latents":
            return LatentEncoder(spec["world_model"], list(spec["instructions"]))
    except KeyError as error:
        raise ValueError(f"{folder}/worldsim.json: environment_state lacks {error}, got {dict(spec)}") from error
    raise ValueError(f"{folder}/worldsim.json: kind must be 'keypoints' or 'latents', got {spec['kind']!r}")


def _with_instruction(features: np.ndarray, which: int, count: int) -> np.ndarray:
    one_hot = np.zeros((len(features), count), np.float32)
    one_hot[:, which] = 1
    return np.concatenate([features, one_hot], axis=1)
