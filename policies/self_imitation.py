"""Self-imitation: a policy clones what it did in episodes that succeeded, with the labels that hindsight gives.

It learns from few successes what a policy gradient would need many rollouts for: all of them are kept, each says at
every step what was right, and what does not help does not move it. What it can not learn is what never happens.

Sources: Oh et al. 2018 (self-imitation learning); Peters and Schaal 2007 (reward-weighted regression).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from policies.actor import ActorNetwork
from policies.demonstrations import chunks_of, waypoints
from policies.imagining import Decisions, Episodes, Explorer
from policies.policy_gradient import loss_of_demonstrations, step_if_finite
from policies.reinforce_config import ReinforceConfig
from policies.train import cloning_loss
from wfm_core.data.files import write_atomic
from wfm_core.train import Batch


def in_hindsight(decisions: Decisions, episodes: Episodes, chunk_len: int) -> Batch:
    """Return the decisions of episodes that ended in success as a batch of `CloningObjective`, in their order."""
    good = np.flatnonzero(episodes.success & episodes.ended)
    shown = np.flatnonzero(np.isin(decisions.episode.numpy(), good))
    actions = np.empty((len(shown), chunk_len, 7), np.float32)
    waypoint = np.empty((len(shown), 4), np.float32)
    of, at = decisions.episode.numpy()[shown], decisions.step.numpy()[shown]
    for episode in good:
        done, pose = episodes.actions[episode], episodes.agent_pos[episode]
        mine = of == episode
        actions[mine] = chunks_of(done, at[mine], chunk_len)
        waypoint[mine] = waypoints(np.concatenate([done, done[-1:]]), pose)[at[mine]]
    rows = torch.from_numpy(shown)
    told = {name: getattr(decisions, name)[rows] for name in ("picture", "agent_pos", "instruction_id")}
    return told | {"actions": torch.from_numpy(actions), "waypoint": torch.from_numpy(waypoint)}


class Successes:
    """All that succeeded in a training so far: a batch of `CloningObjective`, and a file, for each update."""

    def __init__(self, folder: Path, network: ActorNetwork, trained: str, done: int) -> None:
        """Take back what is there of the first `done` updates.

        Args:
            folder: of the files.
            network: who looks at it.
            trained: what of the network is: a trunk that is not looks at everything once.
            done: updates.
        """
        self.folder, self.network, self.trained = folder, network, trained
        self.parts: list[Batch] = []
        self.looked: list[Tensor] = []
        for number in range(done):
            if (path := self._path(number)).exists():
                self._take(load_file(path))

    def __len__(self) -> int:
        return sum(len(part["actions"]) for part in self.parts)

    def add(self, number: int, batch: Batch) -> None:
        """Take in those of an update, by its number."""
        if len(batch["actions"]):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path(number), save({name: value.contiguous() for name, value in batch.items()}))
            self._take(batch)

    def _take(self, batch: Batch) -> None:
        self.parts.append(batch)
        with torch.no_grad():
            self.looked.append(batch["picture"] if self.trained == "all" else self.network.look(batch["picture"]))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Batch]:
        """Draw what `know` takes, and the rest of the batch; needs at least one decision."""
        ends = np.cumsum([len(part["actions"]) for part in self.parts])
        rows = torch.randint(len(self), (size,), generator=generator).sort().values
        own = torch.from_numpy(np.searchsorted(ends, rows.numpy(), side="right"))
        looked, batches = [], []
        for k in own.unique().tolist():
            mine = rows[own == k] - int(ends[k] - len(self.looked[k]))
            looked.append(self.looked[k][mine])
            batches.append({name: value[mine] for name, value in self.parts[k].items() if name != "picture"})
        return torch.cat(looked), {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def imitate(
    explorer: Explorer,
    optimizer: torch.optim.Optimizer,
    successes: Successes,
    shown: Iterator[Batch] | None,
    config: ReinforceConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """Clone successes for `config.imitation_steps`, as cloning does; returns the means of what there is to tell.

    Args:
        explorer: whose network learns, in place.
        optimizer: of what is trained.
        successes: all so far; where there is none nothing changes.
        shown: demonstrations, a batch of them beside each of successes.
        config: settings.
        generator: of the draws.

    Raises:
        FloatingPointError: the loss or its gradient is not finite.
    """
    network, rows = explorer.network, []
    if not len(successes):
        return {}
    network.train()
    for _ in range(config.imitation_steps):
        looked, batch = successes.draw(config.batch_size, generator)
        noise = torch.randn(batch["agent_pos"].shape, generator=generator) * config.agent_pos_noise * network.std
        looked = network.look(looked) if config.trained == "all" else looked
        known = network.know(looked, batch["agent_pos"] + noise, batch["instruction_id"])
        loss, metrics = cloning_loss(network, *network.decide(known), batch)
        if shown is not None:
            cloned = loss_of_demonstrations(network, next(shown), config.trained)
            loss, metrics = loss + config.cloning * cloned, metrics | {"cloning": cloned.detach()}
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        step_if_finite(explorer, optimizer, loss)
        rows.append(metrics | {"loss": loss.detach()})
    network.eval()
    return {name: float(torch.stack([row[name] for row in rows]).mean()) for name in rows[0]}
