"""Two processes on a CPU against one: the same losses, the same checkpoint, and either goes on where the other was."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_worker
from safetensors import safe_open
from safetensors.torch import load_file

from wfm_core.distributed import Processes, joined_processes
from wfm_core.models.transformer import Transformer
from wfm_core.train import fit, make_optimizers

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="several processes need accelerate: the extra `distributed`"
)


def run_two(folder: Path, width: int, stop_at: int = 0) -> list[str]:
    """Train in two processes as `accelerate launch` starts them; what each wrote to its error stream."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [
        subprocess.Popen(
            [sys.executable, train_worker.__file__, str(folder), str(width), str(stop_at)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=280)[1] for worker in workers]
    assert stop_at or [worker.returncode for worker in workers] == [0, 0], errors
    return errors


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@needs_accelerate
@pytest.mark.parametrize(
    ("width", "rounding", "atol"), [(60, 1e-5, 2e-5), (66, 1e-3, 0.01)], ids=["AdamW", "Muon in bfloat16"]
)
def test_two_processes_train_as_one_and_one_goes_on_from_two(tmp_path, width, rounding, atol):
    alone, together, handed = (tmp_path / name for name in ("alone", "together", "handed"))
    train_worker.train(alone, width)
    optimizers = make_optimizers(Transformer(replace(train_worker.CONFIG, width=width)), train_worker.LOOP)
    assert len(optimizers) == (2 if width == 66 else 1)
    run_two(together, width)
    errors = run_two(handed, width, stop_at=6)
    assert all("KeyboardInterrupt" in error for error in errors) and len(losses(handed)) == 6
    with safe_open(handed / "state.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "4"
    train_worker.train(handed, width)

    expected = losses(alone)
    assert len(expected) == 8 and expected[-1] < 0.98 * expected[0]
    for folder in (together, handed):
        assert losses(folder) == pytest.approx(expected, rel=rounding)
        state, other = (load_file(path / "state.safetensors") for path in (folder, alone))
        assert {name: value.shape for name, value in state.items()} == {name: v.shape for name, v in other.items()}
        for name, value in state.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=atol)
    train_worker.train(tmp_path / "fewer", width, accumulate=2)
    assert losses(tmp_path / "fewer") != pytest.approx(expected, rel=1e-3)  # it matters that both take part


def test_who_is_alone_needs_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with joined_processes("cpu") as processes:
        assert (processes.rank, processes.count, processes.device.type) == (0, 1, "cpu")
        values = {"loss": torch.tensor(2.0)}
        assert processes.mean(values) == values
        with processes.first():
            pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ImportError, match=r"pip install 'worldsim\[distributed\]'"), joined_processes("cpu"):
        pass


def test_batches_must_be_shared_out_evenly(tmp_path):
    with pytest.raises(ValueError, match="accumulate must be a multiple of the 3 processes, got 4"):
        fit(
            Transformer(train_worker.CONFIG),
            train_worker.batch_fn,
            train_worker.LOOP,
            tmp_path,
            processes=Processes(0, 3),
        )
