"""Record a small data set from the twin, read it back, and look at what an episode holds.

    python examples/record_and_read.py --num-episodes 6 --out runs/small

The same from the shell: worldsim-record out=runs/small num_episodes=6 'tasks=[put_carrot_on_plate,stack_cubes]'
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wfm_core.data.lerobot_v3 import LeRobotV3Reader
from worldsim.commands.record import RecordConfig, run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-episodes", type=int, default=6)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/small"))
    args = parser.parse_args(argv)

    # Half of it experts, half of it deliberate failures: a world model needs to see both.
    run(
        RecordConfig(
            out=str(args.out),
            tasks=["put_carrot_on_plate", "stack_cubes"],
            behaviours={"expert": 0.5, "miss_grasp": 0.25, "random_walk": 0.25},
            num_episodes=args.num_episodes,
            workers=args.workers,
        )
    )

    episodes = LeRobotV3Reader(args.out)  # a Sequence: frames are decoded when an episode is asked for
    print(f"\n{'episode':10s} {'instruction':28s} {'behaviour':12s} steps  path of gripper  solved")
    for episode in episodes:
        assert episode.agent_pos is not None  # other sources may lack proprioception; the twin does not
        path_length = np.linalg.norm(np.diff(episode.agent_pos[:, :3], axis=0), axis=1).sum()
        print(
            f"{episode.episode_id:10s} {episode.instruction:28s} {episode.meta['behaviour']:12s} "
            f"{len(episode.actions):5d} {path_length:14.2f} m  {episode.meta['solved']}"
        )
    first = episodes[0]
    print(f"\nframes  {first.frames.shape} {first.frames.dtype}, one more than actions")
    print(f"actions {first.actions.shape} {first.actions.dtype}, m and rad per 0.2 s, {first.convention}")
    print("labels  " + ", ".join(f"{name} {label.shape}" for name, label in first.labels.items()))
    return len(episodes)


if __name__ == "__main__":
    main()
