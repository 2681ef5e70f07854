import json
import logging
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

from wfm_core.models.scripted import ScriptedConfig, ScriptedWorldModel
from worldsim.scripted_heads import ScriptedHeads
from worldsim.simulator import NEUTRAL_AGENT_POS, Calibration, WorldSim, load_world_sim

INSTRUCTION = "put the carrot on the plate"


def scripted(noise: float = 0.0, chunk_rows: int | None = None) -> WorldSim:
    return WorldSim(
        ScriptedWorldModel(ScriptedConfig(frame_size=4, noise=noise)), ScriptedHeads(), chunk_rows=chunk_rows
    )


def context(sim: WorldSim, rows: int, steps: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    frames = random.integers(0, 256, (rows, steps, *sim.world_model.frame_shape)).astype(np.uint8)
    agent_pos = random.uniform(-0.3, 0.3, (rows, steps, 7)).astype(np.float32)
    actions = random.uniform(-0.05, 0.05, (rows, steps - 1, 7)).astype(np.float32)
    return frames, agent_pos, actions


def start(sim: WorldSim, rows: int, steps: int = 1, seed: int = 0):
    return sim.start(*context(sim, rows, steps, seed), INSTRUCTION, list(range(rows)))


def push(rows: int, dx: float = 0.05) -> torch.Tensor:
    action = torch.zeros(rows, 7)
    action[:, 0], action[:, 6] = dx, 0.25
    return action


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint) -> WorldSim:
    return load_world_sim(tiny_checkpoint, dtype=torch.float32)  # bfloat16 would hide small mistakes


def test_the_scripted_world_goes_where_it_is_told():
    sim = scripted()
    frames = np.full((1, 1, 4, 4, 3), 127, np.uint8)  # the origin
    state = sim.start(frames, np.zeros((1, 1, 7), np.float32), np.zeros((1, 0, 7)), INSTRUCTION, [0])
    for k in range(1, 5):
        before = {name: value.clone() for name, value in state.as_tensors().items()}
        following, step = sim.step(state, push(1))
        assert all(torch.equal(value, before[name]) for name, value in state.as_tensors().items())
        state = following
        torch.testing.assert_close(step.latents.flatten(), torch.tensor([0.05 * k, 0, 0]))
        torch.testing.assert_close(step.agent_pos[0, [0, 6]], torch.tensor([0.05 * k, 0.25]))
        torch.testing.assert_close(step.reward_terms[0, 0], torch.tensor(1 - (0.2 - 0.05 * k) / 0.5))
        assert step.success.item() == (k == 4) and step.failure.item() == 0 and state.elapsed.item() == k
        assert sim.decode(step.latents, state.reference)[0, 0, 0, 0] == round(127 + 0.05 * k / 0.004)
    assert torch.equal(step.latents, state.latents) and torch.equal(step.agent_pos, state.agent_pos)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("which", ["scripted", "tiny"])
def test_chunks_and_rows_equal_the_batch(which, steps, tiny):
    whole = scripted(noise=0.01, chunk_rows=100) if which == "scripted" else tiny
    chunked = WorldSim(whole.world_model, whole.heads, chunk_rows=2)
    frames, agent_pos, actions = context(whole, 5, steps)
    batches = [sim.start(frames, agent_pos, actions, INSTRUCTION, range(5)) for sim in (whole, chunked)]
    rows = [
        whole.start(frames[i : i + 1], agent_pos[i : i + 1], actions[i : i + 1], INSTRUCTION, [i]) for i in range(5)
    ]
    action = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 0.03
    for _ in range(6):
        stepped = [sim.step(state, action) for sim, state in zip((whole, chunked), batches, strict=True)]
        single = [whole.step(row, action[i : i + 1]) for i, row in enumerate(rows)]
        batches, rows = [state for state, _ in stepped], [state for state, _ in single]
        for name in ("latents", "agent_pos", "reward_terms", "uncertainty", "success", "failure"):
            a, b = (getattr(step, name) for _, step in stepped)
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(a, torch.cat([getattr(s, name) for _, s in single]), atol=1e-3, rtol=1e-3)
    reference = batches[0].reference
    assert torch.equal(reference.frames, torch.from_numpy(frames[:, -1]))
    assert torch.equal(reference.latents, whole.encode(reference.frames[:, None])[:, 0])
    decoded = [sim.decode(batches[0].latents, reference).int() for sim in (whole, chunked)]
    torch.testing.assert_close(*decoded, atol=1, rtol=0)


