import subprocess
import sys
from dataclasses import replace

import pytest

from policies.lerobot_train import ACTTrainConfig
from policies.recipes import SHIPPED, ScriptedConfig
from policies.train import BCTrainConfig, WFMTrainConfig
from worldsim.commands import train_policy
from worldsim.commands.train_policy import TrainPolicyCommand, plan, run


def command(tmp_path, **settings):
    return TrainPolicyCommand(data=[], out=str(tmp_path), **settings)


def test_plans_one_policy(tmp_path):
    bc, act = BCTrainConfig(num_demos=3), ACTTrainConfig(encoder="e")
    assert plan(command(tmp_path, recipe="bc", bc=bc)) == {tmp_path: bc}
    assert plan(command(tmp_path, recipe="act", act=act)) == {tmp_path: act}
    wfm = WFMTrainConfig(initialised=False)
    assert plan(command(tmp_path, recipe="wfm", wfm=wfm)) == {tmp_path: wfm}
    assert plan(command(tmp_path, recipe="bc_30_demos")) == {tmp_path: SHIPPED["bc_30_demos"]}


def test_plans_the_shipped_set_with_its_own_encoder(tmp_path):
    planned = plan(command(tmp_path, recipe="shipped"))
    assert [path.name for path in planned] == list(SHIPPED)
    act = SHIPPED["act_30_demos"]
    assert isinstance(act, ACTTrainConfig)
    assert planned[tmp_path / "act_30_demos"] == replace(act, encoder=str(tmp_path / "bc_all_demos"))


def test_refuses_what_it_would_ignore(tmp_path):
    with pytest.raises(ValueError, match="bc.* settings need recipe=bc, got recipe=act"):
        plan(command(tmp_path, recipe="act", bc=BCTrainConfig(seed=1)))
    with pytest.raises(ValueError, match="nearest: 'bc_30_demos'"):
        plan(command(tmp_path, recipe="bc_30"))


def test_leaves_complete_policies_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_policy, "SHIPPED", {"a": ScriptedConfig(0.1), "b": ScriptedConfig(0.2)})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "CARD.md").write_text("done")
    run(command(tmp_path, recipe="shipped"))
    assert not (tmp_path / "a" / "config.json").exists()
    assert (tmp_path / "b" / "config.json").exists()
    assert "[1/2]" in capsys.readouterr().out


def test_the_command_line(tmp_path):
    line = [sys.executable, "-m", "worldsim.commands.train_policy", "data=[]", f"out={tmp_path}/s"]
    done = subprocess.run([*line, "recipe=scripted_noise_40"], capture_output=True, text=True, check=True)
    assert f"{tmp_path}/s" in done.stdout
    assert '"noise": 0.4' in (tmp_path / "s" / "config.json").read_text()
    misspelt = subprocess.run([*line, "bc.num_demo=3"], capture_output=True, text=True)
    assert misspelt.returncode
    assert "num_demo" in misspelt.stderr


def test_nothing_is_learnt_from_nothing(tmp_path):
    with pytest.raises(ValueError, match="data must name at least one data set"):
        run(command(tmp_path, recipe="bc"))
