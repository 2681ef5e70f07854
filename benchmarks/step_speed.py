"""How fast imagination runs: steps per second of `WorldModel-Bridge-v0`, and what that is of the machine's best.

    python benchmarks/step_speed.py [--quick] [--eager] [--world-model NAME_OR_FOLDER] [--device cuda]

An env step is all of it: sampling the frame, heads, rewards, episode ends, info. "latents" decodes no pixels, "pixels"
decodes every frame. A pass is the dynamics' share: the tokens of the next frame. Both are timed as they are by default
(eager), and as a compiled graph with frozen weights, which --eager leaves out, for compiling takes minutes.

The second table has every family, token grid and way of decoding, eager, with random weights: drafts are then never
right, so that speculative decoding shows its cost only. Nobody else should be computing on the machine meanwhile. The
last line is one JSON object; fractions are of the best rate of a matrix product measured next to each timing.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from envs.world_model_bridge import WorldModelBridgeVectorEnv
from tasks import TASKS
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import SHIPPED_DIR
from wfm_core.models.autoregressive import AutoregressiveConfig
from wfm_core.models.decoding import TransformerModel
from wfm_core.models.revealing import AutoregressiveModel
from wfm_core.models.token_world_model import TokenDynamics, TokenWorldModel
from wfm_core.models.transformer_config import PRESETS
from wfm_core.packing import frozen, pack_linears
from wfm_core.precision import compute_dtype
from wfm_core.tokenizers.patch import PatchTokenizer, PatchTokenizerConfig
from worldsim.heads import Heads, HeadsConfig
from worldsim.simulator import Calibration, WorldSim, load_world_sim

BATCHES = (1, 16, 64)
FAMILY_ROWS = (1, 16)
NEVER = Calibration(math.inf, math.inf, math.inf)  # no episode ends: only steps are timed


def untrained(device: str) -> WorldSim:
    """The default sizes with random weights: as fast as trained ones."""
    model = random_model(AutoregressiveModel(AutoregressiveConfig()), PatchTokenizer(PatchTokenizerConfig()), device)
    heads = Heads(HeadsConfig(tuple(task.instruction for task in TASKS.values()))).eval().requires_grad_(False)
    return WorldSim(model, heads.to(device), name="untrained", device=device)


def random_model(dynamics: TokenDynamics, tokenizer: PatchTokenizer, device: str) -> TokenWorldModel:
    """A world model of random weights, ready to step."""
    model = TokenWorldModel(tokenizer, dynamics).eval().requires_grad_(False).to(device)
    model.compute_in(compute_dtype(torch.device(device)))
    return model


def seconds(run: Callable[[], object], budget: float, device: str, least: int = 3) -> float:
    """Median wall time of one call, over as many as fit the budget, `least` at least, after one that is not timed."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < least or time.perf_counter() < end:
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


def model_pass(model: TokenWorldModel, step: Callable, rows: int, device: str) -> Callable[[], object]:
    """A started model's step, or what stands for it, at rest."""
    latents = torch.zeros(rows, 1, *model.latent_shape, device=device)
    state = model.start(latents, torch.zeros(rows, 0, 7, device=device), range(rows))
    action = torch.zeros(rows, 7, device=device)
    return lambda: step(state, action)


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of one call, none of them by packed weights (not counted)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Timing:
    """What was measured of one call.

    Attributes:
        seconds: of wall time, median over the rounds.
        fraction: of the peak, median over the rounds.
    """

    seconds: float
    fraction: float


