"""What ships: sizes, checksums, cards, strict loading, and one rollout that must look as it did when it was made."""

import contextlib
import dataclasses
import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import policies
from envs.contexts import shipped_context
from envs.mujoco_bridge import MujocoBridgeEnv
from envs.world_model_bridge import WorldModelBridgeVectorEnv
from tasks import TASKS
from wfm_core.checkpoint import SHIPPED_DIR, find_checkpoint, load_diffusion_decoder, load_tokenizer
from wfm_core.metrics import psnr
from wfm_core.tokenizers.patch import to_float, to_uint8
from wfm_core.tokenizers.perceptual import GABOR, gram_loss, load_feature_network
from worldsim.campaign import Job, run_job
from worldsim.evaluate import Cell
from worldsim.simulator import load_world_sim
from worldsim.store import EpisodeStore

MIB = 2**20
POLICIES_DIR = Path(policies.__file__).parent / "checkpoints"
CHECKPOINTS = sorted(path.parent for path in SHIPPED_DIR.glob("*/config.json"))
WORLD_MODELS = [folder for folder in CHECKPOINTS if (folder / "dynamics.safetensors").exists()]
POLICIES = sorted(path.parent for path in POLICIES_DIR.glob("*/config.json"))
GOLDEN = Path(__file__).parent / "golden_rollout.png"


def name(folder: Path) -> str:
    return folder.name


def test_all_weights_together_are_small():
    weights = [*SHIPPED_DIR.rglob("*.safetensors"), *POLICIES_DIR.rglob("*.safetensors")]
    assert max(path.stat().st_size for path in weights) <= 16 * MIB
    assert sum(path.stat().st_size for path in weights) <= 80 * MIB
    assert sum(path.stat().st_size for path in POLICIES_DIR.rglob("*") if path.is_file()) <= 25 * MIB


@pytest.mark.parametrize("folder", [*CHECKPOINTS, *POLICIES], ids=name)
def test_a_checkpoint_has_its_card(folder: Path):
    assert len((folder / "CARD.md").read_text()) > 200


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=name)
def test_weights_are_those_that_were_measured(folder: Path):
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    listed = {file: digest for digest, file in lines}
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(listed) == files
    for file in files:
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == listed[file], file


@pytest.mark.parametrize("folder", WORLD_MODELS, ids=name)
def test_a_world_model_is_calibrated(folder: Path):
    calibration = load_world_sim(folder).calibration
    assert 0 < calibration.success_threshold < 1
    assert np.isfinite(calibration.uncertainty_limit)


@pytest.mark.parametrize("folder", POLICIES, ids=name)
def test_a_policy_acts(folder: Path):
    if (folder / "train_config.json").exists() or "act" in folder.name:
        pytest.importorskip("lerobot")
    policy = policies.load_policy(folder.name)
    policy.reset(2, instruction=TASKS["stack_cubes"].instruction, seeds=[0, 1])
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
    pose = np.tile(np.array([0.29, 0.0, 0.13, 0, 0, 0, 1], np.float32), (2, 1))
    actions = policy.act({"pixels": pixels, "agent_pos": pose})
    assert actions.shape == (2, 7)
    assert np.isfinite(actions).all() and np.abs(actions).max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("task", ["stack_cubes", "put_eggplant_in_basket"])
def test_tokenizers_show_objects_where_they_are(task: str):
    """Two other initial states of a scene, decoded beside the first one; the continuous latents carry more."""
    frames = to_float(torch.from_numpy(shipped_context(TASKS[task]).frames[[0, 5, 11], 0]))
    decibels = {}
    for kind in ("bridge-nano-ar", "bridge-nano-di16", "bridge-nano-diffusion"):
        tokenizer = load_tokenizer(kind)
        latents = tokenizer.encode(frames)
        decoded = tokenizer.decode(latents[1:], frames[:1].expand(2, -1, -1, -1), latents[:1].expand(2, -1, -1, -1))
        decibels[kind] = psnr(to_uint8(decoded).numpy(), to_uint8(frames[1:]).numpy()).mean()
    assert 30 < decibels["bridge-nano-ar"] < decibels["bridge-nano-di16"] < decibels["bridge-nano-diffusion"]


