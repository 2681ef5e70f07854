"""What a training by trial and error keeps, so that it goes on to the bit where it was killed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from wfm_core.data.files import write_atomic
from wfm_core.train import require_same_settings


def seed_of(seed: int, number: int) -> int:
    """Return the seed of a run's part by its number, below 2^32."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


class RunState:
    """One file with weights, the optimiser's moments, and what there is to tell."""

    def __init__(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, object]
    ) -> None:
        """Take what is kept, and the settings, as JSON values, that decide about it."""
        self.path, self.model, self.optimizer = path, model, optimizer
        self.settings = json.loads(json.dumps(settings))

    def resume(self) -> dict[str, Any]:
        """Load the file, in place; returns what was told with it, {} if there is none.

        Raises:
            ValueError: it is damaged, or of a run with other settings.
        """
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata()
            tensors = load_file(self.path)
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error}); delete it to begin anew") from error
        require_same_settings(self.path, json.loads(header["settings"]), self.settings)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".")
                moments.setdefault(int(index), {})[slot] = value
        prefix = "model."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        self.model.load_state_dict(weights)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return json.loads(header["told"])

    def keep(self, told: Mapping[str, Any]) -> None:
        """Write the file whole."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        header = {"settings": json.dumps(self.settings), "told": json.dumps(told)}
        write_atomic(self.path, save({name: value.contiguous() for name, value in tensors.items()}, header))
