"""LeRobot policies as ours: any folder written by LeRobot, with its own pre- and post-processors.

A file `worldsim.json` in the folder, absent by default, adds what LeRobot's files cannot say:
`environment_state`, the frame encoder that feeds the feature "observation.environment_state" (see
`policies.frame_encoder`), and `action_units`, "physical" (the default: a policy trained on recorded data sets) or
"normalised" (one trained in our envs).
"""

import contextlib
import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from policies.chunking import ChunkedPolicy
from policies.frame_encoder import FrameEncoder, load_frame_encoder
from wfm_core.data.actions import to_normalised
from worldsim.protocols import Obs, Policy

INSTALL = "pip install 'worldsim[lerobot]'"

STATE, ENVIRONMENT_STATE, IMAGES = "observation.state", "observation.environment_state", "observation.image"

STATELESS_TYPES = ("act",)
"""Policy types whose chunk is a deterministic function of the current observation: these run batched."""


class LeRobotModel:
    """A LeRobot policy between its processors, from our observations to our actions.

    Args:
        policy: a PreTrainedPolicy.
        preprocess, postprocess: its processor pipelines.
        encoder: computes "observation.environment_state"; needed if the policy has that input.
        physical: the policy's actions are in physical units, else normalised.

    Raises:
        ValueError: the policy wants an input that nothing here provides.
    """

    def __init__(
        self, policy: Any, preprocess: Any, postprocess: Any, *, encoder: FrameEncoder | None, physical: bool
    ) -> None:
        for key in policy.config.input_features:
            if key == ENVIRONMENT_STATE and encoder is None:
                raise ValueError(f"a policy with the input {key!r} needs environment_state in its worldsim.json")
            if key not in (STATE, ENVIRONMENT_STATE) and not key.startswith(IMAGES):
                raise ValueError(f"a policy may want {STATE}, {ENVIRONMENT_STATE} and images, got the input {key!r}")
        self.policy, self.preprocess, self.postprocess = policy, preprocess, postprocess
        self.encoder, self.physical = encoder, physical

    def inputs(self, obs: Obs, instruction: str) -> dict[str, Any]:
        """Return the preprocessed LeRobot batch for observations of B rows.

        Raises:
            ValueError: frames of another size than the policy was trained on.
        """
        batch: dict[str, Any] = {"task": [instruction] * len(obs["agent_pos"])}
        for key, feature in self.policy.config.input_features.items():
            if key == STATE:
                batch[key] = torch.from_numpy(np.array(obs["agent_pos"], np.float32))
            elif key == ENVIRONMENT_STATE:
                assert self.encoder is not None
                batch[key] = torch.from_numpy(self.encoder.encode(obs["pixels"], instruction))
            else:
                frames = torch.from_numpy(np.array(obs["pixels"])).permute(0, 3, 1, 2).float() / 255
                if tuple(frames.shape[1:]) != tuple(feature.shape):
                    raise ValueError(f"{key} must have shape {tuple(feature.shape)}, got {tuple(frames.shape[1:])}")
                batch[key] = frames
        return self.preprocess(batch)

    def outputs(self, actions: Tensor) -> np.ndarray:
        """Postprocess (..., 7) predicted actions to float32 in [-1, 1]."""
        values = self.postprocess(actions).float().numpy()
        return np.clip(to_normalised(values) if self.physical else values, -1, 1)


class LeRobotChunks:
    """A stateless LeRobot policy as a `ChunkPredictor`."""

    def __init__(self, model: LeRobotModel) -> None:
        self.model = model
        self.chunk_len: int = model.policy.config.chunk_size

    @torch.no_grad()
    def predict(self, obs: Obs, instruction: str) -> np.ndarray:
        """Return (B, chunk_len, 7) float32 in [-1, 1]."""
        return self.model.outputs(self.model.policy.predict_action_chunk(self.model.inputs(obs, instruction)))


class LeRobotRows:
    """A LeRobot policy with queues, run row by row.

    LeRobot's queues belong to a whole batch, which starts and ends together; ours restart rows one at a time. So every
    row has its own view of the policy: shared weights, its own queues. Sampling policies draw from the row's seed.
    """

    def __init__(self, model: LeRobotModel) -> None:
        self.model = model
        self._instruction = ""
        self._rows: list[Any] = []
        self._seeds = np.zeros(0, np.int64)
        self._steps = np.zeros(0, np.int64)

    def reset(self, num_envs: int, *, instruction: str, seeds: Sequence[int], mask: np.ndarray | None = None) -> None:
        """Begin episodes; see `worldsim.protocols.Policy.reset`.

        Raises:
            ValueError: `seeds` or `mask` do not have `num_envs` entries.
        """
        if mask is None:
            mask = np.ones(num_envs, bool)
            self._rows = [copy.copy(self.model.policy) for _ in range(num_envs)]
            self._seeds, self._steps = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)
        if not len(seeds) == len(mask) == len(self._rows) == num_envs:
            raise ValueError(f"seeds and mask must have {num_envs} entries, got {len(seeds)} and {len(mask)}")
        self._instruction = instruction
        for row in np.flatnonzero(mask):
            self._rows[row].reset()
            self._seeds[row], self._steps[row] = seeds[row], 0

    @torch.no_grad()
    def act(self, obs: Obs) -> np.ndarray:
        """Return (B, 7) float32 actions in [-1, 1]."""
        actions = []
        for row, policy in enumerate(self._rows):
            batch = self.model.inputs({key: value[row : row + 1] for key, value in obs.items()}, self._instruction)
            seed = np.random.SeedSequence([self._seeds[row], self._steps[row]]).generate_state(1)[0]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(seed))
                actions.append(policy.select_action(batch))
        self._steps += 1
        return self.model.outputs(torch.cat(actions))


def load_lerobot(folder: Path) -> Policy:
    """Load a folder written by a LeRobot policy's and its processors' `save_pretrained`.

    Raises:
        ValueError: a file is missing or damaged, or the policy wants inputs that we do not have.
        ImportError: lerobot is not installed.
    """
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies import make_pre_post_processors
        from lerobot.policies.factory import get_policy_class
        from lerobot.processor.pipeline import ProcessorMigrationError
    except ImportError as error:
        raise ImportError(f"{folder} needs lerobot: {INSTALL}") from error
    extra = _read_extra(folder / "worldsim.json")
    try:
        config: Any = PreTrainedConfig.from_pretrained(folder, cli_overrides=["--device=cpu"])
        with contextlib.redirect_stdout(io.StringIO()):  # lerobot prints; libraries should not
            policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
        preprocess, postprocess = make_pre_post_processors(
            config, pretrained_path=str(folder), preprocessor_overrides={"device_processor": {"device": "cpu"}}
        )
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, ProcessorMigrationError) as error:
        raise ValueError(f"{folder} must be a policy written by LeRobot, with its processors: {error}") from error
    encoder = load_frame_encoder(extra["environment_state"], folder) if "environment_state" in extra else None
    physical = extra.get("action_units", "physical") == "physical"
    model = LeRobotModel(policy, preprocess, postprocess, encoder=encoder, physical=physical)
    if config.type in STATELESS_TYPES:
        return ChunkedPolicy(LeRobotChunks(model), config.n_action_steps, config.temporal_ensemble_coeff)
    return LeRobotRows(model)


def _read_extra(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        extra = json.loads(path.read_text())
        unknown = set(extra) - {"environment_state", "action_units"}
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} must hold a JSON object: {error}") from error
    if unknown or extra.get("action_units", "physical") not in ("physical", "normalised"):
        raise ValueError(f"{path} may have environment_state and action_units (physical or normalised), got {extra}")
    return extra
