"""Let a policy act in the twin, replay its actions in imagination, and save both side by side as a video.

python examples/imagine_beside_twin.py --task stack_cubes --initial-state 3 --out outputs/beside.mp4
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np

from policies import load_policy, shipped_policies
from tasks import TASKS
from wfm_core.data.actions import CONTROL_HZ
from wfm_core.data.video import ENCODINGS, encode_video


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=shipped_policies()[0])
    parser.add_argument("--task", default="put_carrot_on_plate", choices=TASKS)
    parser.add_argument("--initial-state", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("outputs/imagine_beside_twin.mp4"))
    args = parser.parse_args(argv)
    where = {"seed": args.seed, "options": {"initial_state": args.initial_state}}

    twin = gym.make("envs:MujocoBridge-v0", task=args.task)
    obs, _ = twin.reset(**where)
    policy = load_policy(args.policy)
    policy.reset(1, instruction=TASKS[args.task].instruction, seeds=[args.seed])
    true_frames, actions = [obs["pixels"]], []
    for _ in range(args.max_steps):
        actions.append(policy.act({name: value[None] for name, value in obs.items()})[0])
        obs, _, terminated, truncated, true_info = twin.step(actions[-1])
        true_frames.append(obs["pixels"])
        if terminated or truncated:
            break
    twin.close()

    imagined = gym.make("envs:WorldModel-Bridge-v0", task=args.task)
    obs, _ = imagined.reset(**where)
    frames = [obs["pixels"]]
    for action in actions:  # the same actions, whatever happens: only the first frame is shared with the twin
        obs, _, terminated, truncated, info = imagined.step(action)
        frames.append(obs["pixels"])
        if terminated or truncated:
            break
    imagined.close()

    length = min(len(frames), len(true_frames))
    pair = np.concatenate([np.stack(true_frames[:length]), np.stack(frames[:length])], axis=2)  # (T, H, 2 W, 3)
    error = ((pair[:, :, :128].astype(float) - pair[:, :, 128:]) ** 2).mean(axis=(1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(error[1:], 1e-9)).mean()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(encode_video(pair, CONTROL_HZ, ENCODINGS["compact"]))
    print(f"{length - 1} steps, {psnr:.1f} dB between imagination (right) and twin (left)")
    print(f"solved: twin {true_info['is_success']}, imagined {info['is_success']}")
    print(f"video: {args.out}")
    return args.out


if __name__ == "__main__":
    main()
