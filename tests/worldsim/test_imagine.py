import json

import numpy as np
import pytest

from policies.demonstrations import load_demonstrations
from wfm_core.data import open_dataset
from worldsim.caches import open_caches
from worldsim.commands import imagine
from worldsim.commands.imagine import ImagineConfig, run


@pytest.fixture
def policy(tmp_path):
    """Goes where the scripted world's goal is."""

    class Right:
        def reset(self, num_envs, **_):
            pass

        def act(self, obs):
            ahead = 0.2 - (obs["pixels"][:, 0, 0, 0].astype(np.float32) - 127) / 1000
            actions = np.zeros((len(ahead), 7), np.float32)
            actions[:, 0] = (ahead * 20).clip(-1, 1)
            return actions

    return Right()


@pytest.fixture
def config(tmp_path, policy, monkeypatch):
    monkeypatch.setattr("policies.load_policy", lambda name: policy)
    return ImagineConfig(
        policy="right", out=str(tmp_path / "out"), tasks=["push_cube", "reach_target"], num_episodes=5, num_envs=2,
        world_model="scripted", uncertainty_limit=np.inf,
    )  # fmt: skip


def test_everything_tried_is_kept_if_asked_for(config, capsys):
    config.keep = "all"
    run(config)
    assert "10 of 10 imagined episodes" in capsys.readouterr().out
    episodes = open_dataset(config.out)
    assert [episode.episode_id for episode in episodes][:3] == ["push_cube-0-0", "push_cube-1-1", "push_cube-2-2"]
    first = episodes[0]
    assert first.meta["behaviour"] == "imagined" and first.meta["world_model"] == "scripted"
    assert first.instruction.startswith("push") and first.convention == "commanded"
    moved = np.diff(first.agent_pos[:, :3], axis=0)
    np.testing.assert_allclose(moved, first.actions[:, :3], atol=1e-5)
    run(config)  # complete: left as it is
    assert "10 of 10" in capsys.readouterr().out


def test_what_fails_in_imagination_is_left_out(config, monkeypatch, capsys, tmp_path):
    evaluate = imagine.evaluate

    def half(policy, env, pairs, cell, *, on_record, **kw):
        def judged(record, trace):
            object.__setattr__(record, "success", record.seed % 2 == 0)
            on_record(record, trace)

        return evaluate(policy, env, pairs, cell, on_record=judged, **kw)

    monkeypatch.setattr(imagine, "evaluate", half)
    run(config)
    assert "6 of 10 imagined episodes" in capsys.readouterr().out
    assert all(episode.labels["success"][-1] for episode in open_dataset(config.out))
    (cache,) = open_caches([config.out])
    assert len(load_demonstrations([cache.directory], ["imagined"]).first) == 6
    monkeypatch.setattr(imagine, "evaluate", lambda *a, on_record, **k: half(*a, on_record=lambda r, t: (
        object.__setattr__(r, "success", False), on_record(r, t)), **k))  # fmt: skip
    config.out = str(tmp_path / "none")
    with pytest.raises(ValueError, match="none of 10 imagined episodes succeeded; keep=all"):
        run(config)


def test_a_killed_run_goes_on(config, monkeypatch, tmp_path):
    config.keep = "all"
    run(config)
    whole = [episode.frames for episode in open_dataset(config.out)]
    config.out = str(tmp_path / "parts")
    evaluate, calls = imagine.evaluate, []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(imagine, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    run(config)
    assert len(calls) == 3 + 4  # six parts, two of them done before the kill
    for one, other in zip(whole, open_dataset(config.out), strict=True):
        np.testing.assert_array_equal(one, other.frames)
    assert json.loads((tmp_path / "parts" / "imagine.json").read_text())["num_episodes"] == 5


def test_bad_input_is_told(tmp_path):
    with pytest.raises(ValueError, match="policy must name who acts"):
        run(ImagineConfig(out=str(tmp_path)))
    with pytest.raises(ValueError, match="keep must be one of"):
        ImagineConfig(keep="best")
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        ImagineConfig(num_envs=0)
    with pytest.raises(ValueError, match="tasks must be among .*'push'"):
        run(ImagineConfig(policy="scripted", world_model="scripted", tasks=["push"], out=str(tmp_path / "o")))
