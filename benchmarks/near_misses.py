"""Does a world model tell a grasp from a near miss? On recordings, and where a policy acts on what it imagines.

    python benchmarks/near_misses.py --data runs/near [--quick] [--world-models NAME_OR_FOLDER ...]
        [--policies NAME_OR_FOLDER ...] [--tasks put_carrot_on_plate ...] [--batches 60]

The data are episodes that no model has seen, of policies that often just miss. Of every moment at which the hand is
empty, autoregressive dynamics say how likely it holds something in the next frame; with `own` frames the last four are
as the model itself makes them.

    moments, grasps    how many moments, and after how many of them something is held
    expected           grasps that the model expects for each that there is
    auroc              probability that a grasp is found likelier than a miss
    sure_right         share of the moments called likely (above one half) after which, within three frames, it is held
    overlooked         share of the grasps that are called unlikely (below 0.05)

Then every policy acts on every task's initial states in one world, and what it did there is repeated in the other:
success of `imagined`, its actions `imagined_in_twin`, and of `twin`, `twin_in_imagined`. A policy that finds the
model's errors succeeds in imagination alone, and not by the same actions in the twin. The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from envs.mujoco_bridge import MujocoBridgeVectorEnv
from envs.world_model_bridge import WorldModelBridgeVectorEnv
from policies import load_policy
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.batches import DynamicsBatches
from wfm_core.checkpoint import find_checkpoint, load_patch_tokenizer, load_world_model
from wfm_core.data.clip_cache import ClipCache
from wfm_core.encoding import encode_cache
from wfm_core.models.autoregressive import Autoregressive
from wfm_core.models.motion import Contact, Motion
from worldsim.caches import open_caches
from worldsim.dynamics_data import contacts
from worldsim.evaluate import VectorEnv
from worldsim.protocols import Policy
from worldsim.simulator import load_world_sim
from worldsim.uncertainty import separation

HELD = torch.tensor([Contact.HELD, Contact.HELD_BLOCKED])
SOON = 3  # frames within which a grasp that is foreseen may come
OWN_FRAMES = 4
SETTLED = 3  # frames of a clip before which the model has seen too little


@torch.no_grad()
def foreseen(model: Autoregressive, batches: DynamicsBatches, count: int, own_frames: int) -> dict[str, np.ndarray]:
    """Of all moments of `count` batches with an empty hand: `chance` of a grasp, `grasped` next, and `soon`."""
    columns: dict[str, list[torch.Tensor]] = {"chance": [], "grasped": [], "soon": []}
    for number in range(count):
        batch = batches(number)
        motion, tokens = Motion(*(batch[name] for name in Motion._fields)), batch["tokens"].long()
        seen = tokens
        for _ in range(own_frames):
            predicted = model._predict_all(seen, motion, batch["next_contact"])
            seen = torch.cat([tokens[:, :2], predicted[:, 1:-1]], dim=1)
        logits = model.contact_logits(model.trunk(model.one_hot(seen), motion))
        chance = logits.softmax(dim=-1)[..., HELD].sum(dim=-1)
        held, held_next = torch.isin(motion.contact, HELD), torch.isin(batch["next_contact"], HELD)
        soon = torch.stack([held_next[:, k : held_next.shape[1] - SOON + k + 1] for k in range(SOON)]).any(dim=0)
        moments = slice(SETTLED, soon.shape[1])
        empty = ~held[:, moments]
        found = {"chance": chance[:, moments], "grasped": held_next[:, moments], "soon": soon[:, moments]}
        for name, column in found.items():
            columns[name].append(column[empty])
    return {name: torch.cat(parts).float().numpy() for name, parts in columns.items()}


def figures_of(chance: np.ndarray, grasped: np.ndarray, soon: np.ndarray) -> dict[str, float | None]:
    """The figures that the module describes, None where there is nothing to tell."""
    grasps, sure, happened = int(grasped.sum()), chance > 0.5, grasped > 0
    both = bool(0 < grasps < len(grasped))
    return {
        "moments": len(chance),
        "grasps": grasps,
        "expected": float(chance.sum() / grasps) if grasps else None,
        "auroc": separation(chance[~happened], chance[happened]) if both else None,
        "sure_right": float(soon[sure].mean()) if sure.any() else None,
        "overlooked": float((chance[happened] < 0.05).mean()) if grasps else None,
    }


def act(env: VectorEnv, instruction: str, does: Policy | Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Let a policy act from each row's own initial state, or repeat actions (B, 7); returns success, what was done."""
    rows = env.num_envs
    obs, _ = env.reset(seed=list(range(rows)), options={"initial_state": np.arange(rows)})
    over, success, done = np.zeros(rows, bool), np.zeros(rows, bool), []
    if not isinstance(does, Sequence):
        does.reset(rows, instruction=instruction, seeds=list(range(rows)))
    while not over.all():
        if not isinstance(does, Sequence):
            actions = does.act(obs)
        else:  # whoever repeats may have to wait for its end
            actions = does[len(done)] if len(done) < len(does) else np.zeros_like(does[0])
        done.append(np.array(actions, np.float32))
        obs, _, terminated, truncated, info = env.step(done[-1])
        ended = terminated | truncated
        success |= ended & ~over & np.asarray(info["is_success"], bool)
        over |= ended
        if ended.any() and not over.all():
            obs, _ = env.reset(options={"reset_mask": ended})
    return success, done