@pytest.mark.parametrize("which", ["scripted", "tiny"])
def test_a_branch_of_a_state_repeats_what_the_state_would_do(which, tiny):
    sim = scripted(noise=0.01) if which == "scripted" else tiny
    state, _ = sim.step(start(sim, 2, 2), push(2))
    branched = state.repeat(2)
    for _ in range(3):
        state, step = sim.step(state, push(2))
        branched, branch = sim.step(branched, push(4))
        torch.testing.assert_close(branch.latents, step.latents.repeat_interleave(2, 0), atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_steps_are_the_eager_ones(tiny):
    compiled = WorldSim(tiny.world_model, tiny.heads, compiled=True)
    states = [start(sim, 2, 2) for sim in (tiny, compiled)]
    for _ in range(3):
        (a, eager), (b, fast) = (sim.step(s, push(2)) for sim, s in zip((tiny, compiled), states, strict=True))
        states = [a, b]
        for field in fields(eager):
            torch.testing.assert_close(getattr(eager, field.name), getattr(fast, field.name), atol=1e-3, rtol=1e-3)


def test_the_seed_alone_decides(tiny):
    frames, agent_pos, actions = (part[[0, 0, 0]] for part in context(tiny, 1))
    state = tiny.start(frames, agent_pos, actions, INSTRUCTION, [3, 4, 3])
    apart = False
    for _ in range(5):
        state, step = tiny.step(state, push(3))
        assert torch.equal(step.latents[0], step.latents[2])
        apart |= not torch.equal(step.latents[0], step.latents[1])
    assert apart


def test_missing_proprioception_is_estimated_by_the_heads():
    sim = scripted()
    frames, _, actions = context(sim, 2, 3)
    state = sim.start(frames, None, actions, INSTRUCTION, [0, 1])
    neutral = torch.tensor(NEUTRAL_AGENT_POS)
    torch.testing.assert_close(state.agent_pos[:, :6], neutral[:6] + torch.from_numpy(actions).sum(1)[:, :6])
    torch.testing.assert_close(state.agent_pos[:, 6], torch.from_numpy(actions[:, -1, 6]))
    known = sim.start(*context(sim, 2, 3), INSTRUCTION, [0, 1]).agent_pos
    torch.testing.assert_close(known, torch.from_numpy(context(sim, 2, 3)[1][:, -1]))


def test_the_heads_see_the_previous_and_the_present_frame(monkeypatch):
    sim = scripted()
    frames, agent_pos, actions = context(sim, 2, 3)
    state = sim.start(frames, agent_pos, actions, INSTRUCTION, [0, 1])
    seen = []
    read = ScriptedHeads.read
    monkeypatch.setattr(ScriptedHeads, "read", lambda self, *args: seen.append(args) or read(self, *args))
    for _ in range(2):
        state, step = sim.step(state, push(2))
    (first, before, led_here, _, real), (second, after, commands, _, still_real) = seen
    torch.testing.assert_close(first[:, 0], sim.encode(torch.from_numpy(frames))[:, -1])
    assert torch.equal(real, first[:, 0]) and torch.equal(still_real, real)
    assert torch.equal(second[:, 0], first[:, 1]) and torch.equal(second[:, 1], step.latents)
    assert torch.equal(before, torch.from_numpy(agent_pos[:, -1]))
    assert torch.equal(led_here, torch.stack([torch.from_numpy(actions[:, -1]), push(2)], dim=1))
    assert torch.equal(commands, torch.stack([push(2), push(2)], dim=1))
    torch.testing.assert_close(after[:, 0], before[:, 0] + 0.05)


def test_wrong_input_is_named():
    sim = scripted()
    frames, agent_pos, actions = context(sim, 2, 2)
    with pytest.raises(ValueError, match=r"uint8 \(B, T, 4, 4, 3\) with T >= 1, got float32"):
        sim.start(frames.astype(np.float32), agent_pos, actions, INSTRUCTION, [0, 1])
    with pytest.raises(ValueError, match=r"\(2, 2, 5, 4, 3\)"):
        sim.start(np.zeros((2, 2, 5, 4, 3), np.uint8), agent_pos, actions, INSTRUCTION, [0, 1])
    with pytest.raises(ValueError, match=r"actions must have shape \(2, 1, 7\), got \(2, 0, 7\)"):
        sim.start(frames, agent_pos, actions[:, :0], INSTRUCTION, [0, 1])
    with pytest.raises(ValueError, match=r"agent_pos must have shape \(2, 2, 7\), got \(2, 1, 7\)"):
        sim.start(frames, agent_pos[:, :1], actions, INSTRUCTION, [0, 1])
    with pytest.raises(ValueError, match="2 rows, got 1"):
        sim.start(frames, agent_pos, actions, INSTRUCTION, [0])
    with pytest.raises(ValueError, match="one text or 2, got 3"):
        sim.start(frames, agent_pos, actions, [INSTRUCTION] * 3, [0, 1])
    with pytest.raises(ValueError, match=r"action must have shape \(2, 7\), got \(2, 6\)"):
        sim.step(start(sim, 2), push(2)[:, :6])
    with pytest.raises(ValueError, match="chunk_rows"):
        scripted(chunk_rows=0)


def test_a_checkpoint_brings_its_thresholds_and_its_name(tiny, tiny_checkpoint, tmp_path, caplog):
    assert tiny.calibration == Calibration(0.6, 0.7, 0.9) and tiny.name == "tiny"
    assert load_world_sim("scripted").name == "scripted"
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    del config["calibration"]
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        assert load_world_sim(folder).calibration == Calibration()
    assert "never calibrated" in caplog.text


def test_an_unknown_or_damaged_checkpoint_is_named(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint 'bridge-nan'"):
        load_world_sim("bridge-nan")
    for damage, message in (
        (lambda f: (f / "heads.safetensors").unlink(), "lacks heads.safetensors"),
        (lambda f: (f / "dynamics.safetensors").write_bytes(b"\0" * 50), "dynamics.safetensors is damaged"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: _set_calibration(f, {"success_treshold": 0.5}), "config.json: calibration must map"),
        (lambda f: _set_calibration(f, {"success_threshold": "high"}), "config.json: calibration must map"),
        (lambda f: _set_calibration(f, {"success_thresholds": {"go": "high"}}), "config.json: calibration must map"),
    ):
        folder = shutil.copytree(tiny_checkpoint, tmp_path / "damaged", dirs_exist_ok=True)
        damage(folder)
        with pytest.raises(ValueError, match=message):
            load_world_sim(folder)


def test_an_instruction_may_have_a_threshold_of_its_own(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    _set_calibration(folder, {"success_threshold": 0.6, "success_thresholds": {"go": 0.3}})
    calibration = load_world_sim(folder).calibration
    assert calibration.success_threshold_for("go") == 0.3 and calibration.success_threshold_for("stay") == 0.6


def _set_calibration(folder, calibration) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": calibration}))
