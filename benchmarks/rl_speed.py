"""How much faster experience is gathered in imagination than in the twin, on all cores of this machine.

    python benchmarks/rl_speed.py [--quick] [--world-model NAME_OR_FOLDER] [--rows 64] [--eager]

Imagination: one process with a thread a core, a batch of rows, latents observed, rewards and episode ends included, as
a compiled graph, which takes a minute or two first and --eager leaves out. The twin: a process a core, each stepping
its rows one after the other and rendering every frame. Both act at random. Rounds of the two alternate; nobody else
should be computing meanwhile. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from statistics import median

import numpy as np
import torch

from envs.vector import BridgeVectorEnv
from envs.world_model_bridge import WorldModelBridgeVectorEnv
from wfm_core import DEFAULT_WORLD_MODEL
from worldsim.simulator import load_world_sim

TASK = "put_carrot_on_plate"


def rate(env: BridgeVectorEnv, num_steps: int, seed: int = 0) -> float:
    """Control steps a second of all rows together, acting at random."""
    rng = np.random.default_rng(seed)
    started = time.perf_counter()
    for _ in range(num_steps):
        env.step(rng.uniform(-1, 1, (env.num_envs, 7)).astype(np.float32))
    return num_steps * env.num_envs / (time.perf_counter() - started)


def twin_worker(pipe: Connection, rows: int) -> None:
    """Step a twin's rows as often as asked, until asked for nothing."""
    from envs.mujoco_bridge import MujocoBridgeVectorEnv

    env = MujocoBridgeVectorEnv(rows, TASK)
    env.reset(seed=os.getpid())
    pipe.send(0.0)
    while num_steps := pipe.recv():
        pipe.send(rate(env, num_steps))
    env.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    parser.add_argument("--world-model", default=DEFAULT_WORLD_MODEL)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="do not compile the world model's step")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    sim = load_world_sim(args.world_model, compiled=not args.eager)
    imagined_env = WorldModelBridgeVectorEnv(args.rows, sim, TASK, observation="latents")
    imagined_env.reset(seed=0)
    rate(imagined_env, 1)
    context = multiprocessing.get_context("spawn")
    pipes = []
    for _ in range(cores):
        here, there = context.Pipe()
        context.Process(target=twin_worker, args=(there, max(1, args.rows // cores)), daemon=True).start()
        pipes.append(here)
    for pipe in pipes:
        pipe.recv()
    rounds = []
    for _ in range(1 if args.quick else 5):
        imagined = rate(imagined_env, 4)
        for pipe in pipes:
            pipe.send(4)
        rounds.append((imagined, sum(pipe.recv() for pipe in pipes)))
        print(f"imagined {rounds[-1][0]:.0f}, twin {rounds[-1][1]:.0f} steps/s")
    for pipe in pipes:
        pipe.send(0)
    imagined, twin = (median(each[k] for each in rounds) for k in (0, 1))
    found = {
        "world_model": args.world_model,
        "rows": args.rows,
        "compiled": not args.eager,
        "cores": cores,
        "imagined_steps_per_s": round(imagined),
    }
    found |= {"twin_steps_per_s": round(twin), "ratio_to_twin": round(imagined / twin, 2)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
