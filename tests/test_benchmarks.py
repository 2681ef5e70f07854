"""Every benchmark runs from start to end on a tiny budget, and its last line is the JSON that others read."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import worldsim_fakes
from robot_clips import filmed_episode, robot_episode, write_dataset
from scripts import ROOT, load_script

import wfm_core.data.video as video
import worldsim.simulator as simulator
from policies.bc import BCConfig, BCNetwork
from tasks import TASKS
from wfm_core.checkpoint import (
    as_json,
    build_tokenizer,
    load_tokenizer,
    load_world_model,
    read_config,
    save_weights,
    write_config,
)
from wfm_core.data.camera_rays import pack_pose
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.data.video import decode_video, encode_video
from wfm_core.metrics import psnr
from wfm_core.models.diffusion_decoder import DiffusionDecoderConfig, LatentDenoiser
from wfm_core.models.motion import Contact
from wfm_core.models.transformer_config import TransformerConfig
from wfm_core.tokenizers.patch import to_float, to_uint8
from worldsim.commands.posttrain import run as posttrain
from worldsim.posttraining import PosttrainCommand
from worldsim.training import KINDS

load = partial(load_script, "benchmarks")


@pytest.fixture
def last_line(monkeypatch, capsys):
    """Run a benchmark's `main` and parse the last line it prints, as strictly as JSON is meant."""

    def refuse(constant):
        raise ValueError(f"the last line must be JSON, got {constant}")

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--quick", *arguments])
        module.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=refuse)

    return run


def test_no_benchmark_is_left_out():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} <= tested


def test_curation_stress(monkeypatch, last_line, tmp_path):
    module = load("curation_stress")
    plan = module.Plan
    monkeypatch.setattr(module, "Plan", lambda fault, clean, seed: plan(2, 6, seed))
    monkeypatch.setattr(module, "BOMB_SIZE", 512)
    monkeypatch.setattr(video, "LARGEST", 10 << 20)
    made = [replace(robot_episode(seed, steps=51), episode_id=str(seed)) for seed in range(19)]
    recorded = [replace(each.resized(128, 128), agent_pos=each.agent_pos) for each in made]
    monkeypatch.setattr(module, "open_dataset", lambda folder: recorded)
    monkeypatch.setattr(module, "MOVING", 0.4)
    clips = list(module.clips([tmp_path]))
    assert len(clips) == 2 * len(recorded) and not np.shares_memory(clips[0].frames, clips[1].frames)
    np.testing.assert_array_equal(clips[1].frames, recorded[0].frames[25:50])
    figures = last_line(module, "--out", str(tmp_path), "--episodes", str(tmp_path), "--workers", "0")
    assert figures["num_clips"] == 6 + 22 + 2 + 4 + 6 + 10 and figures["clean_dropped"] == 0
    assert {fault: each["planted"] for fault, each in figures["faults"].items()} == dict.fromkeys(module.FAULTS, 2)
    found = {fault for fault, each in figures["faults"].items() if each["recall"] == 1}
    assert found >= module.FAULTS.keys() - {"other_camera", "shaky"}  # are other faults in so coarse a picture
    recalls = [each["recall"] for each in figures["faults"].values()]
    assert figures["min_recall"] == min(recalls) and not figures["pickle_has_run"]
    assert all(rate > 0 for rate in (figures["items_per_s"], *figures["stages_per_s"].values()))


def test_curation_stress_counts_what_is_missed_and_what_is_dropped_wrongly():
    module = load("curation_stress")
    rows = [{"fault": fault, "reason": module.FAULTS[fault][0]} for fault in module.FAULTS for _ in range(2)]
    assert {(each["precision"], each["recall"]) for each in module.score(rows).values()} == {(1, 1)}
    rows += [{"fault": "", "reason": "frozen"}, {"fault": "shaky", "reason": "cut"}]
    scores = module.score(rows)
    assert scores["shaky"] == {"planted": 3, "precision": 1, "recall": 2 / 3, "wrong": 0}
    assert scores["frozen"]["precision"] == pytest.approx(2 / 3) and scores["idle"]["wrong"] == 1
    assert scores["other_camera"]["precision"] == pytest.approx(2 / 3)


def test_step_speed(monkeypatch, last_line):
    module = load("step_speed")
    seconds = module.seconds
    tiny = TransformerConfig(width=12, head_dim=12, num_layers=1, num_heads=1, num_kv_heads=1, ffn_dim=8)
    monkeypatch.setattr(module, "BATCHES", (1, 16))
    monkeypatch.setattr(module, "FAMILY_ROWS", (1, 2))
    monkeypatch.setattr(module, "PRESETS", {"nano": tiny})
    monkeypatch.setattr(module, "seconds", lambda run, budget, device, least=1: seconds(run, 0.0, device, 1))
    frozen = []
    for compiles in (module, simulator):
        monkeypatch.setattr(compiles, "frozen", lambda function, _: frozen.append(function) or function)
    figures = last_line(module)

    dynamics = load_world_model("bridge-nano-ar", packed=False).dynamics
    least = 2 * sum(p.numel() for p in dynamics.parameters()) * 16 * dynamics.num_cells / 1e9
    assert figures["variants"].keys() == {"eager", "compiled"} and len(frozen) == 2
    for variant in figures["variants"].values():
        # Every cell passes every weight once, those of the refiner twice; attention and heads come on top.
        assert least < variant["gflop_per_step_b16"] < 2 * least
        speeds = [variant[f"{what}_per_s"] for what in ("pass", "latents", "pixels")]
        assert all(speed.keys() == {"1", "16"} and min(speed.values()) > 0 for speed in speeds)
        assert 0 < variant["pass_fraction_of_peak_b16"] < 2 and 0 < variant["fraction_of_peak_b16"] < 2
        ratio = variant["latents_per_s"]["16"] / variant["pass_per_s"]["16"]
        assert variant["env_over_pass_b16"] == pytest.approx(ratio, rel=1e-3)
        reached = variant["gflop_per_step_b16"] * variant["latents_per_s"]["16"] / 16  # GFLOP/s
        assert variant["fraction_of_peak_b16"] >= 0.99 * reached / figures["peak_gflops"]
    assert all(ratio > 1 for ratio in figures["ratio_token_by_token"].values())
    assert figures["steps_per_second_latents"] == figures["variants"]["eager"]["latents_per_s"]
    best = max(variant["pass_fraction_of_peak_b16"] for variant in figures["variants"].values())
    assert figures["pass_fraction_of_peak_b16"] == best
    families = figures["families"]
    assert len(families) == 12 and all(row["frames_per_s_b2"] > 0 for row in families.values())
    strict, quick = (families[f"transformer, 64 cells, {way}"] for way in ("raster", "parallel 1"))
    assert strict["times_raster_b1"] == 1 and quick["times_raster_b1"] > 2
    assert quick["times_raster_b2"] == pytest.approx(quick["frames_per_s_b2"] / strict["frames_per_s_b2"], rel=1e-2)


