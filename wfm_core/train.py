"""The one training loop: whatever maps a batch to (loss, metrics) is trained, checkpointed and resumed by `fit`."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from wfm_core.data.files import write_atomic
from wfm_core.distributed import Processes, blocks_of, laid_out_as, whole
from wfm_core.precision import compute_dtype

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
BatchFn = Callable[[int], Batch]
"""Number -> batch. A pure function, so that a resumed run sees the batches the killed one would have seen."""
OnLog = Callable[[int, dict[str, float]], None]
"""Takes the step and its metrics."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `fit`.

    The learning rate warms up over `warmup_steps`, stays, and falls linearly to zero over the last `anneal_fraction` of
    the run. Hidden matrices are trained by Muon, scaled so that its updates match AdamW's in size; the rest by AdamW.
    A step follows the mean gradient of `accumulate` batches, which several processes share. Products are computed in
    bfloat16 with `bf16`; None: where the device is faster at it than at float32.
    """

    num_steps: int = 10_000
    accumulate: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    anneal_fraction: float = 0.5
    ema_decay: float = 0.998
    grad_clip: float = 1.0
    bf16: bool | None = None
    checkpoint_every: int = 500
    log_every: int = 50

    def __post_init__(self) -> None:
        if min(self.num_steps, self.accumulate, self.checkpoint_every, self.log_every) < 1:
            raise ValueError(f"num_steps, accumulate, checkpoint_every and log_every must be at least 1, got {self}")
        if not 0 < self.anneal_fraction <= 1:
            raise ValueError(f"anneal_fraction must lie in (0, 1], got {self.anneal_fraction}")

    def dtype(self, device: torch.device) -> torch.dtype:
        """Return the type in which products are computed on a device."""
        if self.bf16 is None:
            return compute_dtype(device)
        return torch.bfloat16 if self.bf16 else torch.float32


def learning_rate_scale(step: int, config: TrainConfig) -> float:
    """Factor on the learning rate at `step`: warm-up, constant, linear to zero."""
    warmup = (step + 1) / max(1, config.warmup_steps)
    anneal = (config.num_steps - step) / (config.anneal_fraction * config.num_steps)
    return min(1.0, warmup, anneal)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden features, AdamW for embeddings, heads, convolutions, norms and biases.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the update scale that
    matches AdamW is from Liu et al., "Muon is scalable for LLM training" (2025).
    """
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        boundary = any(part in name for part in ("embed", "position", "head"))
        is_hidden = parameter.ndim == 2 and min(parameter.shape) >= 64 and not boundary
        (hidden if is_hidden else rest).append(parameter)
    rate, decay = config.learning_rate, config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, rate, betas=(0.9, 0.98), weight_decay=decay)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, rate, decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def state_bytes(model: nn.Module, config: TrainConfig) -> dict[str, int]:
    """Bytes that `fit` keeps of a model, which may be on the meta device: weights, gradients, moments, average."""
    weights = sum(value.nbytes for value in model.state_dict().values())
    moments = 0
    for optimizer in make_optimizers(model, config):
        each = 1 if isinstance(optimizer, torch.optim.Muon) else 2
        moments += sum(each * p.nbytes for group in optimizer.param_groups for p in group["params"])
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {"weights": weights, "gradients": gradients, "optimizer": moments, "average": weights}


def compile_for_training(model: nn.Module) -> None:
    """Compile a model in place when it first runs: once for all blocks that are alike, or else as a whole."""
    for module in blocks_of(model) or [model]:
        module.compile()