def exchanged(policy: Policy, worlds: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Success in each of two worlds, and of what was done there in the other."""
    found = {}
    (one, other), envs = worlds, {name: make() for name, make in worlds.items()}
    for here, there in ((one, other), (other, one)):
        success, done = act(envs[here], envs[here].task_description, policy)
        repeated, _ = act(envs[there], envs[there].task_description, done)
        found |= {here: float(success.mean()), f"{here}_in_{there}": float(repeated.mean())}
    for env in envs.values():
        env.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="recorded data sets")
    parser.add_argument("--quick", action="store_true", help="two batches, two rows")
    parser.add_argument("--world-models", nargs="+", default=[DEFAULT_WORLD_MODEL])
    parser.add_argument("--policies", nargs="*", default=[])
    parser.add_argument("--tasks", nargs="+", default=["put_carrot_on_plate"])
    parser.add_argument("--batches", type=int, default=60, help="of 16 clips")
    arguments = parser.parse_args()
    count, rows = (2, 2) if arguments.quick else (arguments.batches, 24)
    torch.set_num_threads(1)
    caches = open_caches(arguments.data)
    table: dict[str, Any] = {}
    for name in arguments.world_models:
        table[name] = {
            "real": figures_of(**of_frames(name, caches, count, 0)),
            "own": figures_of(**of_frames(name, caches, count, OWN_FRAMES)),
        }
        print(name, table[name], flush=True)
        sim = load_world_sim(name)
        for policy in arguments.policies:
            for task in arguments.tasks:
                worlds = {
                    "imagined": partial(
                        WorldModelBridgeVectorEnv, rows, sim, task, autoreset_mode="Disabled", uncertainty_limit=np.inf
                    ),
                    "twin": partial(MujocoBridgeVectorEnv, rows, task, autoreset_mode="Disabled"),
                }
                table[name][f"{policy}, {task}"] = found = exchanged(load_policy(policy), worlds)
                print(name, policy, task, found, flush=True)
    print(json.dumps({"table": table, "quick": arguments.quick}))


def of_frames(name: str, caches: Sequence[ClipCache], count: int, own_frames: int) -> dict[str, np.ndarray]:
    """`foreseen` of a checkpoint's dynamics on clips of 13 frames.

    Raises:
        ValueError: its dynamics are not autoregressive.
    """
    folder = find_checkpoint(name)
    dynamics = getattr(load_world_model(folder, dtype=torch.float32), "dynamics", None)
    if not isinstance(dynamics, Autoregressive):
        raise ValueError(f"world models must be autoregressive, got another kind in {folder}")
    tokens = [encode_cache(load_patch_tokenizer(folder), cache) for cache in caches]
    batches = DynamicsBatches(
        caches, tokens, clip_length=13, batch_size=16, seed=0, contact=[contacts(cache) for cache in caches],
        watched=[np.zeros(each.shape[:2], bool) for each in tokens], imagined=[None] * len(caches),
    )  # fmt: skip
    return foreseen(dynamics, batches, count, own_frames)


if __name__ == "__main__":
    main()
