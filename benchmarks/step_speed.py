"""How fast imagination runs: steps per second of `WorldModel-Bridge-v0`, and what that is of the machine's best.

    python benchmarks/step_speed.py [--quick] [--compile] [--world-model NAME_OR_FOLDER] [--device cuda]

A step is all of it: sampling the frame, heads, rewards, episode ends, info. "latents" decodes no pixels, "pixels"
decodes every frame. Nobody else should be computing on the machine meanwhile. The last line is one JSON object.
"""

import argparse
import json
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from envs.world_model_bridge import WorldModelBridgeVectorEnv
from tasks import TASKS
from wfm_core.checkpoint import SHIPPED_DIR, compute_dtype
from wfm_core.memory import keep_freed_memory
from wfm_core.models.autoregressive import AutoregressiveConfig, AutoregressiveModel
from wfm_core.models.token_world_model import TokenWorldModel
from wfm_core.packing import pack_linears
from wfm_core.tokenizers.patch import PatchTokenizer, PatchTokenizerConfig
from worldsim.heads import Heads, HeadsConfig
from worldsim.simulator import Calibration, WorldSim, load_world_sim

BATCHES = (1, 16, 64)
NEVER = Calibration(math.inf, math.inf, math.inf)  # no episode ends: only steps are timed


def untrained(device: str) -> WorldSim:
    """The default sizes with random weights: as fast as trained ones."""
    keep_freed_memory()
    model = TokenWorldModel(PatchTokenizer(PatchTokenizerConfig()), AutoregressiveModel(AutoregressiveConfig()))
    model = model.eval().requires_grad_(False).to(device)
    model.compute_in(compute_dtype(torch.device(device)))
    heads = Heads(HeadsConfig(tuple(task.instruction for task in TASKS.values()))).eval().requires_grad_(False)
    return WorldSim(model, heads.to(device), name="untrained", device=device)


def seconds(run: Callable[[], object], budget: float, device: str) -> float:
    """Median wall time of one call, over as many calls as fit the budget (at least 3)."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        sync()
        start = time.perf_counter()
        run()
        sync()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def matmul_peak(dtype: torch.dtype, budget: float, device: str) -> float:
    """Best rate of a square matrix product, FLOP/s."""
    rates = []
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates.append(2 * size**3 / seconds(lambda a=a, b=b: a @ b, budget / 3, device))
    return max(rates)


def env_step(sim: WorldSim, rows: int, observation: str) -> Callable[[], object]:
    """A started env's step with random actions."""
    env = WorldModelBridgeVectorEnv(rows, sim, observation=observation, max_episode_steps=10**9)
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (rows, 7)).astype(np.float32)
    return lambda: env.step(actions)


def count_flops(sim: WorldSim, rows: int) -> int:
    """Floating-point operations of the matrix products in one step of `rows` rows, heads included, decoder not.

    The simulator's weights must be plain: the counter does not know the products of packed ones.
    """
    step = env_step(sim, rows, "latents")
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def token_by_token_ratio(sim: WorldSim, model: TokenWorldModel, rows: int, budget: float, device: str) -> float:
    """How many times longer one cell at a time takes than all cells at once, the same network and state."""
    env = WorldModelBridgeVectorEnv(rows, sim, max_episode_steps=10**9)
    env.reset(seed=0)
    state, action = env.state.model, torch.zeros(rows, 7, device=device)
    slow = seconds(lambda: model.step_token_by_token(state, action), budget, device)
    return slow / seconds(lambda: model.step(state, action), budget, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a rough answer in under a minute")
    parser.add_argument("--world-model", default="bridge-nano", help="checkpoint; 'untrained' takes random weights")
    parser.add_argument("--compile", action="store_true", help="compile the step first, which takes minutes")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    rounds, budget = (1, 1.0) if args.quick else (5, 3.0)
    device = args.device

    shipped = args.world_model != "bridge-nano" or (SHIPPED_DIR / "bridge-nano" / "config.json").is_file()
    trained = shipped and args.world_model != "untrained"
    plain = load_world_sim(args.world_model, device, packed=False) if trained else untrained(device)
    model, heads = plain.world_model, plain.heads
    if not isinstance(model, TokenWorldModel) or not isinstance(heads, Heads):
        parser.error(f"--world-model must be of the autoregressive family, got {type(model).__name__}")
    dtype = next(model.dynamics.parameters()).dtype
    parameters = sum(p.numel() for part in (model, heads) for p in part.parameters())
    flops = count_flops(plain, 16)
    if not args.compile:  # as `load_world_sim` does
        pack_linears(model)
        pack_linears(heads)
    eager, sim = (
        WorldSim(model, heads, calibration=NEVER, name=plain.name, device=device, compiled=compiled)
        for compiled in (False, args.compile)
    )
    print(f"{sim.name}: {parameters / 1e6:.2f} M parameters, {dtype}, {device}, {torch.get_num_threads()} threads")

    steps = {(rows, what): env_step(sim, rows, what) for rows in BATCHES for what in ("latents", "pixels")}
    taken: dict[tuple[int, str], list[float]] = {key: [] for key in steps}
    peaks, fractions = [], []
    for _ in range(rounds):  # peak and steps in turn: a machine that slows down slows both
        peaks.append(matmul_peak(dtype, budget, device))
        for key, step in steps.items():
            taken[key].append(seconds(step, budget, device))
        peaks.append(matmul_peak(dtype, budget, device))
        fractions.append(flops / taken[16, "latents"][-1] / max(peaks[-2:]))
    speed = {key: key[0] / float(np.median(times)) for key, times in taken.items()}
    ratios = {rows: token_by_token_ratio(eager, model, rows, budget, device) for rows in (1, 16)}

    print(f"{'batch':>8} {'latents':>10} {'pixels':>10}   imagined env steps per second")
    for rows in BATCHES:
        print(f"{rows:>8} {speed[rows, 'latents']:>10.1f} {speed[rows, 'pixels']:>10.1f}")
    print(f"matrix product peak {max(peaks) / 1e9:.0f} GFLOP/s; a step of 16 rows takes {flops / 1e9:.1f} GFLOP")
    print(f"fraction of peak at batch 16: {np.median(fractions):.2f}")
    print(f"token by token takes {ratios[1]:.1f} times as long at batch 1, {ratios[16]:.1f} at batch 16")
    figures = {
        "steps_per_second_latents": {str(rows): round(speed[rows, "latents"], 1) for rows in BATCHES},
        "steps_per_second_pixels": {str(rows): round(speed[rows, "pixels"], 1) for rows in BATCHES},
        "fraction_of_peak_b16": round(float(np.median(fractions)), 3),
        "peak_gflops": round(max(peaks) / 1e9, 1),
        "gflop_per_step_b16": round(flops / 1e9, 2),
        "ratio_token_by_token": {str(rows): round(ratio, 2) for rows, ratio in ratios.items()},
        "world_model": sim.name,
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiled": args.compile,
        "quick": args.quick,
    }
    print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
