import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet
import pytest
import worldsim_fakes
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import envs
from tasks import TASKS
from worldsim.commands import rank
from worldsim.commands.rank import RankConfig, prepare, run
from worldsim.processes import locked


def composed(*overrides):
    with initialize_config_module("worldsim.commands.conf", version_base=None):
        return OmegaConf.to_object(compose("rank", overrides=list(overrides)))


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text('{"kind": "scripted", "noise": 0.0}')
    return folder


def test_command_line_is_what_it_was():
    assert {field.name: field.default for field in fields(RankConfig)} == {
        "policies": "all",
        "tasks": "all",
        "world_model": "bridge-nano-ar",
        "num_episodes": 24,
        "twin": True,
        "out": "runs/rank",
        "seed": 0,
        "num_envs": 16,
        "workers": 0,
        "device": "auto",
        "num_videos": 4,
        "num_probe_episodes": 6,
        "uncertainty_limit": None,
    }


def test_one_name_or_a_list_of_names():
    assert composed("policies=a", "tasks=[x,y]", "uncertainty_limit=0.5") == RankConfig(
        policies=["a"], tasks=["x", "y"], uncertainty_limit=0.5
    )
    assert composed() == RankConfig()
    with pytest.raises(Exception, match="num_episodez"):
        composed("num_episodez=3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_episodes": 0}, "num_episodes must be at least 1, got 0"),
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"policies": []}, "policies must name at least one"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RankConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["stack_cubse"]}, "got 'stack_cubse'; did you mean 'stack_cubes'"),
        ({"policies": ["no_such_policy"]}, "policy 'no_such_policy' cannot be loaded"),
        ({"world_model": "no-such-model"}, "no-such-model"),
        ({"device": "gpu"}, "device must be"),
    ],
)
def test_unknown_names_are_told_before_anything_runs(checkpoint, changes, message):
    config = RankConfig(**({"policies": [str(checkpoint)], "world_model": "scripted"} | changes))
    with pytest.raises(ValueError, match=message):
        prepare(config)


def test_damaged_policy_is_named(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"policy '{checkpoint}' cannot be loaded"):
        prepare(RankConfig(policies=[str(checkpoint)], world_model="scripted"))


def test_prepared_contest_pairs_both_worlds(checkpoint, tmp_path):
    other = tmp_path / "elsewhere" / "mine"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"kind": "scripted", "noise": 0.5}')
    config = RankConfig(
        policies=[str(checkpoint), str(other)], tasks="push_cube", world_model="scripted", num_episodes=5
    )
    contest, _ = prepare(config)
    assert list(contest.policies) == [str(checkpoint), str(other)]  # folders of one name go by their paths
    assert len(set(contest.hashes.values())) == 2
    assert contest.instructions == {"push_cube": TASKS["push_cube"].instruction}
    assert len(contest.pairs) == 5
    assert contest.twin
    assert contest.twin.hash != contest.imagined.hash
    assert json.loads(contest.twin.settings["push_cube"]) == {"max_episode_steps": TASKS["push_cube"].max_episode_steps}
    assert json.loads(contest.imagined.settings["push_cube"])["uncertainty_limit"] == pytest.approx(0.2)
    again, _ = prepare(config)
    assert (again.hashes, again.imagined.hash, again.twin and again.twin.hash) == (
        contest.hashes,
        contest.imagined.hash,
        contest.twin.hash,
    )
    alone, _ = prepare(RankConfig(policies=str(checkpoint), world_model="scripted", twin=False, uncertainty_limit=9.0))
    assert list(alone.policies) == ["mine"]
    assert alone.twin is None
    assert list(alone.instructions) == list(TASKS)
    assert json.loads(alone.imagined.settings["push_cube"])["uncertainty_limit"] == 9.0


def test_imagined_env_is_ready_to_evaluate(checkpoint):
    contest, judge = prepare(
        RankConfig(policies=str(checkpoint), tasks="push_cube", world_model="scripted", twin=False)
    )
    env = contest.imagined.make_env("push_cube", 3)
    assert env.num_envs == 3
    assert env.rules.uncertainty_limit == pytest.approx(0.2)  # ty: ignore
    assert env.autoreset_mode.name == "DISABLED"  # ty: ignore
    env.close()
    assert callable(judge)


def test_run_writes_everything_and_says_where(tmp_path, monkeypatch, capsys, threads):
    contest = worldsim_fakes.contest(twin=False)
    monkeypatch.setattr(rank, "prepare", lambda config: (contest, worldsim_fakes.judge))
    out = tmp_path / "out"
    run(RankConfig(out=str(out), workers=1))
    printed = capsys.readouterr().out
    for name in ("report.html", "ranking.json", "episodes.parquet"):
        assert str(out / name) in printed
    ranking = json.loads((out / "ranking.json").read_text())
    assert [policy["name"] for policy in ranking["policies"]] == ["good", "fair", "poor"]
    assert ranking["world_model"] == {"name": "bridge-nano-ar", "hash": "imagined-hash"}
    assert ranking["provenance"]["command"].startswith("worldsim-rank")
    assert pyarrow.parquet.read_table(out / "episodes.parquet").num_rows == 144
    lines = [line.split()[1] for line in printed.splitlines() if line[:1].isdigit()]
    assert lines == ["good", "fair", "poor"]


def test_one_folder_one_command(tmp_path, monkeypatch, threads):
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by another process"):
        run(RankConfig(out=str(tmp_path), workers=1))


@pytest.mark.parametrize(
    "error", [ValueError("bad thing"), OSError("disk full"), RuntimeError("worker"), KeyboardInterrupt()]
)
def test_main_ends_with_one_line(monkeypatch, error):
    def fail(config):
        raise error

    monkeypatch.setattr(rank, "run", fail)
    monkeypatch.setattr(sys, "argv", ["worldsim-rank"])
    with pytest.raises(SystemExit) as ended:
        rank.main()
    expected = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    assert expected in str(ended.value.code)


def test_episodes_of_another_twin_are_not_taken_for_this_ones(tmp_path, monkeypatch):
    envs_dir = tmp_path / "envs"
    shutil.copytree(Path(envs.__file__).parent, envs_dir)
    monkeypatch.setattr(envs, "__file__", str(envs_dir / "__init__.py"))
    seen = {rank._twin_world().hash}
    for name, more in (("assets/widowx250s.xml", "<!-- stiffer -->"), ("vector.py", "x = 1\n"), ("info.py", "x = 1\n")):
        with open(envs_dir / name, "a") as file:
            file.write(more)
        seen.add(rank._twin_world().hash)
    assert len(seen) == 4