def test_step_speed_measures_a_call():
    calls = []
    took = load("step_speed").seconds(lambda: calls.append(time.sleep(0.01)), 0.0, "cpu")
    assert len(calls) == 4  # the first one is not timed
    assert 0.01 <= took < 1


def test_fidelity(monkeypatch, last_line, tmp_path):
    import envs.world_model_bridge as imagined_env

    module = load("fidelity")
    task, record = "put_carrot_on_plate", module.record
    little = {"num_episodes": 2, "tasks": [task], "behaviours": {"expert": 1.0}, "noise": [0.0, 0.0], "workers": 0}
    monkeypatch.setattr(module, "record", lambda config: record(replace(config, **little)))
    monkeypatch.setattr(module, "TASKS", {task: module.TASKS[task]})
    short = partial(imagined_env.WorldModelBridgeVectorEnv, max_episode_steps=3)
    monkeypatch.setattr(imagined_env, "WorldModelBridgeVectorEnv", short)
    figures = last_line(module, "--out", str(tmp_path))

    decibels = ("gain_object_moved_db", "gain_last_horizon_db", "shuffled_cost_db", "still_cost_db")
    assert all(math.isfinite(figures[name]) for name in decibels)
    psnr = figures["psnr_db"]
    assert figures["gain_object_moved_db"] == pytest.approx(psnr["rollout"] - psnr["copy"])
    assert figures["shuffled_cost_db"] == pytest.approx(psnr["rollout"] - psnr["shuffled"])
    assert psnr["copy"] < psnr["rollout"] < psnr["reconstruction"]  # even a poor world model moves the arm
    assert figures["still_cost_db"] > 0
    for name in ("grasped_within_8px", "vanished_rate", "success_head_accuracy", "false_success_rate"):
        assert 0 <= figures[name] <= 1
    assert figures["success_head_accuracy"] in (0, 0.5, 1)
    assert figures["false_success_episodes"] == 2 * 4  # two policies from four initial states
    assert figures["grasped_frames"] > 10 and figures["untouched_frames"] > 2
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2

    # A perfect rollout has nothing to be blamed for, and on a black screen every object has vanished.
    (cache,) = module.open_caches([str(next(tmp_path.glob("held_out_*[0-9]")))])
    names = ("grasped_within_8px", "vanished_rate", "untouched_drift_rate")
    perfect = module.object_figures(cache, cache.frames)
    assert [perfect[name] for name in names] == [1, 0, 0]
    black = module.object_figures(cache, np.zeros_like(cache.frames))
    assert [black[name] for name in names] == [0, 1, 1]
    assert perfect["grasped_frames"] == figures["grasped_frames"]

    assert figures["grasps"] == 2 >= figures["grasps_imagined_too"] and figures["grasps_invented"] == 0
    held = np.zeros((int(cache.lengths.max()) - 1, 2), dtype=np.int64)  # free throughout
    held[:2, 0], held[:3, 1] = Contact.HELD_BLOCKED, Contact.HELD  # the first is too short
    counts = module.grasp_figures(cache, held)
    assert counts == {"grasps": 2, "grasps_imagined_too": 1, "grasps_invented": 0}


@pytest.mark.parametrize("family", ["tiny_checkpoint", "tiny_transformer", "tiny_diffusion"])
def test_decoding(family, request, monkeypatch, last_line, tmp_path):
    def episode(index):
        rng = np.random.default_rng(index)
        frames = rng.integers(0, 256, (45, 32, 32, 3), dtype=np.uint8)
        actions = rng.uniform(-5, 5, (44, 7)).astype(np.float32)  # so large that even random weights heed them
        return Episode(frames, actions, None, "push", str(index), "commanded", 0)

    module = load("decoding")
    exact = partial(module.load_world_model, dtype=torch.float32)
    monkeypatch.setattr(module, "load_world_model", exact)
    cache = build_clip_cache(map(episode, range(4)), tmp_path / "set.cache")
    folder = str(request.getfixturevalue(family))
    figures = last_line(module, "--world-model", folder, "--data", str(tmp_path / "set"), "--most-passes", "2")

    assert figures["feature_network"] == "gabor" and figures["episodes"] == 4
    found = figures["world_models"][folder]
    passes = {name: way["passes_per_frame"] for name, way in found["ways"].items()}
    if family == "tiny_transformer":  # 4 tokens and an action a frame
        assert passes == {"raster": 5, "speculative": passes["speculative"], "parallel_1": 1, "parallel_2": 2}
        assert 2 <= passes["speculative"] <= 5
        same = ("psnr_db", "frechet", "shuffled_cost_db")
        assert all(found["ways"]["raster"][name] == found["ways"]["speculative"][name] for name in same)
    elif family == "tiny_diffusion":  # what was denoised is passed once more
        assert passes == {"steps_1": 2, "steps_2": 3, "chunks_of_2": 2}
        assert len({way["psnr_db"] for way in found["ways"].values()}) == 3
    else:
        assert passes == {"parallel_1": 1, "parallel_2": 2, "parallel_4": 4}
    for way in found["ways"].values():
        assert way["psnr_db"] > 0 and way["frechet"] > 0 and way["shuffled_cost_db"] != 0
        assert way["frames_per_s_b1"] > 0 and way["frames_per_s_b16"] > 0
    size = 3 if family == "tiny_diffusion" else 4
    assert found["context_frames"] == size and len(found["drift"]) == 10
    ends = [(row["first"], row["last"], row["frames"]) for row in found["drift"][::9]]
    assert ends == [(1, size, 4 * size), (9 * size + 1, 10 * size, 4 * size)]
    only = last_line(module, "--world-model", folder, "--data", str(tmp_path / "set"), "--drift-only")
    assert only["world_models"][folder] == found | {"ways": {}}

    # A perfect rollout does not drift; one that stands still is as good as a copy.
    network = module.load_feature_network()
    for row in module.drift_curve(cache, cache.frames, 4, network):
        assert row["psnr_db"] == 60 and row["frechet"] == pytest.approx(0, abs=1e-6)
    still = module.drift_curve(cache, cache.frames[module.first_rows(cache)], 4, network)
    assert all(row["psnr_db"] == row["copy_db"] < 15 and row["frechet"] > 1e-6 for row in still)