def timed(
    calls: dict[str, tuple[Callable[[], object], int]], dtype: torch.dtype, rounds: int, budget: float, device: str
) -> tuple[dict[str, Timing], float]:
    """Time calls in turn, each between two peaks: a machine that slows down slows both.

    Args:
        calls: name -> what is called, and its floating-point operations.
        dtype: of the matrix product that is the peak.
        rounds: how often each is timed.
        budget: seconds for each timing.
        device: where it runs.

    Returns:
        name -> what was measured, and the highest peak, FLOP/s.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    fractions: dict[str, list[float]] = {name: [] for name in calls}
    peaks = [matmul_peak(dtype, budget, device)]
    for _ in range(rounds):
        for name, (run, flops) in calls.items():
            taken[name].append(seconds(run, budget, device, least=1 if rounds == 1 else 3))
            peaks.append(matmul_peak(dtype, budget, device))
            fractions[name].append(flops / taken[name][-1] / max(peaks[-2:]))
    medians = {name: Timing(float(np.median(taken[name])), float(np.median(fractions[name]))) for name in calls}
    return medians, max(peaks)


def families() -> dict[str, tuple[PatchTokenizer, TokenDynamics]]:
    """Every family, token grid and way of decoding, at nano size with random weights."""
    small = PatchTokenizerConfig(patch=32, decoder_dims=(256, 256, 128, 64), decoder_blocks=(1, 2, 3, 2))
    made: dict[str, tuple[PatchTokenizer, TokenDynamics]] = {}
    for config in (PatchTokenizerConfig(), small):
        tokenizer = PatchTokenizer(config)
        cells = f"{tokenizer.grid**2} cells"
        for passes in (1, 2):
            sizes = AutoregressiveConfig(levels=config.levels, grid=tokenizer.grid, refine_steps=passes)
            made[f"autoregressive, {cells}, parallel {passes}"] = (tokenizer, AutoregressiveModel(sizes))
        whole = replace(PRESETS["nano"], levels=config.levels, groups=1, grid=(tokenizer.grid, tokenizer.grid))
        ways = {f"parallel {k}": replace(whole, decoding="parallel", refine_steps=k) for k in (1, 2)}
        ways["raster"] = replace(whole, decoding="raster")
        ways["speculative"] = replace(whole, decoding="speculative", num_draft_heads=4)
        made |= {f"transformer, {cells}, {way}": (tokenizer, TransformerModel(sizes)) for way, sizes in ways.items()}
    return made


def family_figures(rounds: int, budget: float, device: str) -> dict[str, dict[str, float]]:
    """Frames a second at each of `FAMILY_ROWS`, the fraction of the peak at the last, and ratios to strict decoding."""
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    made = families()
    for name, (tokenizer, dynamics) in made.items():
        model = random_model(dynamics, tokenizer, device)
        runs = {rows: model_pass(model, model.step, rows, device) for rows in FAMILY_ROWS}
        flops = {rows: count_flops(run) for rows, run in runs.items()}
        pack_linears(model)
        calls |= {f"{name}/{rows}": (run, flops[rows]) for rows, run in runs.items()}
    found, _ = timed(calls, compute_dtype(torch.device(device)), rounds, budget, device)
    figures: dict[str, dict[str, float]] = {}
    for name in made:
        strict = f"transformer,{name.split(',')[1]}, raster"
        figures[name] = {f"frames_per_s_b{rows}": rows / found[f"{name}/{rows}"].seconds for rows in FAMILY_ROWS}
        figures[name]["fraction_of_peak"] = found[f"{name}/{FAMILY_ROWS[-1]}"].fraction
        if name.startswith("transformer"):
            for rows in FAMILY_ROWS:
                ratio = found[f"{strict}/{rows}"].seconds / found[f"{name}/{rows}"].seconds
                figures[name][f"times_raster_b{rows}"] = ratio
    return figures


def sim_figures(name: str, device: str, *, compiled: bool, rounds: int, budget: float) -> tuple[dict[str, Any], float]:
    """Speed of the env and of its dynamics' pass, eager or compiled; and the peak, FLOP/s."""
    plain = load_world_sim(name, device, packed=False) if name != "untrained" else untrained(device)
    model, heads = plain.world_model, plain.heads
    assert isinstance(model, TokenWorldModel) and isinstance(heads, Heads)
    sim = WorldSim(model, heads, calibration=NEVER, name=plain.name, device=device, compiled=compiled)
    batches = [rows for rows in BATCHES if rows <= (sim.chunk_rows or rows)] if compiled else list(BATCHES)
    flops = {(rows, "latents"): count_flops(env_step(plain, rows, "latents")) for rows in batches}
    flops |= {(rows, "pass"): count_flops(model_pass(model, model.step, rows, device)) for rows in batches}
    if not compiled:  # as `load_world_sim` does
        pack_linears(model)
        pack_linears(heads)
    step = frozen(model.step, torch.device(device)) if compiled else model.step
    calls = {f"pass/{rows}": (model_pass(model, step, rows, device), flops[rows, "pass"]) for rows in batches}
    for rows in batches:
        calls[f"latents/{rows}"] = (env_step(sim, rows, "latents"), flops[rows, "latents"])
        calls[f"pixels/{rows}"] = (env_step(sim, rows, "pixels"), 0)
    found, peak = timed(calls, next(model.dynamics.parameters()).dtype, rounds, budget, device)
    figures: dict[str, Any] = {
        f"{what}_per_s": {str(rows): rows / found[f"{what}/{rows}"].seconds for rows in batches}
        for what in ("pass", "latents", "pixels")
    }
    last = max(rows for rows in batches if rows <= 16)
    figures |= {
        "fraction_of_peak_b16": found[f"latents/{last}"].fraction,
        "pass_fraction_of_peak_b16": found[f"pass/{last}"].fraction,
        "env_over_pass_b16": found[f"pass/{last}"].seconds / found[f"latents/{last}"].seconds,
        "gflop_per_step_b16": flops[last, "latents"] / 1e9,
    }
    if not compiled:
        figures["ratio_token_by_token"] = {
            str(rows): seconds(model_pass(model, model.step_token_by_token, rows, device), budget, device)
            / seconds(model_pass(model, model.step, rows, device), budget, device)
            for rows in FAMILY_ROWS
        }
    return figures, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a rough answer")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--world-model", default=DEFAULT_WORLD_MODEL, help="a name, or 'untrained'")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    rounds, budget = (1, 1.0) if args.quick else (5, 3.0)
    shipped = args.world_model != DEFAULT_WORLD_MODEL or (SHIPPED_DIR / DEFAULT_WORLD_MODEL / "config.json").is_file()
    name = args.world_model if shipped else "untrained"
    variants, peaks = {}, []
    for variant in ("eager",) if args.eager else ("eager", "compiled"):
        made = sim_figures(name, args.device, compiled=variant == "compiled", rounds=rounds, budget=budget)
        variants[variant] = made[0]
        peaks.append(made[1])
        show_sim(variant, variants[variant])
    by_family = family_figures(rounds, budget / 3, args.device)
    show_families(by_family)
    best = max(variants.values(), key=lambda each: each["pass_fraction_of_peak_b16"])
    figures = {
        "steps_per_second_latents": variants["eager"]["latents_per_s"],
        "steps_per_second_pixels": variants["eager"]["pixels_per_s"],
        "ratio_token_by_token": variants["eager"]["ratio_token_by_token"],
        "fraction_of_peak_b16": best["fraction_of_peak_b16"],
        "pass_fraction_of_peak_b16": best["pass_fraction_of_peak_b16"],
        "env_over_pass_b16": best["env_over_pass_b16"],
        "variants": variants,
        "families": by_family,
        "peak_gflops": max(peaks) / 1e9,
        "world_model": name,
        "dtype": str(compute_dtype(torch.device(args.device))).removeprefix("torch."),
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "quick": args.quick,
    }
    print(json.dumps(rounded(figures), allow_nan=False))