def fit(
    model: nn.Module,
    batch_fn: BatchFn,
    config: TrainConfig,
    run_dir: Path,
    *,
    processes: Processes | None = None,
    batches: Mapping[str, object] | None = None,
    on_log: OnLog | None = None,
) -> dict[str, Tensor]:
    """Train `model` to `config.num_steps`, resuming from `run_dir` if a checkpoint is there.

    Args:
        model: maps a batch to (scalar loss, metrics), all tensors without dimensions; its weights are float32.
        batch_fn: pure function of a number; step k sees `accumulate` batches from number k * `accumulate` on.
        config: settings; those that shape the learning curve must be the checkpoint's own.
        run_dir: holds `state.safetensors` (weights, EMA, optimizer state) and `metrics.jsonl`, both the same however
            many processes there are.
        processes: those that train together, each with the same model and arguments; None: this one alone, where the
            model is.
        batches: what `batch_fn` is made of, as JSON values (data, seed, ...); it too must be the checkpoint's own.
        on_log: called with the step and its metrics every `log_every` steps.

    Returns:
        The exponential moving average of the weights, a state dict.

    Raises:
        ValueError: the checkpoint in `run_dir` was made with other settings, or is damaged; or `accumulate` cannot be
            shared out evenly.
        OSError: the disk is full; the last checkpoint is untouched.
        FloatingPointError: the loss or its gradient is not finite; the last checkpoint is untouched.
    """
    processes = processes or Processes(device=next(model.parameters()).device)
    share = config.accumulate // processes.count
    if share * processes.count != config.accumulate:
        raise ValueError(f"accumulate must be a multiple of the {processes.count} processes, got {config.accumulate}")
    run_dir.mkdir(parents=True, exist_ok=True)
    processes.share(model)
    optimizers = make_optimizers(model, config)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    settings = json.loads(json.dumps(_curve_settings(config) | dict(batches or {})))  # as they will be read back
    step = _resume(run_dir, model, ema, optimizers, settings)
    if processes.rank == 0:
        _truncate_log(run_dir / "metrics.jsonl", step)
    model.train()
    started, logged = time.perf_counter(), step
    half = config.dtype(processes.device) == torch.bfloat16
    while step < config.num_steps:
        scale = learning_rate_scale(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * scale
        seen: dict[str, Tensor] = {}
        for k in range(processes.rank, config.accumulate, processes.count):
            batch = batch_fn(step * config.accumulate + k)
            batch = {name: value.to(processes.device, non_blocking=True) for name, value in batch.items()}
            with torch.autocast(processes.device.type, torch.bfloat16, enabled=half):
                loss, metrics = model(batch)
            (loss / share).backward()
            for name, value in {"loss": loss, **metrics}.items():
                seen[name] = seen.get(name, 0) + torch.as_tensor(value).detach() / share
        seen = processes.mean(seen)
        if not math.isfinite(loss := seen["loss"].item()):
            raise FloatingPointError(f"loss is {loss} at step {step}; the last checkpoint is in {run_dir}")
        norm = whole(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip))
        if not math.isfinite(norm.item()):
            raise FloatingPointError(f"gradient is {norm.item()} at step {step}; the last checkpoint is in {run_dir}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(config.ema_decay, step / (step + 10))  # a short memory at first, or the random start lingers
        with torch.no_grad():
            for name, value in model.state_dict().items():
                ema[name].lerp_(value, 1 - decay) if value.is_floating_point() else ema[name].copy_(value)
        if step % config.log_every == 0 or step == config.num_steps:
            rate = (step - logged) / (time.perf_counter() - started)
            row = {name: float(value) for name, value in (seen | {"grad_norm": norm}).items()} | {"steps_per_s": rate}
            started, logged = time.perf_counter(), step
            if processes.rank == 0:
                with open(run_dir / "metrics.jsonl", "a") as file:
                    file.write(json.dumps({"step": step, **row}) + "\n")
                if on_log is not None:
                    on_log(step, row)
        if step % config.checkpoint_every == 0 or step == config.num_steps:
            _save(run_dir, step, model, ema, optimizers, settings, processes)
    return {name: whole(value) for name, value in ema.items()}


def _curve_settings(config: TrainConfig) -> dict[str, object]:
    """The settings that shape the learning curve; how often one logs and saves does not."""
    return {k: v for k, v in asdict(config).items() if k not in ("checkpoint_every", "log_every")}


def _save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    settings: Mapping[str, object],
    processes: Processes,
) -> None:
    """Write one file with everything, to a temporary name first, so that a kill leaves the former checkpoint whole."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"ema.{k}": v for k, v in ema.items()}
    for i, optimizer in enumerate(optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{i}.{index}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    kept = {}
    for name, value in tensors.items():
        gathered = whole(value.detach())  # by all of them; the first one writes
        if processes.rank == 0:
            kept[name] = gathered.contiguous()
    if processes.rank == 0:
        header = {"step": str(step), "settings": json.dumps(settings)}
        write_atomic(run_dir / "state.safetensors", save(kept, header))


def _resume(
    run_dir: Path,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    settings: Mapping[str, object],
) -> int:
    """Load the checkpoint of `run_dir` in place, if there is one; returns the step to continue from."""
    path = run_dir / "state.safetensors"
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to begin anew") from error
    require_same_settings(path, json.loads(header["settings"]), settings)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict({name: laid_out_as(value, ema[name]) for name, value in part("model.").items()})
    for name, value in part("ema.").items():
        ema[name].copy_(laid_out_as(value, ema[name]))
    for i, optimizer in enumerate(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part(f"optimizer{i}.").items():
            index, slot = key.split(".", 1)
            state.setdefault(int(index), {})[slot] = laid_out_as(value, parameters[int(index)])
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    step = int(header["step"])
    log.info("resuming %s from step %d", run_dir, step)
    return step


def require_same_settings(path: Path, made: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse to go on with what was begun otherwise.

    Raises:
        ValueError: a setting differs; says which and how.
    """
    if differing := sorted(k for k in made.keys() | now.keys() if made.get(k) != now.get(k)):
        changes = ", ".join(f"{k}={made.get(k)!r}, now {now.get(k)!r}" for k in differing)
        raise ValueError(f"{path} was trained with other settings ({changes}); use a new run directory")


def _truncate_log(path: Path, step: int) -> None:
    """Drop rows after `step` (logged after the checkpoint, then lost to the kill), so that each step is logged once."""
    if path.exists():
        rows = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        path.write_text("".join(row + "\n" for row in rows))
