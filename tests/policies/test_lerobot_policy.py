import json

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")

from policies import load_policy  # noqa: E402
from policies.bc import BCConfig, BCNetwork, load_network  # noqa: E402
from wfm_core.data.actions import ACTION_HIGH, ACTION_LOW  # noqa: E402

SIZE = 64
INSTRUCTIONS = ["push the cube", "stack the cubes"]
IMAGE = "observation.images.image_0"


def feature(kind, *shape):
    from lerobot.configs.types import FeatureType, PolicyFeature

    return PolicyFeature(type=FeatureType[kind], shape=shape)


def stats(dim):
    return {"mean": torch.linspace(-0.1, 0.1, dim), "std": torch.linspace(0.5, 1.5, dim)}


def make(folder, name="act", *, env_dim=None, **settings):
    """Save a tiny untrained policy with its processors; return them."""
    from lerobot.policies import make_policy_config, make_pre_post_processors
    from lerobot.policies.factory import get_policy_class

    torch.manual_seed(0)
    inputs = {"observation.state": feature("STATE", 7)}
    inputs |= {"observation.environment_state": feature("ENV", env_dim)} if env_dim else {}
    inputs |= {} if env_dim else {IMAGE: feature("VISUAL", 3, SIZE, SIZE)}
    config = make_policy_config(
        name,
        input_features=inputs,
        output_features={"action": feature("ACTION", 7)},
        device="cpu",
        push_to_hub=False,
        **settings,
    )
    policy = get_policy_class(name)(config).eval()
    action_stats = {
        "mean": torch.from_numpy(ACTION_LOW + ACTION_HIGH) / 2,
        "std": torch.from_numpy(ACTION_HIGH - ACTION_LOW) / 4,
    }
    action_stats |= {"min": torch.from_numpy(ACTION_LOW), "max": torch.from_numpy(ACTION_HIGH)}
    state_stats = stats(7) | {"min": -torch.ones(7), "max": torch.ones(7)}
    images = {key: torch.full((3, 1, 1), value) for key, value in (("mean", 0.5), ("std", 0.3))}
    pre, post = make_pre_post_processors(
        config,
        dataset_stats={
            "observation.state": state_stats,
            "action": action_stats,
            IMAGE: images,
            "observation.environment_state": stats(env_dim or 1),
        },
    )
    for part in (policy, pre, post):
        part.save_pretrained(folder)
    return policy, pre, post


TINY_ACT = {
    "chunk_size": 4,
    "dim_model": 16,
    "n_heads": 2,
    "dim_feedforward": 16,
    "n_encoder_layers": 1,
    "use_vae": False,
    "pretrained_backbone_weights": None,
}


def obs(num_rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "pixels": rng.integers(0, 256, (num_rows, SIZE, SIZE, 3), dtype=np.uint8),
        "agent_pos": rng.uniform(-1, 1, (num_rows, 7)).astype(np.float32),
    }


def row(batch, i):
    return {key: value[i : i + 1] for key, value in batch.items()}


def lerobot_obs(batch):
    pixels = torch.from_numpy(batch["pixels"]).permute(0, 3, 1, 2).float() / 255
    return {IMAGE: pixels, "observation.state": torch.from_numpy(batch["agent_pos"]), "task": ["go"] * len(pixels)}


def to_box(physical):
    return np.clip((physical - (ACTION_HIGH + ACTION_LOW) / 2) * 2 / (ACTION_HIGH - ACTION_LOW), -1, 1)


@pytest.fixture(scope="module")
def act_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("act")
    make(folder, n_action_steps=2, **TINY_ACT)
    return folder


@pytest.mark.parametrize("settings", [{"n_action_steps": 3}, {"n_action_steps": 1, "temporal_ensemble_coeff": 0.1}])
def test_act_does_what_lerobot_does(tmp_path, settings):
    theirs, pre, post = make(tmp_path, **TINY_ACT, **settings)
    ours = load_policy(tmp_path)
    ours.reset(2, instruction="go", seeds=[0, 1])
    theirs.reset()
    for step in range(5):
        batch = obs(2, seed=step)
        expected = to_box(post(theirs.select_action(pre(lerobot_obs(batch)))).numpy())
        np.testing.assert_allclose(ours.act(batch), expected, atol=1e-5)


def test_a_row_restarts_alone(act_folder):
    whole, alone = load_policy(act_folder), load_policy(act_folder)
    whole.reset(2, instruction="go", seeds=[0, 1])
    alone.reset(1, instruction="go", seeds=[0])
    whole.act(obs(2, seed=0))
    alone.act(row(obs(2, seed=0), 0))
    whole.reset(2, instruction="go", seeds=[0, 5], mask=np.array([False, True]))
    fresh = load_policy(act_folder)
    fresh.reset(1, instruction="go", seeds=[5])
    batch = obs(2, seed=1)
    actions = whole.act(batch)
    np.testing.assert_allclose(actions[:1], alone.act(row(batch, 0)), atol=1e-5)
    np.testing.assert_allclose(actions[1:], fresh.act(row(batch, 1)), atol=1e-5)