def show_sim(variant: str, figures: dict[str, Any]) -> None:
    """Print what `sim_figures` found."""
    print(f"{variant:<10} {'pass':>10} {'latents':>10} {'pixels':>10}   imagined env steps per second")
    for rows in figures["pass_per_s"]:
        speeds = "".join(f"{figures[f'{what}_per_s'][rows]:>11.1f}" for what in ("pass", "latents", "pixels"))
        print(f"batch {rows:<4}{speeds}")
    print(
        f"of the matrix product peak, at batch 16: pass {figures['pass_fraction_of_peak_b16']:.2f}, env step "
        f"{figures['fraction_of_peak_b16']:.2f}; env step at {figures['env_over_pass_b16']:.2f} of the pass's rate"
    )
    for rows, ratio in figures.get("ratio_token_by_token", {}).items():
        print(f"token by token takes {ratio:.1f} times as long at batch {rows}")


def show_families(by_family: dict[str, dict[str, float]]) -> None:
    """Print what `family_figures` found."""
    for name, row in by_family.items():
        print(f"{name:<40}" + "  ".join(f"{column} {value:.3g}" for column, value in row.items()))


def rounded(figures: Any) -> Any:
    """Four digits in all numbers of a nest of dicts."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    return float(f"{figures:.4g}") if isinstance(figures, float) else figures


if __name__ == "__main__":
    main()