def test_bridge_table(tiny_checkpoint, tiny_transformer, tiny_diffusion, monkeypatch, last_line, tmp_path):
    module = load("bridge_table")
    monkeypatch.setattr(module, "LATENT_TOKENIZER", str(tiny_diffusion))
    monkeypatch.setattr(module, "speed_figures", lambda *_: {"frames_per_s_b16": 7.0})
    rng = np.random.default_rng(0)

    def episode(index, length):
        frames = rng.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8)
        actions = rng.uniform(-5, 5, (length - 1, 7)).astype(np.float32)  # so large that random weights heed them
        return Episode(frames, actions, None, "push", str(index), "commanded", 0)

    data = write_dataset(tmp_path / "set", [episode(k, length) for k, length in enumerate((33, 9, 20))])
    (cache,) = module.open_caches([data], frame_shape=(32, 32, 3), beside=tmp_path)
    ours, baseline = [str(tiny_checkpoint), str(tiny_transformer)], str(tiny_diffusion)
    given = ["--world-models", *ours, "--data", data, "--out", str(tmp_path)]
    figures = last_line(module, *given, "--baseline", baseline)
    rows = figures["rows"]
    assert list(rows) == ["copy", *ours, baseline] and figures["episodes"] == 3
    assert figures["psnr_margin_db"] == max(rows[name]["psnr_db"] for name in ours) - rows[baseline]["psnr_db"]
    best = max(ours, key=lambda name: rows[name]["psnr_db"])
    assert figures["best"] == best and figures["fvd_ratio"] == rows[baseline]["fvd"] / rows[best]["fvd"]
    for name in (*ours, baseline):
        assert rows[name].keys() == rows["copy"].keys() | {"swapped_db", "frames_per_s"}
        assert rows[name]["swapped_db"] != 0 and rows[name]["frames_per_s"] == 7
    firsts = np.split(cache.frames, cache.starts[1:])
    by_hand = np.concatenate([module.psnr(np.repeat(each[:1], len(each) - 1, axis=0), each[1:]) for each in firsts])
    assert rows["copy"]["psnr_db"] == pytest.approx(by_hand.mean())
    alone = last_line(module, *given)
    assert alone["psnr_margin_db"] is None and alone["fvd_ratio"] is None
    assert alone["rows"] == {name: rows[name] for name in ("copy", *ours)}
    given[1:3] = [baseline]
    both = last_line(module, *given, "--num-steps", "1", "--baseline", baseline)["rows"]
    assert list(both)[-1] == baseline and both[baseline] == rows[baseline]
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        last_line(module, *given, "--num-steps", "1", "0")
    few = last_line(module, *given, "--num-steps", "1", "2")["rows"]
    assert list(few) == ["copy", f"{baseline}, 1 steps", f"{baseline}, 2 steps"]
    assert few[f"{baseline}, 2 steps"] == rows[baseline] != few[f"{baseline}, 1 steps"]  # two are its own

    (folder := tmp_path / "elsewhere" / "real").mkdir(parents=True)
    for k in range(2):  # a set of real clips, of another size
        np.savez(folder / f"{k}.npz", arr_0=rng.uniform(-1, 1, (5, 10)))
        video = encode_video(rng.integers(0, 256, (5, 48, 64, 3), dtype=np.uint8), 20)
        (folder / f"{k}.mp4").write_bytes(video)
    real = last_line(module, "--world-models", ours[0], "--data", str(folder), "--out", str(tmp_path))
    assert real["episodes"] == 2 and real["rows"][ours[0]].keys() == rows[ours[0]].keys()
    assert [path.name for path in folder.parent.iterdir()] == ["real"]  # it may lie where nobody may write

    frames, network = np.asarray(cache.frames), module.load_feature_network()
    clips = module.clip_features(network, frames, cache)
    assert len(clips) == 3 + 1 + 1  # from frames 0, 8 and 16 of the first episode
    still = module.clip_features(network, frames[module.first_rows(cache)], cache)
    half = clips.shape[1] // 2
    assert not still[:, half:].any() and clips[:, half:].all()
    features = module.frame_features(network, frames)
    np.testing.assert_allclose(clips[1, :half], features[8:24].mean(axis=0), rtol=1e-6)
    truth = {"latents": module.latents_of(frames), "clips": clips}
    perfect = module.video_figures(frames, cache, truth, network)
    assert perfect["psnr_db"] == 60 and perfect["ssim"] == 1 and perfect["latent_l2"] == 0
    assert perfect["fvd"] == pytest.approx(0, abs=1e-6) and rows["copy"]["fvd"] > 1e-3