@torch.no_grad()
def test_the_diffusion_decoder_brings_texture_back():
    """It draws what is lost in the mean of all that tokens may stand for; pixel by pixel that is no closer."""
    decoders = load_tokenizer("bridge-nano-ar"), load_diffusion_decoder(find_checkpoint("bridge-nano-ar"))
    texture = load_feature_network(GABOR)
    with contextlib.closing(MujocoBridgeEnv("put_carrot_on_plate")) as twin:
        seen = [twin.reset(seed=0, options={"initial_state": 3})[0]["pixels"]]
        seen += [twin.step(np.array([0.5, 0.4, -0.8, 0, 0, 0.3, 1], np.float32))[0]["pixels"] for _ in range(12)]
    frames = to_float(torch.from_numpy(np.stack(seen)))
    codes = decoders[0].encode(frames)
    reference = frames[:1].expand(12, -1, -1, -1), codes[:1].expand(12, -1, -1, -1)
    own, drawn = (decoder.decode(codes[1:], *reference).clamp(-1, 1) for decoder in decoders)
    own_gram, drawn_gram = (float(gram_loss(texture(each), texture(frames[1:]))) for each in (own, drawn))
    assert drawn_gram < 0.85 * own_gram
    true = to_uint8(frames[1:]).numpy()
    assert psnr(to_uint8(drawn).numpy(), true).mean() > psnr(to_uint8(own).numpy(), true).mean() - 1


def imagined_reach() -> np.ndarray:
    """Six frames (6, 128, 128, 3) of the arm moving forward, left and down from the first scene of stack_cubes."""
    sim = load_world_sim("bridge-nano-ar", dtype=torch.float32)
    task = TASKS["stack_cubes"]
    context = shipped_context(task)
    assert context.agent_pos is not None
    no_actions = np.zeros((1, 0, 7), np.float32)
    state = sim.start(context.frames[:1], context.agent_pos[:1], no_actions, task.instruction, [0])
    action = torch.tensor([[0.02, 0.015, -0.01, 0.0, 0.0, 0.05, 1.0]])
    seen = []
    for _ in range(6):
        state, step = sim.step(state, action)
        seen.append(sim.decode(step.latents, state.reference)[0].numpy())
    return np.stack(seen)


def test_the_golden_rollout():
    """Decoded frames depend on the machine's arithmetic in the last bits only; another model would be far off."""
    image = cv2.imread(str(GOLDEN))
    assert image is not None
    golden = image[:, :, ::-1].reshape(128, 6, 128, 3).transpose(1, 0, 2, 3)
    assert psnr(imagined_reach(), golden).min() > 30


@pytest.mark.parametrize("done", [slice(3, 8), slice(1, 15)], ids=["some", "most"])
def test_an_evaluation_that_was_killed_ends_as_the_unbroken_one(tmp_path: Path, done: slice):
    """In bfloat16 too, bit for bit, though other episodes then run beside an episode, and in other rows."""
    sim, policy, task = load_world_sim("bridge-nano-ar"), policies.load_policy("bc_10_demos"), TASKS["stack_cubes"]
    cell = Cell("bc_10_demos", "", "imagined", "", task.name)
    job = Job(cell, "", task.instruction, tuple((state, 7 * state) for state in range(16)))

    def make_env(_: str, num_rows: int) -> WorldModelBridgeVectorEnv:
        mode = AutoresetMode.DISABLED
        return WorldModelBridgeVectorEnv(num_rows, sim, task.name, autoreset_mode=mode, max_episode_steps=6)

    unbroken, killed = EpisodeStore(tmp_path / "unbroken"), EpisodeStore(tmp_path / "killed")
    run_job(job, make_env, policy, unbroken, 8, lambda _: None)
    records = unbroken.find(cell, job.pairs)
    for record in records[done]:
        killed.append(record)
    run_job(job, make_env, policy, killed, 8, lambda _: None)
    resumed = killed.find(cell, job.pairs)
    assert len(resumed) == 16 and len({record.max_uncertainty for record in resumed}) > 12
    same_time = [dataclasses.replace(now, wall_time=then.wall_time) for now, then in zip(resumed, records, strict=True)]
    assert same_time == records
