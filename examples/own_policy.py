"""Bring your own policy: push the cube with 40 lines of colour vision, in the twin and in imagination.

A policy is any object with `reset` and `act` (worldsim/protocols.py); it needs no base class and no checkpoint.

    python examples/own_policy.py --num-episodes 24
"""

import argparse
from collections.abc import Sequence

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from tasks import TASKS
from tasks.camera import CAMERAS
from wfm_core.data.actions import to_normalised
from worldsim.evaluate import Cell, evaluate
from worldsim.protocols import Obs
from worldsim.ranking import wilson_interval

TASK = "push_cube"
CUBE_HEIGHT, REACH, TRAVEL = 0.02, 0.05, 0.10  # m: cube centre, gap to the gripper behind it, height for moving over it


class ColourPusher:
    """Finds the red cube and the cyan disc in the first frame, goes behind the cube and pushes; ignores the rest."""

    def reset(self, num_envs: int, *, instruction: str, seeds: Sequence[int], mask: np.ndarray | None = None) -> None:
        if mask is None:
            self.waypoints: list[list[np.ndarray] | None] = [None] * num_envs
        else:
            self.waypoints = [None if new else old for new, old in zip(mask, self.waypoints, strict=True)]

    def act(self, obs: Obs) -> np.ndarray:
        actions = np.zeros((len(self.waypoints), 7), np.float32)  # physical: m, rad; gripper 0 = closed
        for row, (frame, pose) in enumerate(zip(obs["pixels"], obs["agent_pos"], strict=True)):
            waypoints = self.waypoints[row]
            if waypoints is None:
                waypoints = self.waypoints[row] = plan(frame, pose)
            if len(waypoints) > 1 and np.linalg.norm(waypoints[0] - pose[:3]) < 0.012:
                waypoints.pop(0)
            step = waypoints[0] - pose[:3]
            actions[row, :3] = step * min(1.0, 0.03 / (np.linalg.norm(step) + 1e-6))
        return np.clip(to_normalised(actions), -1, 1)


def plan(frame: np.ndarray, pose: np.ndarray) -> list[np.ndarray]:
    """Waypoints (x, y, z) in m from one (H, W, 3) frame: over and behind the cube, down, through it to the disc."""
    red, green, blue = np.moveaxis(frame.astype(np.float32), -1, 0)
    cube = locate(red - np.maximum(green, blue), CUBE_HEIGHT)
    disc = locate(np.minimum(green, blue) - red, 0.0)
    push = (disc - cube) / (np.linalg.norm(disc - cube) + 1e-6)
    behind = cube - REACH * push
    last = disc - 0.035 * push  # the cube is ahead of the fingers
    way = ((pose[:2], TRAVEL), (behind, TRAVEL), (behind, CUBE_HEIGHT), (last, CUBE_HEIGHT))
    return [np.append(xy, z) for xy, z in way]


def locate(colourfulness: np.ndarray, height: float) -> np.ndarray:
    """Table position (x, y) in m of a coloured thing whose centre lies `height` m above the table."""
    rows, columns = np.nonzero(colourfulness > 0.3 * colourfulness.max())
    uv = np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / colourfulness.shape[::-1]
    return CAMERAS["table"].unproject(uv, height)[:2]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-episodes", type=int, default=24)
    args = parser.parse_args(argv)
    pairs = [(k % 24, k) for k in range(args.num_episodes)]  # (initial state, seed)
    rates = {}
    for world, env_id in (("twin", "MujocoBridge-v0"), ("imagined", "WorldModel-Bridge-v0")):
        num_envs = min(args.num_episodes, 8)
        env = gym.make_vec(f"envs:{env_id}", num_envs=num_envs, task=TASK, autoreset_mode=AutoresetMode.DISABLED)
        cell = Cell("colour_pusher", "example", world, "example", TASK)
        records = evaluate(ColourPusher(), env, pairs, cell, instruction=TASKS[TASK].instruction)
        env.close()
        successes = sum(record.success for record in records)
        low, high = wilson_interval(successes, len(records))
        rates[world] = successes / len(records)
        print(
            f"{world:9s} {rates[world]:4.0%} of {len(records)} episodes solved (95% interval {low:.0%} to {high:.0%})"
        )
    return rates


if __name__ == "__main__":
    main()