@pytest.fixture
def little_held_out(monkeypatch):
    """Let the twin's held-out set be two episodes of one task."""
    import benchmarks.fidelity as fidelity

    record = fidelity.record
    little = {"num_episodes": 2, "tasks": ["put_carrot_on_plate"], "behaviours": {"expert": 1.0}, "workers": 0}
    monkeypatch.setattr(fidelity, "record", lambda config: record(replace(config, **little)))


def test_train_speed(monkeypatch, last_line, tmp_path, little_held_out):
    module = load("train_speed")
    autoregressive = {"width": 16, "num_heads": 1, "num_layers": 2, "time_layers": [1], "refiner_layers": 1}
    transformer = {"width": 12, "head_dim": 12, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "ffn_dim": 8}
    diffusion = {"width": 12, "head_dim": 12, "num_layers": 1, "num_heads": 1}
    irasim = {"width": 12, "num_layers": 2, "num_heads": 1}
    for kind, sizes in zip(module.SIZES, (autoregressive, transformer, diffusion, irasim), strict=True):
        monkeypatch.setitem(module.SIZES[kind], "batch_size", 2)
        monkeypatch.setitem(module.SIZES[kind], "clip_length", 4)
        monkeypatch.setitem(module.SIZES[kind], "dynamics", module.SIZES[kind]["dynamics"] | sizes)
    monkeypatch.setattr(module, "seconds", lambda run, budget, device: run() and 0.01)
    figures = last_line(module, "--eager", "--out", str(tmp_path))

    assert figures["kinds"].keys() == set(KINDS) and not figures["compiled"]
    for row in figures["kinds"].values():
        # Every weight is used on every token, forward and twice backward; few tokens are not seen by all of them.
        assert 2 < row["tflop_per_step"] * 1e12 / (row["parameters"] * 2 * 4 * 64) < 30
        assert row["frames_per_s"] == pytest.approx(8 * row["steps_per_s"], rel=1e-3)
        assert row["loader_share"] == pytest.approx(0.01 * row["steps_per_s"], rel=1e-3)
        reached = row["tflop_per_step"] * 1e3 * row["steps_per_s"]
        assert row["fraction_of_peak"] == pytest.approx(reached / row["peak_gflops"], rel=1e-2)
    assert figures["fraction_of_peak"] == figures["kinds"]["autoregressive"]["fraction_of_peak"]
    assert figures["loader_share"] == max(row["loader_share"] for row in figures["kinds"].values())


def save_tokenizer(folder, **settings) -> str:
    torch.manual_seed(0)
    tokenizer, values = build_tokenizer(settings, folder)
    if settings["kind"] == "patch":  # its decoder copies the reference, whatever the tokens say
        torch.nn.init.zeros_(tokenizer.to_haar.weight)
        tokenizer.to_haar.bias.data[48] = -200.0  # the first of the gate's coefficients, their mean
    save_weights(folder, "tokenizer", tokenizer.state_dict())
    write_config(folder, {"tokenizer": values})
    return str(folder)


