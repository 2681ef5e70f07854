"""How fast a nano dynamics trains, what that is of the machine's best, and whether its data keep up.

    python benchmarks/train_speed.py [--quick] [--eager] [--kind autoregressive transformer] [--device cuda]

What is timed is the training loop of `worldsim-train`, optimizer and average of the weights included, on clips of the
twin's held-out episodes; by default as a compiled graph, as compile=true trains. Self-forcing is off: how many passes
it adds is drawn by lot. The loader's share is the time that making a batch takes, of the time of a step. Nobody else
should be computing on the machine meanwhile. The last line is one JSON object; the operations are those of the matrix
products of forward and backward pass, and fractions are of the best rate of a matrix product.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fidelity import held_out_cache
from benchmarks.step_speed import count_flops, matmul_peak, rounded, seconds
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import copy_part, find_checkpoint
from wfm_core.memory import keep_freed_memory
from wfm_core.precision import compute_dtype
from wfm_core.train import TrainConfig, compile_for_training, fit
from worldsim.training import OF_LATENTS, TrainCommand, prepare

SIZES: dict[str, dict[str, Any]] = {  # what the nano presets are trained with
    "autoregressive": {"batch_size": 8, "clip_length": 13, "dynamics": {"self_forcing": 0.0}},
    "transformer": {"batch_size": 8, "clip_length": 8, "dynamics": {"kind": "transformer", "groups": 1}},
    "diffusion": {"batch_size": 8, "clip_length": 8, "dynamics": {"kind": "diffusion"}},
    "irasim": {"batch_size": 8, "clip_length": 16, "dynamics": {"kind": "irasim"}},
}


def kind_figures(kind: str, data: Path, *, compiled: bool, quick: bool, device: str) -> dict[str, float]:
    """Train a dynamics of random weights for a few steps and count."""
    block = 4 if quick else 20  # steps between two looks at the clock
    budget = 1.0 if quick else 3.0
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        source = "bridge-nano-diffusion" if kind in OF_LATENTS else DEFAULT_WORLD_MODEL
        copy_part(find_checkpoint(source), checkpoint, "tokenizer")
        command = TrainCommand(stage="dynamics", data=[str(data)], out=folder, device=device, **SIZES[kind])
        made = prepare(command, checkpoint)
        made.trained.to(device)
        batch = {name: value.to(device) for name, value in made.batches(0).items()}

        def forward_and_backward() -> None:
            with torch.autocast(device, torch.bfloat16):
                loss, _ = made.trained(batch)
            loss.backward()

        flops = count_flops(forward_and_backward)
        if compiled:
            compile_for_training(made.trained)
        rates: list[float] = []
        dtype = compute_dtype(torch.device(device))
        peaks = [matmul_peak(dtype, budget, device)]
        settings = TrainConfig(num_steps=4 * block, log_every=block, checkpoint_every=4 * block)
        fit(
            made.trained,
            made.batches,
            settings,
            Path(folder) / "run",
            on_log=lambda _, row: rates.append(row["steps_per_s"]),
        )
        peaks.append(matmul_peak(dtype, budget, device))
        numbers = iter(range(10**9))
        loading = seconds(lambda: made.batches(next(numbers)), budget, "cpu")
    rate = float(np.median(rates[1:]))  # the first block compiles
    return {
        "fraction_of_peak": flops * rate / max(peaks),
        "steps_per_s": rate,
        "frames_per_s": rate * command.batch_size * command.clip_length,
        "tflop_per_step": flops / 1e12,
        "loader_share": loading * rate,
        "parameters": float(sum(p.numel() for p in made.part.parameters())),
        "peak_gflops": max(peaks) / 1e9,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--kind", nargs="+", default=list(SIZES), choices=list(SIZES), help="of dynamics")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("outputs/fidelity"), help="where the twin's episodes are kept")
    arguments = parser.parse_args()
    keep_freed_memory()
    data = held_out_cache(arguments.out, 12).directory
    data = data.with_name(data.name.removesuffix(".cache"))
    how = {"compiled": not arguments.eager, "quick": arguments.quick, "device": arguments.device}
    found = {}
    for kind in arguments.kind:
        found[kind] = kind_figures(kind, data, **how)
        print(f"{kind:<16}" + "  ".join(f"{name} {value:.3g}" for name, value in found[kind].items()))
    first = found[arguments.kind[0]]
    figures = {
        "fraction_of_peak": first["fraction_of_peak"],
        "loader_share": max(each["loader_share"] for each in found.values()),
        "kinds": found,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **how,
    }
    print(json.dumps(rounded(figures), allow_nan=False))


if __name__ == "__main__":
    main()
