"""The loop: schedule, averages and clipping by hand; a killed run ends bit for bit where the whole one does."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from wfm_core.precision import compute_dtype
from wfm_core.train import TrainConfig, fit, learning_rate_scale, make_optimizers, state_bytes

SMALL = TrainConfig(
    num_steps=20, warmup_steps=4, learning_rate=0.01, bf16=False, checkpoint_every=6, log_every=3, ema_decay=0.8
)


class Regression(nn.Module):
    """A matrix for Muon, convolutions in channels-last order and biases for AdamW, and a buffer that is no float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch):
        self.seen += 1
        x = self.hidden(self.conv(batch["x"]).flatten(1))
        loss = (self.head(x.relu()) - batch["y"]).square().mean()
        return loss, {"seen": self.seen.item()}


def batch_fn(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 4, 4, generator=generator)
    return {"x": x, "y": x.sum(dim=(1, 2, 3))[:, None]}


def killed_at(last: int):
    def batches(step: int) -> dict[str, torch.Tensor]:
        if step >= last:
            raise KeyboardInterrupt
        return batch_fn(step)

    return batches


class Slope(nn.Module):
    """One number whose gradient the batch dictates."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return (self.x * batch["slope"]).sum(), {}


def rows(run_dir) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "steps_per_s"} for row in found]


def test_the_schedule_warms_up_stays_and_falls_to_zero():
    config = TrainConfig(num_steps=1000, warmup_steps=100, anneal_fraction=0.4)
    scale = [learning_rate_scale(step, config) for step in range(1000)]
    assert scale[0] == 0.01 and scale[49] == 0.5 and scale[99] == 1
    assert set(scale[99:601]) == {1.0}
    assert scale[800] == pytest.approx(0.5) and scale[999] == pytest.approx(1 / 400)
    assert learning_rate_scale(1000, config) == 0
    assert learning_rate_scale(0, TrainConfig(num_steps=10, warmup_steps=0, anneal_fraction=0.1)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "at least 1"),
        ({"accumulate": 0}, "at least 1"),
        ({"checkpoint_every": 0}, "at least 1"),
        ({"log_every": 0}, "at least 1"),
        ({"anneal_fraction": 0.0}, r"\(0, 1\], got 0.0"),
        ({"anneal_fraction": 1.5}, r"\(0, 1\], got 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_rate_clipping_and_average_by_hand(tmp_path):
    """AdamW moves by exactly the rate where the gradient never changes; clipped to 1, slopes of 1 to 50 are alike."""
    config = TrainConfig(
        num_steps=20, learning_rate=0.1, weight_decay=0, warmup_steps=5, anneal_fraction=0.25, ema_decay=0.6,
        grad_clip=1.0, bf16=False, log_every=1,
    )  # fmt: skip
    model, x, average = Slope(), 0.0, 0.0
    ema = fit(model, lambda step: {"slope": torch.tensor([1.0 + step % 3 * 24])}, config, tmp_path)
    for step in range(20):
        x -= 0.1 * learning_rate_scale(step, config)
        decay = min(0.6, (step + 1) / (step + 11))
        average = decay * average + (1 - decay) * x
    assert model.x.item() == pytest.approx(x, rel=1e-4)
    assert ema["x"].item() == pytest.approx(average, rel=1e-4)
    assert [row["grad_norm"] for row in rows(tmp_path)] == pytest.approx([1.0 + step % 3 * 24 for step in range(20)])


def test_matrices_between_hidden_features_go_to_muon():
    model = nn.ModuleDict(
        {
            "hidden": nn.Linear(64, 96),
            "narrow": nn.Linear(64, 63),
            "embed": nn.Linear(64, 64),
            "head": nn.Linear(64, 64),
        }
    )
    adam, muon = make_optimizers(model, TrainConfig())
    assert isinstance(adam, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    (group,) = muon.param_groups
    assert len(group["params"]) == 1 and group["params"][0] is model["hidden"].weight
    assert len(adam.param_groups[0]["params"]) == 7
    assert len(make_optimizers(nn.Linear(3, 3), TrainConfig())) == 1


def test_training_learns_and_tells(tmp_path):
    told = []
    config = TrainConfig(num_steps=150, learning_rate=0.01, warmup_steps=10, bf16=False, log_every=50)
    fit(Regression(), batch_fn, config, tmp_path, on_log=lambda step, row: told.append((step, row["loss"])))
    assert [step for step, _ in told] == [50, 100, 150]
    assert told == [(row["step"], row["loss"]) for row in rows(tmp_path)]
    assert told[-1][1] < 0.1 * batch_fn(149)["y"].square().mean()


@pytest.mark.parametrize("last", [2, 7, 13, 19])
def test_a_killed_run_ends_where_the_whole_one_does(tmp_path, last):
    whole = fit(Regression(), batch_fn, SMALL, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(), killed_at(last), SMALL, tmp_path / "killed")
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')  # the kill came while a row was being written
    resumed = fit(Regression(), batch_fn, SMALL, tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole")] == [3, 6, 9, 12, 15, 18, 20]
    states = [load_file(tmp_path / run / "state.safetensors") for run in ("whole", "killed")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(name.startswith("optimizer1.") for name in states[0])


def test_accumulated_batches_are_one_large_batch(tmp_path):
    def joined(step: int) -> dict[str, torch.Tensor]:
        parts = [batch_fn(3 * step + k) for k in range(3)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    split = replace(SMALL, accumulate=3)
    weights = fit(Regression(), batch_fn, split, tmp_path / "split")
    expected = fit(Regression(), joined, SMALL, tmp_path / "joined")
    other = fit(Regression(), batch_fn, SMALL, tmp_path / "other")
    for name in weights.keys() - {"seen"}:
        torch.testing.assert_close(weights[name], expected[name], atol=5e-3, rtol=0)  # Muon rounds to bfloat16
    assert max((weights[name] - other[name]).abs().max() for name in weights.keys() - {"seen"}) > 0.02
    for row, whole in zip(rows(tmp_path / "split"), rows(tmp_path / "joined"), strict=True):
        assert row["loss"] == pytest.approx(whole["loss"], rel=1e-2)
        assert row["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-2)
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(), killed_at(39), split, tmp_path / "killed")
    resumed = fit(Regression(), batch_fn, split, tmp_path / "killed")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.parametrize("freeze", [False, True])
def test_what_training_keeps_is_counted(tmp_path, freeze):
    model = Regression()
    with torch.device("meta"):
        shape = Regression()
    for one in (model, shape):
        one.head.weight.requires_grad_(not freeze)
    held = state_bytes(shape, SMALL)
    fit(model, batch_fn, SMALL, tmp_path)
    state = load_file(tmp_path / "state.safetensors")

    def total(prefix: str) -> int:
        return sum(value.nbytes for name, value in state.items() if name.startswith(prefix) and ".step" not in name)

    assert held["weights"] == total("model.") and held["average"] == total("ema.")
    assert held["optimizer"] == total("optimizer")
    assert held["gradients"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_a_finished_run_is_not_trained_again(tmp_path):
    done = fit(Regression(), batch_fn, SMALL, tmp_path)
    again = fit(Regression(), killed_at(0), SMALL, tmp_path)
    assert all(torch.equal(done[name], again[name]) for name in done)
    assert done["seen"] == 20  # a buffer is taken over, not averaged


def test_another_learning_curve_is_refused_and_other_bookkeeping_is_not(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(), killed_at(9), SMALL, tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()
    for changes in ({"learning_rate": 0.02}, {"num_steps": 21}, {"ema_decay": 0.9}):
        with pytest.raises(ValueError, match="use a new run directory"):
            fit(Regression(), batch_fn, TrainConfig(**vars(SMALL) | changes), tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(seed=None, now 1\); use a new run directory"):
        fit(Regression(), batch_fn, SMALL, tmp_path, batches={"seed": 1})
    assert (tmp_path / "state.safetensors").read_bytes() == before
    other = TrainConfig(**vars(SMALL) | {"log_every": 1, "checkpoint_every": 20})
    resumed, whole = (
        fit(Regression(), batch_fn, other, tmp_path),
        fit(Regression(), batch_fn, SMALL, tmp_path / "whole"),
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(("bad", "message"), [(math.nan, "loss is nan"), (math.inf, "loss is (nan|inf)")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad, message):
    def poisoned(step: int) -> dict[str, torch.Tensor]:
        batch = batch_fn(step)
        return batch if step < 8 else batch | {"y": batch["y"] * bad}

    with pytest.raises(FloatingPointError, match=f"{message} at step 8"):
        fit(Regression(), poisoned, SMALL, tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["metrics.jsonl", "state.safetensors"]
    resumed, whole = (
        fit(Regression(), batch_fn, SMALL, tmp_path),
        fit(Regression(), batch_fn, SMALL, tmp_path / "whole"),
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path):
    class Root(Slope):
        def forward(self, batch):
            return (self.x - batch["slope"]).abs().sqrt().sum(), {}  # its slope at 0 is infinite

    model = Root()
    with pytest.raises(FloatingPointError, match="gradient is (nan|inf) at step 0"):
        fit(model, lambda step: {"slope": torch.zeros(1)}, SMALL, tmp_path)
    assert model.x.item() == 0 and not (tmp_path / "state.safetensors").exists()


@pytest.mark.parametrize("asked", [None, True, False])
def test_bfloat16_computes_in_half_and_keeps_whole_weights(asked, tmp_path):
    seen = []

    class Watch(Regression):
        def forward(self, batch):
            seen.append(self.hidden(self.conv(batch["x"]).flatten(1)).dtype)
            return super().forward(batch)

    ema = fit(Watch(), batch_fn, TrainConfig(num_steps=2, bf16=asked), tmp_path)
    chosen = {None: compute_dtype(torch.device("cpu")), True: torch.bfloat16, False: torch.float32}[asked]
    assert set(seen) == {chosen} and ema["hidden.weight"].dtype == torch.float32
    assert np.isfinite([row["loss"] for row in rows(tmp_path)]).all()


def test_a_damaged_checkpoint_and_a_full_disk_are_named(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(), killed_at(9), SMALL, tmp_path)
    state = tmp_path / "state.safetensors"
    whole = state.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.safetensors is damaged .*; delete it to begin anew"):
            fit(Regression(), batch_fn, SMALL, tmp_path)
    state.write_bytes(whole)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"state\.safetensors \(No space left on device\); the previous file is kept"):
        fit(Regression(), batch_fn, SMALL, tmp_path)
    assert state.read_bytes() == whole