def test_tokenizers(monkeypatch, last_line, tmp_path, little_held_out):
    import benchmarks.step_speed as step_speed

    module, seconds = load("tokenizers"), step_speed.seconds
    for timed in (module, step_speed):
        monkeypatch.setattr(timed, "seconds", lambda run, budget, device: seconds(run, 0.0, device))
    (clips := tmp_path / "clips").mkdir()
    moving = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    (clips / "a.mp4").write_bytes(encode_video(moving, fps=15))
    video = {"kind": "video", "num_blocks": 1, "num_heads": 2}
    patch = {"kind": "patch", "image_size": 32, "encoder_dim": 16, "encoder_blocks": 1}
    patch |= {"decoder_dims": (8, 8, 8), "decoder_blocks": (1, 1, 1)}
    names = [
        save_tokenizer(tmp_path / "cv", **video, space_factor=8, time_factor=4, dims=(8, 8)),
        save_tokenizer(tmp_path / "di", **video, levels=(8, 5), dims=(8, 8, 8)),
        save_tokenizer(tmp_path / "patch", **patch, levels=(5, 4, 3)),
        save_tokenizer(tmp_path / "continuous", **patch, levels=()),
    ]
    sizes = {"width": 12, "num_layers": 1, "num_heads": 1, "num_steps": 1}
    config = DiffusionDecoderConfig(code_dim=3, latents_of=names[3], grid=(2, 2), **sizes)
    save_weights(Path(names[2]), "decoder", LatentDenoiser(config).state_dict())
    paler = load_tokenizer(names[3]).state_dict()
    paler["to_haar.bias"][48] = 0.0  # half of the reference, or else all would look alike
    save_weights(Path(names[3]), "tokenizer", paler)
    write_config(Path(names[2]), read_config(Path(names[2])) | {"decoder": as_json(config)})
    options = ["--checkpoints", *names, "--data", str(clips), "--size", "32", "--out", str(tmp_path / "twin")]
    figures = last_line(module, *options)

    rows = {(row["name"], row["data"]): row for row in figures["rows"]}
    drawn = f"{names[2]}, diffusion decoder"
    order = [*names[:3], drawn, names[3]]
    assert list(rows) == [(name, data) for name in order for data in ("twin", str(clips))]
    for data in ("twin", str(clips)):
        one, other = rows[names[2], data], rows[drawn, data]
        assert one["psnr"] != other["psnr"] == rows[names[3], data]["psnr"]
        assert one["level_use"] == other["level_use"]  # the same tokens
    assert [rows[name, "twin"]["kind"] for name in names] == ["CV4x8x8", "DI16x16", "DI16x16 patch", "CI16x16 patch"]
    for sort, rivals in (("continuous", names[::3]), ("discrete", names[1:3])):
        # A diffusion decoder's row is one of the discrete ones.
        rivals = [*rivals, drawn] if sort == "discrete" else rivals
        assert figures[f"psnr_{sort}"] == max(rows[name, "twin"]["psnr"] for name in rivals)

    # Against other ways: the image tokenizer frame by frame, the video one on frames that fit, the copying one by hand.
    (cache,) = module.open_caches([str(next((tmp_path / "twin").glob("held_out_*[0-9]")))])
    squares = [module.square_frames(frames, 32) for frames in np.split(cache.frames, cache.starts[1:])]
    with torch.no_grad():
        image = load_tokenizer(names[1])
        decoded = [
            to_uint8(image.decode(image.encode(to_float(torch.from_numpy(frame[None]))[None])[0])[0][0]).numpy()
            for frame in np.concatenate(squares)
        ]
        expected = psnr(np.concatenate(decoded), np.concatenate(squares)).mean()
        copied = np.concatenate([psnr(frames[:1], frames) for frames in squares]).mean()
        assert rows[names[2], "twin"]["psnr"] == pytest.approx(copied, abs=1e-3)
        assert rows[names[1], "twin"]["psnr"] == pytest.approx(expected, abs=0.02)
        fitting = [frames[: len(frames) - (len(frames) - 1) % 4] for frames in squares]
        video = load_tokenizer(names[0])
        latents = [video.encode(to_float(torch.from_numpy(frames))[None])[0] for frames in fitting]
        spread = torch.cat([each.flatten() for each in latents]).std().item()
        assert rows[names[0], "twin"]["latent_std"] == pytest.approx(spread, rel=0.02)

    for row in figures["rows"]:
        assert row.keys() == {"name", "kind", "data", *module.COLUMNS}
        discrete, known = row["kind"].startswith("D"), row["data"] == "twin"
        assert (row["level_use"] is None, row["latent_std"] is None) == (not discrete, discrete)
        assert (row["foreground_psnr"] is None) == (not known)
        assert not discrete or 0 < row["level_use"] <= 1
        assert row["encode_fps"] > 0 and row["decode_fps"] > 0 and 0 < row["encode_fraction_of_peak"] < 2
        assert row["ssim"] < 1 and row["flicker"] > 0 and row["frechet"] > 0
    copying = rows[names[2], "twin"]
    assert copying["flips"] == 0 and copying["foreground_psnr"] < copying["psnr"] - 3  # only the background is right
    assert rows[names[2], str(clips)]["flips"] is None  # in noise every patch changes

    encoder = load_tokenizer(names[2])
    counted = module.count_flops(lambda: encoder.encode(torch.zeros(3, 3, 32, 32)))
    products = sum(weight.numel() for weight in encoder.encoder.parameters() if weight.ndim == 2)
    assert counted == 2 * products * 3 * 2 * 2  # multiply and add, 3 frames of 2 x 2 patches


def test_tokenizers_compares_frames_as_it_says():
    module = load("tokenizers")
    rng = np.random.default_rng(0)
    network = module.load_feature_network()
    true = [rng.integers(0, 200, (length, 32, 32, 3), dtype=np.uint8) for length in (3, 1, 5)]
    background = true[0][0]
    videos = module.Videos("made up", true, [background] * 3)
    perfect = module.frame_figures([frames.copy() for frames in true], videos, network)
    assert (perfect["psnr"], perfect["ssim"], perfect["flicker"]) == (60, 1, 0)
    assert perfect["foreground_psnr"] == 60 and perfect["frechet"] == pytest.approx(0, abs=1e-6)
    brighter = module.frame_figures([frames + np.uint8(10) for frames in true], videos, network)
    assert brighter["psnr"] == pytest.approx(20 * math.log10(25.5)) and brighter["flicker"] == 0
    wrong_behind = [np.where((frames == background).all(axis=-1, keepdims=True), 255, frames) for frames in true]
    hidden = module.frame_figures([frames.astype(np.uint8) for frames in wrong_behind], videos, network)
    assert hidden["foreground_psnr"] == 60 > hidden["psnr"]
    shimmering = [frames.copy() for frames in true]
    shimmering[2][1::2] += 6  # each of its 4 steps changes by 6 too much; the other video of several frames has 2
    assert module.frame_figures(shimmering, videos, network)["flicker"] == pytest.approx(6 * 4 / 6)
    assert "foreground_psnr" not in module.frame_figures(true, replace(videos, backgrounds=None), network)


def test_tokenizers_are_seen_as_their_losses_see_them():
    module = load("tokenizers")
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (1, 48, 64, 3), dtype=np.uint8).repeat(20, axis=0)
    moving = np.stack([np.roll(frame, t, axis=1) for t, frame in enumerate(texture)])
    videos = module.Videos("made up", [moving, moving[:1]], None)
    networks = module.load_feature_network(), module.load_flow_network()
    perfect = module.loss_figures([moving.copy(), moving[:1].copy()], videos, *networks)
    assert perfect == {"perceptual": 0, "gram": 0, "flow": 0}
    still = module.loss_figures([texture, moving[:1]], videos, *networks)  # each frame right but for where it is
    assert still["flow"] > 0.2 and still["perceptual"] > 0.1 > still["gram"]
    late = moving.copy()
    late[17:] = 0  # beyond what losses see
    assert module.loss_figures([late, moving[:1]], videos, *networks) == perfect


