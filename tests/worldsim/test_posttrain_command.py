"""Post-training on tiny data: what is loaded, what is new, what is refused, and what the user is told."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from robot_clips import filmed_episode, robot_episode, write_dataset
from safetensors.torch import load_file

from wfm_core import lora
from wfm_core.checkpoint import load_dynamics, load_patch_tokenizer, load_world_model, read_config, write_config
from wfm_core.data.video import decode_video, encode_video
from wfm_core.tokenizers.patch import to_float
from wfm_core.world_model import Reference
from worldsim.caches import open_caches
from worldsim.commands.posttrain import run
from worldsim.commands.train import run as train
from worldsim.posttraining import PosttrainCommand, prepare
from worldsim.simulator import load_world_sim
from worldsim.training import TrainCommand

NEW = {"embed_action", "contact_head"}
LOOP = {"num_steps": 3, "checkpoint_every": 1, "log_every": 1, "warmup_steps": 1, "bf16": False}


@pytest.fixture(scope="module")
def bridge(tmp_path_factory) -> tuple[str, str]:
    """Folders of data, and of other data to judge by."""
    folder = tmp_path_factory.mktemp("bridge")
    return (
        write_dataset(folder / "data", [robot_episode(seed, 10).resized(32, 32) for seed in range(3)]),
        write_dataset(folder / "rest", [robot_episode(seed, 8).resized(32, 32) for seed in range(8, 10)]),
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> tuple[str, str]:
    """Likewise, of a robot with three joints."""
    folder, found = tmp_path_factory.mktemp("other"), []
    for name, seeds in (("data", range(3)), ("rest", range(8, 10))):
        episodes = []
        for seed in seeds:
            episode = robot_episode(seed, 10)
            joints = np.random.default_rng(seed).uniform(-3, 3, (10, 3)).astype(np.float32)
            episodes.append(replace(episode, actions=joints, agent_pos=None, convention="own"))
        found.append(write_dataset(folder / name, episodes))
    return found[0], found[1]


def command(init: Path, folders: tuple[str, str], out: Path, **more) -> PosttrainCommand:
    sizes = {"batch_size": 2, "clip_length": 4, "decoder_steps": 0, "train": LOOP}
    named = {"init": str(init), "data": [folders[0]], "held_out": [folders[1]], "out": str(out)}
    return PosttrainCommand(**named | sizes | more)


@pytest.mark.parametrize("family", ["tiny_checkpoint", "tiny_diffusion"])
def test_a_model_goes_on_where_pretraining_stopped(family, bridge, tmp_path, request, capsys):
    source = request.getfixturevalue(family)
    found = run(command(source, bridge, tmp_path))
    said = capsys.readouterr().out
    before, after = (load_file(folder / "dynamics.safetensors") for folder in (source, tmp_path / "checkpoint"))
    silent = {name for name in before if name.startswith("contact_head")}  # nothing is said of contact here
    assert set(found["report"]["loaded"]) == before.keys() - silent and before.keys() == after.keys()
    assert set(found["report"]["new"]) == set(found["report"]["left"]) == silent and not found["report"]["resized"]
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(*(load_file(f / "tokenizer.safetensors")["position"] for f in (source, tmp_path / "checkpoint")))
    assert load_world_sim(tmp_path / "checkpoint").name == "checkpoint"  # the heads came along
    assert "calibration" not in read_config(tmp_path / "checkpoint")  # but not what they were set by
    (judged,) = found["held_out"]
    assert judged["episodes"] == 2 and judged["after_db"] == pytest.approx(judged["actions"]["true_db"], abs=1e-6)
    assert judged["copy_db"] == pytest.approx(judged["actions"]["copy_db"], abs=1e-6)
    assert "before_db" in judged and "ITS ACTIONS" in said.upper()
    assert json.loads((tmp_path / "posttrain.json").read_text()) == json.loads(json.dumps(found))
    assert decode_video(tmp_path / "before_after.0.mp4").shape == (18, 32, 4 * 32, 3)
    again = run(command(source, bridge, tmp_path))  # it is done
    assert again["held_out"] == found["held_out"]
    with pytest.raises(ValueError, match="other settings"):
        run(command(source, bridge, tmp_path, frame_size=48))
    load_world_model(tmp_path / "checkpoint")  # is as it was


def test_another_robot_gets_a_projection_and_bounds_of_its_own(tiny_checkpoint, other, tmp_path):
    found = run(command(tiny_checkpoint, other, tmp_path))
    assert {name.split(".")[0] for name in found["report"]["new"] + found["report"]["left"]} == NEW
    space = found["actions"]
    assert np.allclose(space["low"], -3, atol=0.6) and np.allclose(space["high"], 3, atol=0.6)
    assert space["travel_scale"] == () and "before_db" not in found["held_out"][0]
    model = load_world_model(tmp_path / "checkpoint", dtype=torch.float32)
    latents = torch.zeros(1, 1, *model.latent_shape)
    state, _, _ = model.step(model.start(latents, torch.zeros(1, 0, 3), [0]), torch.zeros(1, 3))
    assert state["previous_action"].shape == (1, 3)
    with pytest.raises(ValueError, match="Bridge's 7 action dimensions, got 3 of another robot"):
        load_world_sim(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="actions of 7 dimensions, got 3; choose actions=new"):
        run(command(tiny_checkpoint, other, tmp_path / "kept", actions="keep"))


def test_what_is_learnt_from_frames_alone_is_taught_actions_later(tiny_checkpoint, bridge, tmp_path):
    sizes = {"batch_size": 2, "clip_length": 5, "train": LOOP, "init": str(tiny_checkpoint)}
    blind = train(TrainCommand("dynamics", [bridge[0]], out=str(tmp_path / "blind"), action_free=True, **sizes))
    assert read_config(blind)["action_free"]
    with pytest.raises(ValueError, match="teach it actions with worldsim-posttrain"):
        load_world_sim(blind)
    found = run(command(blind, bridge, tmp_path / "taught"))
    assert {name.split(".")[0] for name in found["report"]["new"]} == NEW
    taught = tmp_path / "taught/checkpoint"
    assert len(found["actions"]["travel_scale"]) == 6 and "action_free" not in read_config(taught)
    assert load_dynamics(taught).config.actions.travel_dim == 6
    free = run(command(tiny_checkpoint, bridge, tmp_path / "free", actions="none"))
    assert "actions" not in free["held_out"][0] and read_config(tmp_path / "free/checkpoint")["action_free"]


def test_contact_is_forgotten_where_nothing_is_said_of_it(tiny_checkpoint, bridge, tmp_path):
    none = {"grasped": np.full(11, -1), "object_positions": np.zeros((11, 2, 3), np.float32)}
    told = [replace(robot_episode(seed, 10).resized(32, 32), labels=none) for seed in range(2)]
    folders = write_dataset(tmp_path / "told", told), bridge[1]
    new = {}
    for actions in ("keep", "none"):
        made = prepare(command(tiny_checkpoint, folders, tmp_path / actions, actions=actions))
        new[actions] = set(made.report.new)
    assert new == {"keep": set(), "none": {"contact_head.weight", "contact_head.bias"}}


def test_actions_that_are_hidden_teach_nothing(tiny_checkpoint, bridge, tmp_path):
    run(command(tiny_checkpoint, bridge, tmp_path, actions="none"))
    before, after = (load_file(f / "dynamics.safetensors") for f in (tiny_checkpoint, tmp_path / "checkpoint"))
    for name in before:
        decayed = torch.isclose(before[name], after[name], rtol=1e-2).all()  # by weight decay
        assert not name.startswith("embed_action") or decayed, name


def test_adapters_are_merged(tiny_checkpoint, bridge, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="train all weights"):
        run(command(tiny_checkpoint, bridge, tmp_path / "none", method="lora"))
    monkeypatch.setattr(lora, "SMALLEST", 16)
    fast = LOOP | {"learning_rate": 0.1}  # or else rounding outweighs what is learnt
    run(command(tiny_checkpoint, bridge, tmp_path / "lora", method="lora", rank=2, train=fast))
    before, after = (load_file(f / "dynamics.safetensors") for f in (tiny_checkpoint, tmp_path / "lora/checkpoint"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    changed = {name for name in changed if not name.startswith("contact_head")}
    assert changed and all(min(before[name].shape) >= 16 for name in changed)
    for name in changed:
        rank = torch.linalg.matrix_rank(after[name].float() - before[name].float(), rtol=0.05)
        assert rank <= 2, name


def test_frozen_parts_stay(tiny_checkpoint, bridge, tmp_path):
    run(command(tiny_checkpoint, bridge, tmp_path, freeze=["layers", "head"]))
    before, after = (load_file(f / "dynamics.safetensors") for f in (tiny_checkpoint, tmp_path / "checkpoint"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith(("layers", "head"))} <= same and "embed.weight" not in same
    kept = prepare(command(tiny_checkpoint, bridge, tmp_path / "b", freeze=["embed", "layers.0"])).model
    frozen = {name for name, parameter in kept.named_parameters() if not parameter.requires_grad}
    assert {name for name in before if name.startswith(("embed.", "layers.0."))} == frozen


def test_only_what_is_there_and_not_new_can_be_frozen(tiny_checkpoint, bridge, tmp_path):
    with pytest.raises(ValueError, match=r"parts of the network, .*embed_action.*got 'lay'"):
        prepare(command(tiny_checkpoint, bridge, tmp_path, freeze=["lay"]))
    with pytest.raises(ValueError, match="must not name what begins anew"):
        prepare(command(tiny_checkpoint, bridge, tmp_path, freeze=["embed_action"], actions="new"))


def test_adapters_leave_new_inner_parts_whole(tiny_diffusion, bridge, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "SMALLEST", 8)
    made = prepare(command(tiny_diffusion, bridge, tmp_path, method="lora", rank=2, text_encoder="bytes"))
    trained = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    new = set(made.report.new)
    assert new & trained == new & dict(made.model.named_parameters()).keys() and any(
        ".down" in name for name in trained
    )


def test_held_out_data_may_be_a_part_of_the_same_folder(tiny_checkpoint, bridge, tmp_path):
    parts = {"options": {"command_lag": 0}, "held_out_options": {"command_lag": 0}}
    with pytest.raises(ValueError, match="must not be trained on"):
        command(tiny_checkpoint, (bridge[0], bridge[0]), tmp_path, **parts)
    parts["held_out_options"] = {"command_lag": 1}
    given = command(tiny_checkpoint, (bridge[0], bridge[0]), tmp_path, num_judged=2, relabel=True, **parts)
    made = prepare(given)
    assert [episode["episode_id"] for episode in made.held_out[0].episodes] == ["episode 0", "episode 2"]
    found = {episode["convention"] for cache in [*made.caches, *made.held_out] for episode in cache.episodes}
    assert found == {"relabelled"}  # so that these lags go together


def test_data_of_one_name_are_not_taken_for_each_other(tiny_checkpoint, bridge, tmp_path):
    twin = write_dataset(tmp_path / "data", [robot_episode(seed, 6).resized(32, 32) for seed in range(2)])
    made = prepare(command(tiny_checkpoint, (bridge[0], twin), tmp_path / "out", caches=str(tmp_path / "shared")))
    assert [len(cache) for cache in (*made.caches, *made.held_out)] == [3, 2]
    assert len(list((tmp_path / "shared").glob("data.*.cache"))) == 2


def test_an_episode_of_one_frame_is_not_judged(tiny_checkpoint, bridge, tmp_path):
    whole = robot_episode(4, 6).resized(32, 32)
    short = replace(whole, frames=whole.frames[:1], actions=whole.actions[:0], agent_pos=whole.agent_pos[:1])
    rest = write_dataset(tmp_path / "rest", [short, whole])
    assert [len(cache) for cache in prepare(command(tiny_checkpoint, (bridge[0], rest), tmp_path / "a")).held_out] == [
        1
    ]
    alone = write_dataset(tmp_path / "alone", [short])
    with pytest.raises(ValueError, match="two or more frames"):
        prepare(command(tiny_checkpoint, (bridge[0], alone), tmp_path / "b"))


def test_larger_frames_and_text(tiny_checkpoint, bridge, tmp_path):
    found = run(command(tiny_checkpoint, bridge, tmp_path, frame_size=48, text_encoder="bytes"))
    assert "embed_text.weight" in found["report"]["new"] and found["report"]["resized"] == ("position",)
    model = load_world_model(tmp_path / "checkpoint", dtype=torch.float32)
    assert model.frame_shape == (48, 48, 3) and model.latent_shape[:2] == (3, 3)
    latents, nothing = torch.zeros(2, 1, *model.latent_shape), torch.zeros(2, 0, 7)
    state = model.start(latents, nothing, [0, 0], ["push", "pull"])
    assert not torch.equal(*state["text"])
    assert "heads" not in read_config(tmp_path / "checkpoint")  # which read latents of another shape


def test_the_decoder_learns_how_the_data_look(tiny_checkpoint, filmed, tmp_path):
    cameras = ["observation.images.wrist"]
    run(command(tiny_checkpoint, filmed, tmp_path, cameras=cameras, decoder_steps=30))
    before, after = (load_patch_tokenizer(folder) for folder in (tiny_checkpoint, tmp_path / "checkpoint"))
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(value, after.encoder.state_dict()[name])
    (cache,) = open_caches([filmed[1]], frame_shape=(32, 32, 3), beside=tmp_path / "caches", cameras=cameras)
    frames, first = (to_float(torch.from_numpy(np.array(cache.frames[rows]))) for rows in (slice(1, 8), slice(0, 1)))
    first = first.expand_as(frames)
    with torch.no_grad():
        errors = [
            (each.decode(each.encode(frames), first, each.encode(first)) - frames).square().mean()
            for each in (before, after)
        ]
    assert errors[1] < 0.7 * errors[0]


def test_what_does_not_go_together_is_said(tiny_checkpoint, tiny_transformer, bridge, tmp_path):
    late = write_dataset(tmp_path / "late", [replace(robot_episode(5, 8), command_lag=1)])
    with pytest.raises(ValueError, match=r"one action convention and command lag.*relabel=true"):
        run(command(tiny_checkpoint, (bridge[0], late), tmp_path / "a"))
    with pytest.raises(ValueError, match="held_out must not be trained on"):
        command(tiny_checkpoint, (bridge[0], bridge[0]), tmp_path)
    with pytest.raises(ValueError, match="of kind autoregressive or diffusion, got 'transformer'"):
        run(command(tiny_transformer, bridge, tmp_path / "b"))
    for wrong in ({"method": "some"}, {"actions": "all"}, {"device": "tpu"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
            command(tiny_checkpoint, bridge, tmp_path, **wrong)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    write_config(damaged, {"tokenizer": {}})
    with pytest.raises(ValueError, match="got ''"):
        run(command(damaged, bridge, tmp_path / "c"))


@pytest.fixture(scope="module")
def filmed(tmp_path_factory) -> tuple[str, str]:
    """Folders of episodes that two cameras have filmed, of which one moves."""
    folder = tmp_path_factory.mktemp("filmed")
    return (
        write_dataset(folder / "data", [filmed_episode(seed) for seed in range(3)]),
        write_dataset(folder / "rest", [filmed_episode(seed) for seed in range(8, 10)]),
    )


def test_views_are_imagined_together(tiny_checkpoint, filmed, tmp_path):
    cameras = ["observation.images.image_0", "observation.images.wrist"]
    found = run(command(tiny_checkpoint, filmed, tmp_path, cameras=cameras))
    assert "embed_camera" in found["report"]["new"] and "before_db" not in found["held_out"][0]
    model = load_world_model(tmp_path / "checkpoint", dtype=torch.float32)
    assert model.frame_shape == (64, 32, 3) and model.latent_shape == (4, 2, 3)
    assert "heads" not in read_config(tmp_path / "checkpoint")
    (cache,) = open_caches([filmed[1]], frame_shape=(32, 32, 3), beside=tmp_path / "caches", cameras=cameras)
    frames = torch.from_numpy(np.array(cache.frames[:1]))[None]
    np.testing.assert_array_equal(frames[0, 0, 32:], frames[0, 0, :32].flip(1))
    latents = model.encode(frames)
    alone = load_world_model(tiny_checkpoint, dtype=torch.float32)
    for view in (0, 1):
        mine = frames[:, :, 32 * view : 32 * view + 32]
        own = alone.encode(mine)
        torch.testing.assert_close(own, latents[:, :, 2 * view : 2 * view + 2])
        drawn = alone.decode(own[:, 0], Reference(mine[:, 0], own[:, 0]))
        together = model.decode(latents[:, 0], Reference(frames[:, 0], latents[:, 0]))
        apart = together[:, 32 * view : 32 * view + 32].int() - drawn
        assert apart.abs().max() <= 1  # of rounding in batches of another size
    state, ahead, _ = model.step(model.start(latents, torch.zeros(1, 0, 7), [0]), torch.zeros(1, 7))
    assert ahead.shape == (1, 4, 2, 3) and state["tokens"].shape == (1, 8, 3)


def test_a_model_is_told_from_where_frames_are_seen(tiny_checkpoint, filmed, bridge, tmp_path):
    found = run(command(tiny_checkpoint, filmed, tmp_path, rays=True))
    assert "embed_rays.weight" in found["report"]["new"]
    weights = load_file(tmp_path / "checkpoint" / "dynamics.safetensors")
    assert weights["embed_rays.weight"].any()  # it was told, and has learnt something of it
    with pytest.raises(ValueError, match=r"rays need recordings|camera.third_person"):
        run(command(tiny_checkpoint, bridge, tmp_path / "still", rays=True))


def test_only_the_autoregressive_family_sees_with_several_eyes(tiny_diffusion, filmed, tmp_path):
    with pytest.raises(ValueError, match="need init of kind autoregressive, got another"):
        run(command(tiny_diffusion, filmed, tmp_path, rays=True))


def test_videos_are_seen_as_often_as_data_and_say_nothing_of_actions(tiny_checkpoint, bridge, tmp_path):
    more = write_dataset(tmp_path / "more", [robot_episode(seed, 20).resized(32, 32) for seed in range(20, 26)])
    given = command(tiny_checkpoint, bridge, tmp_path / "out", videos=[more])
    made = prepare(given)
    drawn = [made.batches(step) for step in range(60)]
    known = torch.cat([batch["action"].isfinite().all(dim=-1) for batch in drawn])
    assert (known.all(dim=1) | ~known.any(dim=1)).all()  # a clip is of one or of the other
    assert 0.35 < known.all(dim=1).float().mean() < 0.65
    run(given)
    with pytest.raises(ValueError, match="must have actions"):
        run(command(tiny_checkpoint, (str(_film(tmp_path)), bridge[1]), tmp_path / "b"))


def _film(folder: Path) -> Path:
    """A folder with a video and nothing else."""
    (folder / "film").mkdir()
    (folder / "film" / "a.mp4").write_bytes(encode_video(robot_episode(3, 10).frames, fps=5))
    return folder / "film"