def test_a_policy_with_queues_runs_row_by_row(tmp_path):
    """VQ-BeT keeps five observations and samples: each row must be as LeRobot runs it alone, whenever it restarts."""
    theirs, pre, post = make(
        tmp_path,
        "vqbet",
        pretrained_backbone_weights=None,
        crop_shape=(56, 56),
        gpt_hidden_dim=32,
        gpt_n_layer=1,
        gpt_n_head=1,
        gpt_input_dim=32,
        gpt_output_dim=32,
        action_chunk_size=2,
    )
    ours = load_policy(tmp_path)
    ours.reset(2, instruction="go", seeds=[3, 4])
    first = [ours.act(obs(2, seed=step)) for step in range(3)]
    ours.reset(2, instruction="go", seeds=[3, 9], mask=np.array([False, True]))
    rest = [ours.act(obs(2, seed=step)) for step in range(3, 5)]

    def alone(index, seed, steps):
        theirs.reset()
        for step, frame in enumerate(steps):
            torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
            yield to_box(post(theirs.select_action(pre(lerobot_obs(row(obs(2, seed=frame), index))))).numpy())[0]

    np.testing.assert_allclose([a[0] for a in first + rest], list(alone(0, 3, range(5))), atol=1e-5)
    np.testing.assert_allclose([a[1] for a in rest], list(alone(1, 9, range(3, 5))), atol=1e-5)


def test_environment_state_comes_from_the_frames(tmp_path):
    torch.manual_seed(1)
    network = BCNetwork(BCConfig(INSTRUCTIONS, image_size=SIZE, width=8, num_keypoints=4, hidden_dim=16))
    network.save(tmp_path / "encoder")
    theirs, pre, post = make(tmp_path, env_dim=14, n_action_steps=1, **TINY_ACT)
    (tmp_path / "worldsim.json").write_text('{"environment_state": {"kind": "keypoints", "path": "encoder"}}')
    policy, batch = load_policy(tmp_path), obs(3)
    policy.reset(3, instruction=INSTRUCTIONS[1], seeds=[0, 1, 2])
    network = load_network(tmp_path / "encoder")  # as stored, in half precision
    with torch.no_grad():
        keypoints = network.see(torch.from_numpy(batch["pixels"]), network.instruction(torch.tensor([1, 1, 1])))
    inputs = {
        "observation.state": torch.from_numpy(batch["agent_pos"]),
        "observation.environment_state": torch.cat([keypoints, torch.tensor([[0.0, 1.0]] * 3)], dim=1),
    }
    expected = to_box(post(theirs.select_action(pre(inputs))).numpy())
    np.testing.assert_allclose(policy.act(batch), expected, atol=1e-5)
    policy.reset(3, instruction="push the cub", seeds=[0, 1, 2])
    with pytest.raises(ValueError, match="nearest known: 'push the cube'"):
        policy.act(batch)


def test_actions_may_be_normalised(act_folder, tmp_path):
    make(tmp_path, n_action_steps=2, **TINY_ACT)
    physical = load_policy(tmp_path)
    (tmp_path / "worldsim.json").write_text('{"action_units": "normalised"}')
    normalised = load_policy(tmp_path)
    for policy in (physical, normalised):
        policy.reset(2, instruction="go", seeds=[0, 1])
    np.testing.assert_allclose(physical.act(obs(2)), to_box(normalised.act(obs(2))), atol=1e-5)


def test_missing_environment_state_is_explained(tmp_path):
    make(tmp_path, env_dim=14, n_action_steps=1, **TINY_ACT)
    with pytest.raises(ValueError, match="worldsim.json"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "policy_preprocessor.json", "policy_postprocessor_step_0_unnormalizer_processor.safetensors"],
)
def test_a_missing_or_damaged_file_is_named(act_folder, tmp_path, name):
    make(tmp_path, n_action_steps=2, **TINY_ACT)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_policy(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_policy(tmp_path)


def test_refuses_other_frame_sizes(act_folder):
    policy = load_policy(act_folder)
    policy.reset(1, instruction="go", seeds=[0])
    with pytest.raises(ValueError, match=r"\(3, 64, 64\)"):
        policy.act({"pixels": np.zeros((1, 32, 32, 3), np.uint8), "agent_pos": np.zeros((1, 7), np.float32)})


def test_an_unknown_entry_of_worldsim_json_is_named(tmp_path):
    make(tmp_path, n_action_steps=2, **TINY_ACT)
    (tmp_path / "worldsim.json").write_text(json.dumps({"units": "m"}))
    with pytest.raises(ValueError, match=r"worldsim.json.*units"):
        load_policy(tmp_path)
