"""The three stages on a tiny synthetic cache: what is refused, what is written, what a kill changes (nothing)."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks import REWARD_TERMS, TASKS
from wfm_core.batches import DynamicsBatches
from wfm_core.checkpoint import (
    build_config,
    copy_part,
    load_patch_tokenizer,
    load_tokenizer,
    load_world_model,
    read_config,
    save_weights,
    write_config,
)
from wfm_core.data import open_dataset
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.data.video import encode_video
from wfm_core.data.video_folder import VideoFolderReader
from wfm_core.encoding import encode_cache
from wfm_core.models.motion import Contact
from wfm_core.models.transformer_config import TransformerConfig, count_parameters
from wfm_core.rollouts import imagine_cache
from wfm_core.tokenizers.video import VideoTokenizer
from wfm_core.world_model import Reference
from worldsim import dynamics_data
from worldsim.caches import open_caches
from worldsim.commands.record import RecordConfig
from worldsim.commands.record import run as run_record
from worldsim.commands.train import run
from worldsim.heads_data import HeadsBatches
from worldsim.simulator import load_world_sim
from worldsim.training import TrainCommand, prepare
from worldsim.uncertainty import episode_limit

INSTRUCTION = next(iter(TASKS.values())).instruction
VIDEO_TOKENIZER = {
    "kind": "video", "space_factor": 8, "time_factor": 4, "dims": [8, 8], "num_blocks": 1, "num_heads": 2, "window": 2,
}  # fmt: skip
LOOP = {"num_steps": 4, "checkpoint_every": 2, "log_every": 1, "warmup_steps": 1, "bf16": False}
SIZES = {
    "tokenizer": {
        "image_size": 32, "levels": [5, 4, 3], "encoder_dim": 16, "encoder_blocks": 1, "decoder_dims": [8, 8, 8],
        "decoder_blocks": [1, 1, 1],
    },
    "dynamics": {
        "width": 16, "num_heads": 2, "num_layers": 2, "time_layers": [1], "refiner_layers": 1, "window": 3,
    },
    "heads": {"width": 16, "num_heads": 2, "num_layers": 1},
}  # fmt: skip
TRANSFORMER = {
    "kind": "transformer", "groups": 1, "width": 24, "head_dim": 6, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "ffn_dim": 16, "window": 3,
}  # fmt: skip


DIFFUSION = {
    "kind": "diffusion", "width": 24, "head_dim": 6, "num_layers": 2, "num_heads": 2, "ffn_ratio": 2, "adaln_rank": 4,
    "window": 3, "num_steps": 2,
}  # fmt: skip


def make_episode(index: int) -> Episode:
    rng = np.random.default_rng(index)
    success = np.arange(12) >= (8 if index % 2 else 12)
    return Episode(
        frames=rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8),
        actions=rng.uniform(-0.05, 0.05, (11, 7)).astype(np.float32),
        agent_pos=rng.normal(size=(12, 7)).astype(np.float32),
        instruction=INSTRUCTION,
        episode_id=str(index),
        convention="commanded",
        command_lag=0,
        labels={f"reward.{term}": success.astype(np.float32) for term in REWARD_TERMS}
        | {
            "success": success,
            "failure": np.zeros(12, dtype=bool),
            "grasped": np.full(12, -1),
            "object_positions": np.zeros((12, 6), dtype=np.float32),
        },
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data") / "demos"
    build_clip_cache(map(make_episode, range(4)), folder.with_name("demos.cache"))
    return [str(folder)]


def command(stage: str, data: list[str], out, **changes) -> TrainCommand:
    fields = {
        "stage": stage, "data": data, "out": str(out), "batch_size": 4, "clip_length": 5, "train": LOOP,
        stage: SIZES.get(stage, {}), "held_out": data if stage == "heads" else [],
    }  # fmt: skip
    return TrainCommand(**fields | changes)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    for stage in SIZES:
        assert run(command(stage, data, out)) == out / "checkpoint"
    return out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"stage": "reward", "data": ["a"]},
            r"stage must be one of \('tokenizer', 'dynamics', 'heads', 'decoder', 'ensemble'\), got 'reward'",
        ),
        ({"stage": "tokenizer"}, "data must name at least one data set"),
        ({"stage": "heads", "data": ["a"]}, r"stage=heads needs held_out"),
        ({"stage": "ensemble", "members": ["a", "a"]}, r"stage=ensemble needs held_out"),
        ({"stage": "ensemble", "members": ["a"]}, r"needs members=\[...\], two or more, .* got \['a'\]"),
        ({"stage": "ensemble", "members": ["a", "a"], "dry_run": True}, "trains nothing, got dry_run=true"),
        ({"stage": "heads", "data": ["a"], "members": ["a"]}, "belong to stage=ensemble, got stage=heads"),
        ({"stage": "dynamics", "augmented": ["x"]}, r"augmented=\[...\] needs stage=tokenizer, got 'dynamics'"),
        ({"stage": "dynamics", "data": ["a"], "imagined": ["a"]}, r"imagined=\[...\] needs init=<checkpoint>"),
        ({"stage": "dynamics", "data": ["a"], "dynamics": {"kind": "mamba"}}, "dynamics.kind must be .*, got 'mamba'"),
        ({"stage": "tokenizer", "data": ["a"], "device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu'"),
        (
            {"stage": "dynamics", "data": ["a"], "imagined": ["a"], "dynamics": {"kind": "transformer"}, "init": "b"},
            r"needs dynamics.kind to be one of \('autoregressive', 'diffusion'\), got 'transformer'",
        ),
        (
            {"stage": "dynamics", "data": ["a"], "imagined": ["a"], "dynamics": {"kind": "irasim"}, "init": "b"},
            r"got 'irasim'",
        ),
    ],
)
def test_commands_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainCommand(**fields)


@pytest.mark.parametrize("stage", ["dynamics", "heads"])
def test_a_stage_needs_the_one_before(data, tmp_path, stage):
    with pytest.raises(ValueError, match="checkpoint.*config.json"):
        run(command(stage, data, tmp_path))


@pytest.mark.parametrize("part", ["tokenizer", "train"])
def test_misspelt_settings_are_named(data, tmp_path, part):
    with pytest.raises(ValueError, match=f"{part}.*does not fit.*'widht'"):
        run(command("tokenizer", data, tmp_path, **{part: {"widht": 3}}))
    assert not (tmp_path / "checkpoint").exists()


def test_the_cache_beside_a_data_set_is_used(data):
    (cache,) = open_caches(data)
    assert cache.directory.name == "demos.cache" and len(cache) == 4
    assert open_caches([data[0] + "/"])[0].directory == cache.directory


def test_three_stages_make_a_simulator(trained, data, capsys):
    config = read_config(trained / "checkpoint")
    assert config["kind"] == "autoregressive" and set(config["calibration"]) == {
        "success_threshold", "failure_threshold", "uncertainty_limit", "success_thresholds"
    }  # fmt: skip
    assert config["dynamics"]["levels"] == [5, 4, 3] and config["dynamics"]["grid"] == 2
    assert config["heads"]["latent_shape"] == [2, 2, 3] and INSTRUCTION in config["heads"]["instructions"]
    sim = load_world_sim(trained / "checkpoint")
    clip = open_caches(data)[0].clip(0, 0, 2)
    state = sim.start(clip["frames"][None].copy(), clip["agent_pos"][None], clip["actions"][None, :1], INSTRUCTION, [0])
    _, step = sim.step(state, torch.from_numpy(clip["actions"][1:]))
    assert 0 <= step.uncertainty.item() <= 1
    for stage in SIZES:
        weights = load_file(trained / "checkpoint" / f"{stage}.safetensors")
        average = load_file(trained / stage / "state.safetensors")
        assert all(torch.equal(value, average[f"ema.{name}"].half()) for name, value in weights.items())
        assert len((trained / stage / "metrics.jsonl").read_text().splitlines()) == 4
    again = run(command("heads", data, trained))  # done already: nothing is trained, the checkpoint says where it is
    assert f"checkpoint in {again}" in capsys.readouterr().out and read_config(again) == config


def test_a_killed_stage_ends_with_the_same_weights(trained, data, tmp_path, monkeypatch):
    run(command("tokenizer", data, tmp_path))
    call = DynamicsBatches.__call__

    def killed(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return call(self, step)

    monkeypatch.setattr(DynamicsBatches, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        run(command("dynamics", data, tmp_path))
    assert not (tmp_path / "checkpoint" / "dynamics.safetensors").exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"other settings \(seed=0, now 7\); use a new run directory"):
        run(command("dynamics", data, tmp_path, seed=7))
    run(command("dynamics", data, tmp_path))
    for part in ("tokenizer", "dynamics"):
        name = f"{part}.safetensors"
        assert (tmp_path / "checkpoint" / name).read_bytes() == (trained / "checkpoint" / name).read_bytes()


def test_init_and_freeze(trained, data, tmp_path):
    frozen = command("tokenizer", data, tmp_path, init=str(trained / "checkpoint"), freeze=["encoder"], seed=5)
    run(frozen)
    before = load_file(trained / "checkpoint" / "tokenizer.safetensors")
    after = load_file(tmp_path / "checkpoint" / "tokenizer.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("encoder.") for name in changed)
    differences = [(before[name] - after[name]).abs().max() for name in changed]
    assert max(differences) < 0.1  # it began where the other ended


def test_the_seed_shapes_the_weights(trained, data, tmp_path):
    run(command("tokenizer", data, tmp_path, seed=1))
    before = load_file(trained / "checkpoint" / "tokenizer.safetensors")
    after = load_file(tmp_path / "checkpoint" / "tokenizer.safetensors")
    assert not torch.allclose(before["encoder.0.weight"], after["encoder.0.weight"])


def test_the_heads_can_also_learn_from_what_the_dynamics_imagine(trained, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(trained / "checkpoint", out / "checkpoint")
    seen = []
    make = HeadsBatches.__init__

    def watched(self, heads, codec, caches, tokens, batch_size, seed):
        seen.extend(zip(caches, tokens, strict=True))
        make(self, heads, codec, caches, tokens, batch_size, seed)

    monkeypatch.setattr(HeadsBatches, "__init__", watched)
    run(command("heads", data, out, imagined=data))
    (first, real), (again, imagined) = seen
    assert first.directory == again.directory and real.shape == imagined.shape
    np.testing.assert_array_equal(real[first.starts], imagined[first.starts])
    assert (real != imagined).any()


def test_the_transformer_is_trained_in_stages(trained, data, tmp_path):
    """Short clips, longer ones, then text and single frames: each goes on from the one before, the first from none."""
    tokenizer = tmp_path / "only_a_tokenizer"
    copy_part(trained / "checkpoint", tokenizer, "tokenizer")
    stages = {
        "short": {"init": str(tokenizer), "dynamics": TRANSFORMER},
        "long": {"clip_length": 8, "dynamics": {"rope": {"extension": 2.0}}},
        "text": {"clip_length": 8, "image_every": 2, "dynamics": {"text_encoder": "bytes", "num_draft_heads": 1}},
    }
    before = None
    for name, changes in stages.items():
        from_before = {} if before is None else {"init": str(before)}
        before = run(command("dynamics", data, tmp_path / name, **{"clip_length": 4} | changes | from_before))
    configs = [read_config(tmp_path / name / "checkpoint") for name in stages]
    assert [config["kind"] for config in configs] == ["transformer"] * 3
    assert configs[0]["dynamics"]["levels"] == [5, 4, 3] and configs[0]["dynamics"]["grid"] == [2, 2]
    ropes = [config["dynamics"]["rope"] for config in configs]
    assert [(rope["trained_frames"], rope["extension"]) for rope in ropes] == [(4, 1.0), (4, 2.0), (4, 2.0)]
    assert configs[2]["dynamics"]["text_dim"] == 256 and configs[0]["tokenizer"] == configs[2]["tokenizer"]
    weights = [load_file(tmp_path / name / "checkpoint" / "dynamics.safetensors") for name in stages]
    new = weights[2].keys() - weights[1].keys()
    assert any("text_attention" in name for name in new) and "draft_heads.0.weight" in new
    assert all("text" in name or "draft_heads" in name for name in new)
    for one, other in ((0, 1), (1, 2)):  # a few small steps away
        steps = [(weights[one][name] - weights[other][name]).abs().max() for name in weights[one]]
        assert 0 < max(steps) < 0.02

    run(command("heads", data, tmp_path / "text"))
    sim = load_world_sim(tmp_path / "text" / "checkpoint")
    clip = open_caches(data)[0].clip(0, 0, 2)
    state = sim.start(clip["frames"][None].copy(), clip["agent_pos"][None], clip["actions"][None, :1], INSTRUCTION, [0])
    assert "text_bias" in state.model
    _, step = sim.step(state, torch.from_numpy(clip["actions"][1:]))
    assert 0 <= step.uncertainty.item() <= 1


def test_diffusion_is_trained_over_continuous_latents(trained, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "clips"
    run(command("tokenizer", data, out, tokenizer=SIZES["tokenizer"] | {"levels": [], "latent_dim": 3}))
    checkpoint = run(command("dynamics", data, out, dynamics=DIFFUSION))
    config = read_config(checkpoint)
    assert config["kind"] == "diffusion" and config["dynamics"]["grid"] == [2, 2]
    assert config["dynamics"]["latent_dim"] == 3 and config["dynamics"]["rope"]["trained_frames"] == 5
    (cache,) = open_caches(data)
    latents = encode_cache(load_patch_tokenizer(checkpoint, discrete=False), cache).astype(np.float64)
    np.testing.assert_allclose(config["dynamics"]["latent_mean"], latents.mean(axis=(0, 1, 2)))
    model = load_world_model(checkpoint)
    first = torch.from_numpy(latents[:2, None]).float()
    _, made, _ = model.step(model.start(first, torch.zeros(2, 0, 7), [0, 1]), torch.zeros(2, 7))
    assert made.shape == (2, 2, 2, 3) and made.isfinite().all()
    run(command("heads", data, out, imagined=data))
    assert load_world_sim(checkpoint).heads.config.latent_shape == (2, 2, 3)

    # Weights go on with the normalisation they have learnt, whatever the data; text and single frames come later.
    mean = [0.5, 0.25, 0.125]
    write_config(checkpoint, config | {"dynamics": config["dynamics"] | {"latent_mean": mean}})
    more = {"init": str(checkpoint), "image_every": 2}
    again = run(command("dynamics", data, tmp_path / "again", dynamics=DIFFUSION, **more))
    assert read_config(again)["dynamics"]["latent_mean"] == mean
    forced = run(command("dynamics", data, tmp_path / "forced", dynamics=DIFFUSION, imagined=data, **more))
    assert list(cache.directory.glob("imagined.*.npy"))
    both = [load_file(folder / "dynamics.safetensors") for folder in (again, forced)]
    assert any(not torch.equal(both[0][name], both[1][name]) for name in both[0])
    quick = {"formulation": "flow", "sampler": "euler", "shortcut": 0.5}
    student = TrainCommand("dynamics", data, init=str(again), clip_length=5, dynamics=DIFFUSION | quick)
    part = prepare(student, tmp_path / "student").part
    torch.manual_seed(0)
    batch = {"latents": torch.rand(2, 5, 2, 2, 3), "action": torch.zeros(2, 5, 7), "seed": torch.tensor(0)}
    monkeypatch.setattr(dynamics_data, "watched_cells", lambda cache, grid: np.ones((len(cache.frames), grid**2), bool))
    watched = prepare(student, tmp_path / "student").batches(0)["watched"]
    assert watched.shape == (16, 5, 2, 2) and watched.all()
    teacher = prepare(replace(student, dynamics=DIFFUSION | quick | {"shortcut": 0.0}), tmp_path / "teacher").part
    for model in (part, teacher):  # at first it knows no step from another
        monkeypatch.setattr(model, "_draw", lambda target, seed, draw=teacher._draw: draw(target, seed))
    assert part(batch)[1]["error"] == teacher(batch)[1]["error"]
    told = DIFFUSION | {"text_encoder": "bytes"}
    texts = run(command("dynamics", data, tmp_path / "texts", dynamics=told, **more))
    assert read_config(texts)["dynamics"]["text_dim"] == 256
    weights = [load_file(folder / "dynamics.safetensors") for folder in (again, texts)]
    new = weights[1].keys() - weights[0].keys()
    assert new and all("context" in name for name in new)

    with pytest.raises(ValueError, match="trained with other settings .*num_steps=4, now 5"):
        run(command("dynamics", data, out, dynamics=DIFFUSION, train=LOOP | {"num_steps": 5}))
    capsys.readouterr()
    run(TrainCommand("dynamics", out=str(out), dry_run=True, dynamics=DIFFUSION, clip_length=5, train=LOOP))
    count, _, flops = capsys.readouterr().out.splitlines()
    total = sum(value.numel() for value in load_file(checkpoint / "dynamics.safetensors").values())
    assert count == f"{total:,} parameters" and "floating-point operations a step" in flops
    run(TrainCommand("dynamics", out=str(tmp_path / "none"), dry_run=True, dynamics={"kind": "diffusion"}))
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="needs a continuous tokenizer, got DI16x16 patch"):
        run(command("dynamics", data, trained, dynamics=DIFFUSION))


def test_the_baseline_is_trained_like_the_others_and_rolled_out_clip_by_clip(trained, data, tmp_path):
    run(command("tokenizer", data, tmp_path, tokenizer=SIZES["tokenizer"] | {"levels": [], "latent_dim": 3}))
    sizes = {"kind": "irasim", "width": 24, "num_layers": 2, "num_heads": 2, "num_steps": 2}
    checkpoint = run(command("dynamics", data, tmp_path, dynamics=sizes))
    config = read_config(checkpoint)["dynamics"]
    assert (config["num_frames"], config["grid"], config["latent_dim"]) == (5, [2, 2], 3)
    (cache,) = open_caches(data)
    codec, real = load_patch_tokenizer(checkpoint).codec, encode_cache(load_patch_tokenizer(checkpoint), cache)
    np.testing.assert_allclose(config["latent_std"], real.astype(np.float64).std(axis=(0, 1, 2)))
    model = load_world_model(checkpoint)
    rolled, doubts = imagine_cache(model, codec, cache, real, chunk=4)
    assert rolled.shape == real.shape and [len(each) for each in doubts] == (cache.lengths - 1).tolist()
    start, length = cache.starts[1], cache.lengths[1]
    state = model.start(codec.unpack(real[[[start]]]), torch.zeros(1, 0, 7), [1])
    for t in range(1, length, 4):
        count = min(4, length - t)
        actions = torch.from_numpy(cache.columns["actions"][start + t - 1 :][:count])
        state, latents, _ = model.step_chunk(state, actions[None])
        np.testing.assert_allclose(rolled[start + t :][:count], codec.pack(latents[0]), atol=2e-2)
    token_by_token = load_world_model(trained / "checkpoint")
    with pytest.raises(ValueError, match="chunk=4 needs a world model of latents, got TokenWorldModel"):
        imagine_cache(token_by_token, codec, cache, real, chunk=4)


@pytest.mark.parametrize(
    ("dynamics", "message"),
    [
        ({"preset": "giant"}, r"preset must be one of \['nano', .*'13b'\], got 'giant'"),
        ({"groups": 2}, r"groups must split the tokenizer's levels \[5, 4, 3\] into equal tokens, got 2"),
        ({"widht": 3}, "dynamics.*does not fit.*'widht'"),
    ],
)
def test_transformers_that_cannot_be_are_named(trained, data, tmp_path, dynamics, message):
    shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=message):
        run(command("dynamics", data, tmp_path, dynamics=TRANSFORMER | dynamics))


def test_a_clip_shows_what_comes_next(tmp_path):
    with pytest.raises(ValueError, match="clip_length must be at least 2, a frame and the next, got 1"):
        run(TrainCommand("dynamics", out=str(tmp_path), dry_run=True, dynamics=TRANSFORMER, clip_length=1))


def test_weights_of_another_model_are_no_beginning(trained, data, tmp_path):
    with pytest.raises(ValueError, match=r"dynamics\.safetensors does not fit"):
        run(command("dynamics", data, tmp_path, dynamics=TRANSFORMER, init=str(trained / "checkpoint")))


def test_a_dry_run_tells_what_a_run_would_take_and_does_nothing(trained, tmp_path, capsys):
    dynamics = {"kind": "transformer", "preset": "4b"}
    out = tmp_path / "none"  # as yet there is no tokenizer either
    run(TrainCommand("dynamics", out=str(out), dry_run=True, dynamics=dynamics, clip_length=5, train=LOOP))
    count, memory, flops = capsys.readouterr().out.splitlines()
    assert count == "4,047,675,392 parameters" and memory.startswith("memory in GiB: weights 15.08, gradients 15.08")
    assert "floating-point operations a step" in flops and not out.exists()
    shutil.copytree(trained / "checkpoint", out / "checkpoint")  # now the dynamics follows its grid and levels
    run(TrainCommand("dynamics", out=str(out), dry_run=True, dynamics=TRANSFORMER, clip_length=5, train=LOOP))
    config = build_config(TransformerConfig, TRANSFORMER | {"grid": [2, 2], "levels": [5, 4, 3]}, out)
    assert capsys.readouterr().out.startswith(f"{count_parameters(config):,} parameters\n")


def test_a_dry_run_of_the_other_parts_counts_what_is_there(trained, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    for stage in SIZES:
        run(TrainCommand(stage, out=str(out), held_out=["a"], dry_run=True, **{stage: SIZES[stage]}))
        count, memory, rest = capsys.readouterr().out.splitlines()
        weights = load_file(out / stage / "state.safetensors")
        total = sum(value.numel() for name, value in weights.items() if name.startswith("model."))
        assert count == f"{total:,} parameters" and "estimated for dynamics.kind=transformer and diffusion only" in rest


def test_the_dynamics_can_also_learn_to_come_back_from_what_others_imagined(trained, data, tmp_path, monkeypatch):
    shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint")
    made = {}
    make = DynamicsBatches.__init__

    def watched(self, caches, tokens, **settings):
        made.update(settings, tokens=tokens)
        make(self, caches, tokens, **settings)

    monkeypatch.setattr(DynamicsBatches, "__init__", watched)
    run(command("dynamics", data, tmp_path, imagined=data, init=str(trained / "checkpoint")))
    filmed, imagined = made["imagined"]
    np.testing.assert_array_equal(*made["tokens"])
    assert filmed is None and imagined.shape == made["tokens"][0].shape
    assert (imagined != made["tokens"][0]).any() and [len(cells) for cells in made["watched"]] == [len(imagined)] * 2
    assert [Contact.UNKNOWN in contact for contact in made["contact"]] == [False] * 2


def logged(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_video_tokenizer_trains_in_two_stages(data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    checkpoint = run(command("tokenizer", data, first, tokenizer=VIDEO_TOKENIZER))
    tokenizer = load_tokenizer(checkpoint)
    assert isinstance(tokenizer, VideoTokenizer) and tokenizer.config.name == "CV4x8x8"
    average = load_file(first / "tokenizer" / "state.safetensors")
    for name, value in load_file(checkpoint / "tokenizer.safetensors").items():
        assert torch.equal(value, average[f"ema.tokenizer.{name}"].half())
    assert not any("flow" in row for row in logged(first / "tokenizer"))

    both = {"gram_weight": 0.1, "flow_weight": 0.01}
    settings = {"tokenizer": VIDEO_TOKENIZER, "objective": both, "init": str(checkpoint), "augmented": data}
    run(command("tokenizer", data, second, **settings))
    before, after = (load_file(out / "checkpoint" / "tokenizer.safetensors") for out in (first, second))
    differences = [(before[name] - after[name]).abs().max() for name in before]
    assert 0 < max(differences) < 0.1  # it began where the first ended
    rows = logged(second / "tokenizer")
    assert ["flow" in row for row in rows] == [False, True, False, True]  # images and videos in turn
    assert rows[1]["loss"] == pytest.approx(
        rows[1]["l1"] + 0.1 * rows[1]["perceptual"] + 0.1 * rows[1]["gram"] + 0.01 * rows[1]["flow"], rel=1e-4
    )
    for changed in ({"objective": {}}, {"image_every": 0}, {"augmented_fraction": 0.5}):
        with pytest.raises(ValueError, match=rf"other settings \({next(iter(changed))}=.*, now"):
            run(command("tokenizer", data, second, **settings | changed))
    with pytest.raises(ValueError, match="needs a tokenizer of kind 'patch', got CV4x8x8"):
        run(command("dynamics", data, first))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_length": 6}, r"CV4x8x8 needs 1 \+ a multiple of 4 frames at the beginning, got 6"),
        ({"clip_length": 13}, r"demos.cache: clip_length must be at most 12, its longest episode, got 13"),
        ({"tokenizer": VIDEO_TOKENIZER | {"space_factor": 16}}, "dims must have 3 entries"),
        ({"tokenizer": {"kind": "vidoe"}}, r"kind must be one of \['patch', 'video'\], got 'vidoe'"),
        ({"objective": {"gram": 1.0}}, "objective.*does not fit.*'gram'"),
        ({"objective": {"feature_network": "vgg"}}, "'gabor'.*got 'vgg'"),
        (
            {"tokenizer": SIZES["tokenizer"], "objective": {"gram_weight": 1.0}},
            r"objective needs tokenizer\.kind=video, got 'patch'",
        ),
    ],
)
def test_video_tokenizers_that_cannot_work_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(command("tokenizer", data, tmp_path, **{"tokenizer": VIDEO_TOKENIZER} | changes))
    assert not (tmp_path / "checkpoint").exists()


def test_plain_videos_teach_a_tokenizer_and_nothing_else(data, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(encode_video(make_episode(0).frames, fps=15))
    build_clip_cache(VideoFolderReader(folder, size=20), tmp_path / "videos.cache")
    with pytest.raises(ValueError, match=r"CV4x8x8 needs sides that are multiples of 8, got \(20, 20\)"):
        run(command("tokenizer", [str(folder)], tmp_path / "run", tokenizer=VIDEO_TOKENIZER))
    with pytest.raises(
        ValueError, match=r"videos.cache: frames must be \(32, 32\) as in .*demos.cache, got \(20, 20\)"
    ):
        run(command("tokenizer", [*data, str(folder)], tmp_path / "run", tokenizer=VIDEO_TOKENIZER))
    shutil.rmtree(tmp_path / "videos.cache")
    build_clip_cache(VideoFolderReader(folder, size=32), tmp_path / "videos.cache")
    run(command("tokenizer", [*data, str(folder)], tmp_path / "run", tokenizer=VIDEO_TOKENIZER))
    for stage, changes in (
        ("dynamics", {"data": [*data, str(folder)]}),
        ("heads", {"held_out": [str(folder)]}),
        ("heads", {"imagined": [str(folder)]}),
    ):
        with pytest.raises(ValueError, match=r"videos\.cache: must have actions, got frames only"):
            run(command(stage, **{"data": data, "out": tmp_path / "run"} | changes))


def test_a_data_set_that_changed_is_not_taken_for_what_was_cached(tmp_path):
    folder = tmp_path / "set"
    run_record(RecordConfig(out=str(folder), tasks=["reach_target"], num_episodes=1, workers=0, still_steps=1))
    (cache,) = open_caches([str(folder)])
    assert len(open_caches([str(folder)])[0].frames) == len(cache.frames)
    table = next(folder.rglob("*.parquet"))
    table.write_bytes(table.read_bytes() + b"more")
    with pytest.raises(ValueError, match=rf"{folder} must be as when .*set.cache was built, but has changed; delete"):
        open_caches([str(folder)])
    shutil.rmtree(folder)
    assert len(open_caches([str(folder)])[0]) == 1  # a cache does without its data set


def test_caches_of_two_cameras_have_the_same_rows(tmp_path):
    folder = tmp_path / "set"
    cameras = ["third_person", "wrist"]
    run_record(
        RecordConfig(out=str(folder), tasks=["reach_target"], num_episodes=2, workers=0, still_steps=1, cameras=cameras)
    )
    (seen,), (wrist,) = open_caches([str(folder)]), open_caches([str(folder)], cameras=["observation.images.wrist"])
    assert (seen.directory.name, wrist.directory.name) == ("set.cache", "set.wrist.cache")
    assert seen.episodes == wrist.episodes and seen.lengths.tolist() == wrist.lengths.tolist()
    assert seen.columns.keys() == wrist.columns.keys() >= {"camera.third_person", "camera.wrist", "focal.wrist"}
    for name, column in seen.columns.items():
        np.testing.assert_array_equal(column, wrist.columns[name])
    assert seen.frames.shape == wrist.frames.shape and np.abs(seen.frames.astype(int) - wrist.frames).mean() > 10
    episodes = open_dataset(folder, camera="observation.images.wrist")
    np.testing.assert_array_equal(wrist.frames, np.concatenate([episode.frames for episode in episodes]))
    with pytest.raises(ValueError, match=r"camera must be one of .*image_0.*wrist.*got 'elbow'"):
        open_caches([str(folder)], cameras=["elbow"])


def test_a_diffusion_decoder_is_trained_on_tokens_and_the_latents_of_another_tokenizer(trained, data, tmp_path):
    continuous = SIZES["tokenizer"] | {"levels": [], "latent_dim": 4}
    aims_at = run(command("tokenizer", data, tmp_path / "continuous", tokenizer=continuous))
    out = tmp_path / "sharp"
    shutil.copytree(trained / "checkpoint", out / "checkpoint")
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "latents_of": str(aims_at)}
    checkpoint = run(command("decoder", data, out, decoder=sizes))
    config = read_config(checkpoint)
    assert {**config["decoder"], "latent_mean": (), "latent_std": ()} == {
        "code_dim": 3, "latents_of": str(aims_at), "latent_dim": 4, "grid": [2, 2], "latent_mean": (), "latent_std": (),
        "width": 16, "num_layers": 1, "num_heads": 2, "ffn_ratio": 4, "num_steps": 4,
    }  # fmt: skip
    assert {name: config[name] for name in config if name != "decoder"} == read_config(trained / "checkpoint")
    (cache,) = open_caches(data)
    real = encode_cache(load_patch_tokenizer(aims_at), cache).astype(np.float64)
    np.testing.assert_allclose(config["decoder"]["latent_std"], real.std(axis=(0, 1, 2)))
    frames = torch.from_numpy(cache.frames[:2].copy())
    plain, sharp = (load_world_sim(checkpoint, decoder=name) for name in ("tokenizer", "diffusion"))
    latents = plain.encode(frames[:, None])[:, 0]
    looks = [sim.world_model.decode(latents, Reference(frames, latents)) for sim in (plain, sharp)]
    assert looks[0].shape == looks[1].shape and not torch.equal(*looks)
    other = SIZES["tokenizer"] | {"levels": [], "patch": 8, "decoder_dims": [8, 8], "decoder_blocks": [1, 1]}
    fine = run(command("tokenizer", data, tmp_path / "fine", tokenizer=other))
    with pytest.raises(ValueError, match=r"must have a grid of \(2, 2\), got \(4, 4\)"):
        run(command("decoder", data, trained, decoder=sizes | {"latents_of": str(fine)}))
    with pytest.raises(ValueError, match="needs a discrete tokenizer, got CI16x16 patch"):
        run(command("decoder", data, tmp_path / "continuous", decoder=sizes))


def test_an_ensemble_of_checkpoints_is_one(trained, data, tmp_path, monkeypatch):
    monkeypatch.setattr("worldsim.heads_data.FALSE_ALARM_RATE", 0.5)  # four episodes promise no lower one
    member = str(trained / "checkpoint")
    checkpoint = run(TrainCommand("ensemble", members=[member, member], held_out=data, out=str(tmp_path)))
    config = read_config(checkpoint)
    assert config["members"] == [member, member] and len(set(config["digests"])) == 1
    (cache,) = open_caches(data)
    tokenizer, model = load_patch_tokenizer(checkpoint), load_world_model(checkpoint)
    _, doubts = imagine_cache(model, tokenizer.codec, cache, encode_cache(tokenizer, cache))
    limit = config["calibration"]["uncertainty_limit"]
    assert limit == pytest.approx(episode_limit(doubts, 0.5)) and 0 < limit < 1
    sim = load_world_sim(checkpoint)
    assert sim.calibration.uncertainty_limit == limit and INSTRUCTION in sim.heads.config.instructions
    shutil.copytree(trained / "checkpoint", tmp_path / "other")
    other = load_tokenizer(member)
    save_weights(tmp_path / "other", "tokenizer", {k: v + 0.1 for k, v in other.state_dict().items()})
    kept = read_config(checkpoint)
    for members, out, message in (
        ([member, str(tmp_path / "other")], tmp_path, "members must share a tokenizer, got different ones"),
        ([str(checkpoint), member], tmp_path, "must describe the part 'tokenizer'"),
        ([member, member], trained, "must be a new folder or that of an ensemble"),
        (["nobody", member], tmp_path, "no checkpoint 'nobody'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(TrainCommand("ensemble", members=members, held_out=data, out=str(out)))
    assert read_config(checkpoint) == kept and read_config(trained / "checkpoint")["kind"] == "autoregressive"