def test_ranking_agreement(monkeypatch, last_line, tmp_path, threads):
    from worldsim import contest
    from worldsim.commands import rank

    module = load("ranking_agreement")
    configs = []

    def prepare(config):
        configs.append(config)
        return worldsim_fakes.contest(num_videos=1, num_probe_pairs=1), worldsim_fakes.judge

    def run_here(jobs, make_env, load_policy, store, *, num_envs, num_workers, on_episode):
        for job in jobs:
            contest.run_job(job, make_env, load_policy(job.source), store, num_envs, on_episode)

    monkeypatch.setattr(rank, "prepare", prepare)
    monkeypatch.setattr(contest, "run_in_processes", run_here)
    figures = last_line(module, "--world-model", "some-model", "--out", str(tmp_path))

    (config,) = configs
    assert len(config.policies) == 4 and set(config.policies) <= set(module.shipped_policies())
    assert (config.tasks, config.num_episodes, config.num_videos) == (["reach_target", "put_carrot_on_plate"], 4, 1)
    assert (config.world_model, config.twin) == ("some-model", True)

    agreement = json.loads((tmp_path / "ranking.json").read_text())["agreement"]
    for key, (level, name) in {
        "pearson_policies": ("policies", "pearson"),
        "pearson_cells": ("cells", "pearson"),
        "mmrv": ("policies", "mmrv"),
        "top1_regret": ("policies", "top1_regret"),
    }.items():
        low, high = figures[key]["interval"]
        assert -1 <= low <= figures[key]["value"] <= high <= 1
        assert figures[key] == agreement[level][name]
    assert figures["pearson_policies"]["value"] > 0.5  # the fake imagination flips one outcome in seven
    assert (figures["num_policies"], figures["num_tasks"], figures["num_episodes"]) == (3, 2, 20)
    assert 0 <= figures["success_head_accuracy"] <= 1
    assert 0 <= figures["false_success_rate"] <= 1


def test_twin_speed(monkeypatch, last_line):
    module = load("twin_speed")
    measure = module.measure
    monkeypatch.setattr(module, "TASKS", ("reach_target", "push_cube"))
    monkeypatch.setattr(module, "measure", lambda name, num_steps, render: measure(name, 3, render))
    figures = last_line(module)

    speeds = [figures["tasks"][name]["steps_per_second"] for name in ("reach_target", "push_cube")]
    assert figures["steps_per_second_slowest_task"] == min(speeds) > 0
    assert figures["steps_per_second"] == pytest.approx(2 / (1 / speeds[0] + 1 / speeds[1]), abs=0.1)
    assert figures["tasks"]["push_cube"].keys() == {
        "steps_per_second",
        "steps_per_cpu_second",
        "steps_per_second_without_rendering",
    }


def test_rl_speed():
    command = [
        sys.executable,
        ROOT / "benchmarks" / "rl_speed.py",
        "--quick",
        "--world-model",
        "scripted",
        "--rows",
        "2",
        "--eager",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["rows"] == 2 and figures["twin_steps_per_s"] > 0
    ratio = figures["imagined_steps_per_s"] / figures["twin_steps_per_s"]
    assert figures["ratio_to_twin"] == pytest.approx(ratio, rel=0.05)


def test_clip_cache(monkeypatch, last_line):
    module = load("clip_cache")
    rate = module.rate
    monkeypatch.setattr(module, "EPISODE_FRAMES", 20)
    monkeypatch.setattr(module, "rate", lambda work, seconds: rate(work, 0.05))
    figures = last_line(module)

    assert figures["cache_mb"] == round(60 * 20 * 128 * 128 * 3 / 1e6)
    assert (figures["clip_length"], figures["image_size"], figures["batch_size"]) == (16, 128, 32)
    # Each does more than the one before it: point at pixels, read them, decode them.
    assert figures["views_per_s"] > figures["views_read_per_s"] > figures["decoded_per_s"] > 0
    assert figures["copied_per_s"] > figures["decoded_per_s"]


def test_uncertainty(monkeypatch, last_line, tmp_path, tiny_diffusion):
    def episode(index):
        rng = np.random.default_rng(index)
        frames = rng.integers(0, 256, (6 + index % 3, 32, 32, 3), dtype=np.uint8)
        actions = rng.uniform(-1, 1, (len(frames) - 1, 7)).astype(np.float32)
        return Episode(frames, actions, None, "push", str(index), "commanded", 0)

    module = load("uncertainty")
    caches = [build_clip_cache(map(episode, range(k, k + 12)), tmp_path / f"{k}.cache") for k in (0, 12)]
    monkeypatch.setattr(module, "calibration_cache", lambda *_: caches[0])
    monkeypatch.setattr(module, "held_out_cache", lambda *_: caches[1])
    figures = last_line(module, "--world-models", str(tiny_diffusion), "--rollouts", "2", "--rates", "0.5", "0.05")
    assert figures["rows"].keys() == {f"{tiny_diffusion}, own", f"{tiny_diffusion}, 2 rollouts"}
    own, apart = figures["rows"].values()
    assert own["error"] == pytest.approx(apart["error"], rel=1e-3)  # what is imagined is the same
    assert own["limit_0.5"] != apart["limit_0.5"] > 0
    for row in (own, apart):
        assert row["limit_0.05"] is None and row["false_alarms_0.05"] == 0 and row["kept_0.05"] == 1
        low, high = row["false_alarms_0.5_ci"]
        assert 0 <= low <= row["false_alarms_0.5"] <= high <= 1 and 0 <= row["kept_0.5"] <= 1

    # An uncertainty that is the error knows everything, one that is noise nothing, one that is the time too much.
    rng = np.random.default_rng(0)
    errors = [np.arange(8) + rng.random(8) for _ in range(40)]
    perfect = module.figures_of(errors, errors, errors, [0.2])
    assert perfect["spearman"] == perfect["spearman_at_step"] == perfect["auroc"] == pytest.approx(1)
    assert perfect["false_alarms_0.2"] <= 0.2 and perfect["kept_error_0.2"] < perfect["error"]
    noise = [rng.random(8) for _ in errors]
    assert abs(module.figures_of(noise, noise, errors, [0.2])["spearman"]) < 0.2
    time = [np.arange(8) + 0.01 * rng.random(8) for _ in errors]
    clock = module.figures_of(time, time, errors, [0.2])
    assert clock["spearman"] > 0.9 and abs(clock["spearman_at_step"]) < 0.2


def test_recipes(tiny_checkpoint, monkeypatch, last_line, tmp_path):
    module = load("recipes")
    monkeypatch.setattr(module, "DEFAULT_WORLD_MODEL", str(tiny_checkpoint))
    instruction = read_config(tiny_checkpoint)["heads"]["instructions"][0]
    data, rest = (
        write_dataset(tmp_path / name, [replace(filmed_episode(seed), instruction=instruction) for seed in seeds])
        for name, seeds in (("data", range(3)), ("rest", range(8, 10)))
    )
    loop = {"num_steps": 1, "warmup_steps": 1, "bf16": False}
    sizes = {"batch_size": 2, "clip_length": 4, "train": loop}
    told = {
        "joint": {"cameras": module.CAMERAS},
        "wrist": {"cameras": module.CAMERAS[1:]},
        "moving": {"rays": True},
        "text": {"text_encoder": "bytes", "actions": "none"},
    }
    for name, more in told.items():
        folders = {"data": [data], "held_out": [rest], "out": str(tmp_path / name)}
        posttrain(PosttrainCommand(str(tiny_checkpoint), **folders, **sizes, **more))
    given = {name: str(tmp_path / name / "checkpoint") for name in told}
    shared = ["--data", rest, "--training", data, "--out", str(tmp_path / "out")]
    figures = last_line(module, "views", "--world-model", given["joint"], "--alone", given["wrist"], *shared)
    low, high = figures["gain_db"][1:]
    assert low <= figures["joint_db"] - figures["alone_db"] <= high and figures["apart_real_mm"] > 0
    figures = last_line(module, "camera", "--world-model", given["moving"], *shared)
    assert figures["episodes"] == 2 and figures["moved_degrees"] == 0 and figures["moved_mm"] > 100
    assert figures["told_db"] > 0 and figures["copy_db"] > 0
    figures = last_line(module, "text", "--world-model", given["text"], *shared)
    right = (figures["success_told"][0] + 1 - figures["success_still"][0]) / 2
    assert figures["instruction_accuracy"][0] == pytest.approx(right) and figures["episodes"] == 2
    shapes = {name: decode_video(tmp_path / "out" / f"{name}.mp4").shape[1:] for name in ("text", "views", "camera")}
    assert shapes == {"text": (32, 4 * 32, 3), "views": (64, 3 * 32, 3), "camera": (32, 3 * 32, 3)}
    with pytest.raises(SystemExit):
        last_line(module, "views", "--world-model", given["joint"], *shared)


def test_recipes_reads_ways_off_frames():
    """A camera that turns about its axis by a known angle, and a bar that goes from left to right."""
    module, angles = load("recipes"), np.linspace(0, 0.3, 8)
    turns = [[[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]] for a in angles]
    cache = SimpleNamespace(starts=np.array([0]), lengths=np.array([8]))
    poses = pack_pose(np.array(turns), np.arange(24.0).reshape(8, 3))
    ways = module.camera_ways(cache, poses)
    np.testing.assert_allclose(ways[:, 2], angles, atol=1e-6)
    np.testing.assert_allclose(ways[:, 3:], np.arange(24).reshape(8, 3) - np.arange(3), atol=1e-5)
    frames = np.zeros((8, 64, 64, 3), np.uint8)
    for k in range(8):
        frames[k, :, 8 * k : 8 * k + 8] = 255
    wanted = np.arange(8.0)[:, None]
    reader, scale = module.train_reader(frames, cache, wanted, steps=60)
    assert np.abs(module.read_ways(reader, scale, frames, frames, cache) - wanted).max() < 1.5


def test_curation_video(last_line, tmp_path):
    from moving_pictures import shot, write_video

    module = load("curation_video")
    for seed in range(7):
        write_video(tmp_path / f"{seed}.mp4", shot(seed, 30))
    figures = last_line(module, str(tmp_path))
    assert figures["num_videos"] == 6 and figures["shot_cuts"] == 2 * 11
    assert figures["shot_f1"] == pytest.approx(1, abs=0.1) and 0 < figures["text_recall"] <= 1
    for stage in ("examine", "transcode"):
        assert figures[f"{stage}_frames_per_s"] == pytest.approx(30 * figures[f"{stage}_clips_per_s"], rel=0.01)

    frames, cuts = module.edited([np.full((40, 2, 2, 3), k, np.uint8) for k in range(3)], 5, np.random.default_rng(0))
    starts = [t for t in range(1, len(frames)) if frames[t, 0, 0, 0] != frames[t - 1, 0, 0, 0]]
    assert starts == cuts and len(cuts) == 4
    text = module.captioned(np.full((2, 240, 320, 3), 90, np.uint8), np.random.default_rng(0))
    assert (text[0] == text[1]).all() and 0.002 < (text[0] != 90).any(axis=-1).mean() < 0.3


def test_data_efficiency(last_line, tmp_path):
    module, rng = load("data_efficiency"), np.random.default_rng(0)

    def episode(k: int) -> Episode:
        frames = rng.integers(0, 256, (5, 128, 128, 3), dtype=np.uint8)
        labels, meta = {"success": np.arange(5) == 4}, {"behaviour": "expert"}
        actions, poses = np.zeros((4, 7), np.float32), rng.uniform(-0.2, 0.2, (5, 7)).astype(np.float32)
        return Episode(frames, actions, poses, TASKS["push_cube"].instruction, str(k), "commanded", 1, labels, meta)

    write_dataset(tmp_path / "demos", [episode(k) for k in range(8)])
    given = ("--data", str(tmp_path / "demos"), "--kinds", "bc", "--tasks", "push_cube", "--out", str(tmp_path / "out"))
    found = last_line(module, *given, "--sizes", "2", "4", "8")
    assert found["quick"] and found["demos_for_scratch_100"] is None
    assert set(found["table"]["bc"]) == {"2", "4"}  # the quick run takes two sizes
    low, high = found["table"]["bc"]["4"]["interval"]
    assert 0 <= low <= found["table"]["bc"]["4"]["success"] <= high <= 1
    kept = tmp_path / "out" / "quick" / "bc_2_0.2.json"
    kept.write_text(json.dumps({"push_cube": 0.5}))  # what was found is not sought again
    assert last_line(module, *given, "--sizes", "2")["table"]["bc"]["2"]["success"] == 0.5
    low, high = module.interval([{"a": 0.25, "b": 0.75}] * 3, 24)
    assert low < 0.46 < 0.54 < high and high - low < 0.2


def test_rl_gain(last_line, tmp_path):
    module = load("rl_gain")
    torch.manual_seed(0)
    network = BCNetwork(BCConfig([TASKS["push_cube"].instruction], width=4, num_keypoints=2, hidden_dim=8))
    network.save(tmp_path / "weak")
    frames, labels = np.zeros((9, 128, 128, 3), np.uint8), {"success": np.zeros(9, bool)}
    poses, instruction = np.full((9, 7), 0.1, np.float32), TASKS["push_cube"].instruction
    begun = Episode(frames, np.zeros((8, 7), np.float32), poses, instruction, "0", "commanded", 1, labels)
    write_dataset(tmp_path / "demos", [begun])
    weak = str(tmp_path / "weak")
    given = ("--start", weak, "--cloned", weak, "--data", str(tmp_path / "demos"), "--tasks", "push_cube", "--arms",
             "imagined", "group", "twin", "--world-model", "scripted", "--cloning", "0", "--out",
             str(tmp_path / "out"))  # fmt: skip
    found = last_line(module, *given)
    assert found["quick"] and set(found["table"]) == {"start", "cloned", "imagined", "group", "twin"}
    assert found["table"]["start"]["gain"] == found["table"]["cloned"]["gain"] == 0
    assert found["gain"] == found["table"]["imagined"]["gain"] and -1 <= found["gap"] <= 1
    for arm in ("imagined", "group", "twin"):
        kept = json.loads((tmp_path / "out" / "quick" / f"{arm}_push_cube_0.2.json").read_text())
        assert kept["steps"] > 0 and set(kept) == {"steps", "true", "imagined"}
        kept["true"] = [True, True]
        (tmp_path / "out" / "quick" / f"{arm}_push_cube_0.2.json").write_text(json.dumps(kept))
    again = last_line(module, *given)["table"]  # what was found is not sought again
    assert again["imagined"]["gain"] == 1 - again["start"]["success"]
    gains = np.array([[0.0, 0.2, 0.4], [0.1, 0.3, 0.5]])
    low, high = module.interval(gains[:, :, None])  # one episode: seeds alone
    assert 0 < low < 0.25 < high < 0.5
    lower, higher = module.interval(gains[:, :, None] + np.array([-1.0, 1.0]))  # two that differ: wider
    assert lower < low - 0.2 and higher > high + 0.2


def test_near_misses(last_line, tmp_path, tiny_checkpoint):
    module = load("near_misses")

    def episode(index: int) -> Episode:
        rng = np.random.default_rng(index)
        frames = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
        actions, poses = rng.uniform(0, 0.05, (29, 7)).astype(np.float32), np.zeros((30, 7), np.float32)
        labels = {"grasped": np.where(np.arange(30) % 10 < 7, -1, 0), "object_positions": np.zeros((30, 6), np.float32)}
        return Episode(frames, actions, poses, "push", str(index), "commanded", 0, labels)

    write_dataset(tmp_path / "near", [episode(k) for k in range(4)])
    found = last_line(module, "--data", str(tmp_path / "near"), "--world-models", str(tiny_checkpoint))
    for row in found["table"][str(tiny_checkpoint)].values():
        assert 0 < row["grasps"] < row["moments"] <= 2 * 16 * 6
        assert row["expected"] > 0 and 0 <= row["auroc"] <= 1 and 0 <= row["overlooked"] <= 1
    chance, grasped = np.array([0.9, 0.6, 0.1, 0.02]), np.array([1.0, 0.0, 0.0, 1.0])
    told = module.figures_of(chance, grasped, soon=np.array([1.0, 0.0, 0.0, 1.0]))
    assert told["expected"] == pytest.approx(0.81) and told["sure_right"] == told["overlooked"] == told["auroc"] == 0.5
    nothing = module.figures_of(chance, 0 * grasped, 0 * grasped)
    assert nothing["expected"] is nothing["auroc"] is nothing["overlooked"] is None and nothing["sure_right"] == 0

    def world(task: str):
        settings = {"autoreset_mode": "Disabled", "uncertainty_limit": np.inf}
        return module.WorldModelBridgeVectorEnv(2, "scripted", task, **settings)

    class Rightwards:
        def reset(self, num_envs, **settings):
            self.count = 0

        def act(self, obs):
            self.count += 1  # what it does depends on when: whoever repeats must keep the order
            return np.full((len(obs["agent_pos"]), 7), 0.3 if self.count < 4 else -0.3, np.float32)

    env = world("reach_target")
    success, done = module.act(env, env.task_description, Rightwards())
    again, repeated = module.act(env, env.task_description, done)
    assert success.tolist() == again.tolist()
    np.testing.assert_array_equal(repeated, done)
    worlds = dict.fromkeys(["imagined", "twin"], partial(world, "reach_target"))
    same = module.exchanged(Rightwards(), worlds)
    assert set(same) == {"imagined", "imagined_in_twin", "twin", "twin_in_imagined"} and len(set(same.values())) == 1
