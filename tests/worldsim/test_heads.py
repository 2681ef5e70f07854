import shutil
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from tasks import REWARD_TERMS
from wfm_core.train import TrainConfig, fit
from worldsim.heads import AGENT_POS_CENTRE, AGENT_POS_SCALE, Heads, HeadsConfig, HeadsOutput, load_heads

CONFIG = HeadsConfig(("push", "stack"), (2, 3, 4), width=64, num_heads=2, num_layers=1, corruption=0.0)


@pytest.fixture
def heads() -> Heads:
    torch.manual_seed(0)
    heads = Heads(CONFIG)
    torch.nn.init.normal_(heads.embed_instruction.weight)
    torch.nn.init.zeros_(heads.obeyed_head.weight)
    torch.nn.init.constant_(heads.obeyed_head.bias, 1e4)  # an arm that does what it is told
    return heads.eval()


def some_batch(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    return {
        "latents": uniform(size, 2, 2, 3, 4),
        "agent_pos": uniform(size, 2, 7) * torch.tensor(AGENT_POS_SCALE) + torch.tensor(AGENT_POS_CENTRE),
        "actions": uniform(size, 2, 7) * torch.tensor([0.05] * 3 + [0.25] * 3 + [1.0]),
        "instruction_id": torch.randint(0, 2, (size,), generator=generator),
        "reference": uniform(size, 2, 3, 4),
        "reward_terms": (uniform(size, 4) > 0).float(),
        "failure": uniform(size) > 0,
        "seed": torch.tensor(0),
    }


def read(heads: Heads, batch: dict[str, torch.Tensor], **changes: torch.Tensor) -> HeadsOutput:
    values = {
        "latents": batch["latents"],
        "agent_pos": batch["agent_pos"][:, 0],
        "actions": batch["actions"],
        "instruction_id": batch["instruction_id"],
        "reference": batch["reference"],
    }
    return heads.read(**values | changes)


def test_instructions_are_numbered_and_others_refused(heads):
    assert [heads.instruction_id(text) for text in ("push", "stack")] == [0, 1]
    with pytest.raises(ValueError, match=r"can judge \['push', 'stack'\], got 'psh'; did you mean 'push'\?"):
        heads.instruction_id("psh")


def test_outputs_are_probabilities_and_rows_are_independent(heads):
    batch = some_batch(5)
    out = read(heads, batch)
    assert out.reward_terms.shape == (5, len(REWARD_TERMS)) and out.agent_pos.shape == (5, 7)
    assert torch.equal(out.success, out.reward_terms[:, REWARD_TERMS.index("success")])
    for values in (out.reward_terms, out.failure):
        assert ((0 < values) & (values < 1)).all() and values.dtype == torch.float32
    row = read(heads, {name: value[3:4] for name, value in batch.items() if value.ndim})
    for field in fields(out):
        torch.testing.assert_close(getattr(row, field.name)[0], getattr(out, field.name)[3])


@pytest.mark.parametrize("name", ["latents", "agent_pos", "actions", "instruction_id"])
def test_every_input_matters(heads, name):
    batch = some_batch(4)
    other = {"latents": batch["latents"].flip(1), "agent_pos": batch["agent_pos"][:, 1]}
    other |= {"actions": -batch["actions"], "instruction_id": 1 - batch["instruction_id"]}
    out, changed = read(heads, batch), read(heads, batch, **{name: other[name]})
    for field in fields(out):
        assert (getattr(out, field.name) != getattr(changed, field.name)).any()


def test_poses_are_in_metres_radians_and_openness(heads):
    with torch.no_grad():
        heads.arm_head.weight.zero_()
        heads.arm_head.bias.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0, 0.25, 1.0, 1.0]))
    pose = torch.tensor([[0.45, -0.25, 0.25, 0.0, 0.2, 1.6, 1.0]])
    seen = []
    heads.embed_arm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    high = torch.tensor([[0.05, 0.05, 0.05, 0.25, 0.25, 0.25, 1.0]])
    actions = torch.stack([-high, high], dim=1)
    out = read(heads, some_batch(1), agent_pos=pose - F.pad(high[:, :-1], (0, 1)), actions=actions)
    torch.testing.assert_close(out.agent_pos, pose)  # where commands lead is where the arm is seen
    read(heads, some_batch(1), agent_pos=pose, actions=actions)
    torch.testing.assert_close(seen[1], torch.tensor([[1.0, -1.0, 0.5, 0.0, 0.25, 1.0, 1.0] + [1.0] * 7]))


def test_commands_say_where_the_arm_is_until_sight_objects(heads):
    with torch.no_grad():
        heads.arm_head.weight.zero_()
        heads.arm_head.bias.zero_()  # seen: the centre
        heads.arm_response.copy_(torch.tensor([[0.2], [0.8]]).expand(2, 6))

    def moved(off: list[float], actions: list[list[float]]) -> torch.Tensor:
        """Where the arm is said to be, beside the centre."""
        centre = torch.tensor(AGENT_POS_CENTRE)
        pose = centre + torch.tensor(off)
        return read(heads, some_batch(1), agent_pos=pose[None], actions=torch.tensor([actions])).agent_pos[0] - centre

    near = moved([0.0] * 7, [[0.01, 0, 0, 0, 0, 0.1, 0], [0.005, 0, 0, 0, 0, 0.2, 0]])
    torch.testing.assert_close(near, torch.tensor([0.006, 0, 0, 0, 0, 0.18, 0]))
    with torch.no_grad():
        heads.obeyed_head.bias.copy_(torch.tensor([0.25 / 0.75]).log())  # logit of a quarter
    blocked = moved([0.0] * 7, [[0.01, 0, 0, 0, 0, 0.1, 0], [0.005, 0, 0, 0, 0, 0.2, 0]])
    torch.testing.assert_close(blocked, near / 4)
    # A quarter of 80 mm is within the tolerance, so a quarter of the way from what is seen; the fingers are as seen.
    far = moved([0.08, 0, 0, 0, 0, 0.4, 0.3], [[0.0] * 7] * 2)
    torch.testing.assert_close(far, torch.tensor([0.02, 0, 0, 0, 0, 0.1, 0]))


def test_the_loss_by_hand(heads):
    """With the heads' weights at zero, every probability is a half and every pose seen the centre."""
    with torch.no_grad():
        for layer in (heads.judge_head, heads.arm_head):
            layer.weight.zero_()
            layer.bias.zero_()
        heads.arm_response.copy_(torch.tensor([[0.5], [0.0]]).expand(2, 6))
        heads.obeyed_head.bias.copy_(torch.tensor([0.8 / 0.2]).log())
    batch = some_batch(6)
    loss, metrics = heads(batch)
    scale = torch.tensor(AGENT_POS_SCALE)
    error = ((batch["agent_pos"][:, 1] - torch.tensor(AGENT_POS_CENTRE)) / scale).abs()
    huber = torch.where(error < 0.05, error.square() / 0.1, error - 0.025).mean()
    free, followed = (batch["agent_pos"][:, 0, :6] + k * 0.5 * batch["actions"][:, 0, :6] for k in (1, 0.8))
    late = ((batch["agent_pos"][:, 1, :6] - free) / scale[:6]).abs()
    huber += torch.where(late < 0.01, late.square() / 0.02, late - 0.005).mean()
    commanded = 0.5 * batch["actions"][:, 0, :3]
    went = batch["agent_pos"][:, 1, :3] - batch["agent_pos"][:, 0, :3]
    part = ((went * commanded).sum(dim=1) / (commanded * commanded).sum(dim=1)).clamp(0, 1)
    assert 0 < (part == 1).sum() < 6 and (part == 0).any()  # some hands went as far as they were told to, some back
    nll = -part * torch.tensor(0.8).log() - (1 - part) * torch.tensor(0.2).log()
    obedience = (nll * commanded.norm(dim=1)).sum() / commanded.norm(dim=1).sum()
    torch.testing.assert_close(loss, 5 * torch.tensor(2.0).log() + 10 * huber + obedience)
    truth = batch["reward_terms"][:, REWARD_TERMS.index("success")]
    assert metrics["success_accuracy"] == pytest.approx(1 - truth.mean().item())
    off = batch["agent_pos"][:, 1, :6] - followed
    for name, metres in (("seen", error[:, :6] * scale[:6]), ("followed", off)):
        assert metrics[f"{name}_error_mm"] == pytest.approx(1000 * metres[:, :3].abs().mean().item(), rel=1e-4)


def test_training_disturbs_latents_and_the_pose_before_by_the_batch_seed():
    torch.manual_seed(0)
    heads, seen = Heads(HeadsConfig(("push", "stack"), (2, 3, 4), 64, 2, 1, corruption=0.25)), []
    heads._look = lambda *args: (seen.append(args), torch.zeros(400, 8, 64))[1]  # ty: ignore
    batch = some_batch(400)
    for seed in (0, 0, 1):
        heads(batch | {"seed": torch.tensor(seed)})
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][0], seen[2][0])
    touched = (seen[0][0] != batch["latents"]).any(dim=-1).float().mean()
    assert touched == pytest.approx(0.25, abs=0.03) and seen[0][0].abs().max() <= 1
    noise = (seen[0][1] - batch["agent_pos"][:, 0]) / torch.tensor(AGENT_POS_SCALE)
    torch.testing.assert_close(noise.std(dim=0), torch.full((7,), 0.05), atol=0.006, rtol=0)


def test_a_few_examples_are_learnt_by_heart(tmp_path):
    torch.manual_seed(0)
    heads, batch = Heads(CONFIG), some_batch(12)
    config = TrainConfig(num_steps=150, learning_rate=4e-3, warmup_steps=10, ema_decay=0.9, bf16=False)
    heads.load_state_dict(fit(heads, lambda step: batch | {"seed": torch.tensor(step)}, config, tmp_path))
    out = read(heads.eval(), batch)
    assert torch.equal(out.reward_terms > 0.5, batch["reward_terms"] > 0.5)
    assert torch.equal(out.failure > 0.5, batch["failure"])
    assert ((out.agent_pos - batch["agent_pos"][:, 1]) / torch.tensor(AGENT_POS_SCALE)).abs().mean() < 0.1


def test_heads_load_from_a_checkpoint_or_say_what_is_missing(tiny_checkpoint, tmp_path):
    heads = load_heads(tiny_checkpoint)
    assert not heads.training and heads.judge_head.weight.dtype == torch.float32
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "heads.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"heads\.safetensors is damaged"):
        load_heads(folder)
    (folder / "heads.safetensors").unlink()
    with pytest.raises(ValueError, match=r"copy lacks heads\.safetensors"):
        load_heads(folder)
    (folder / "config.json").write_text('{"kind": "autoregressive"}')
    with pytest.raises(ValueError, match=r"must describe the part 'heads'"):
        load_heads(folder)


def test_the_frame_in_which_imagination_began_counts_if_asked_for():
    batch = some_batch(6)
    for reference in (False, True):
        torch.manual_seed(0)
        heads = Heads(HeadsConfig(("push", "stack"), (2, 3, 4), 16, 2, 1, reference=reference))
        torch.nn.init.normal_(heads.judge_head.weight)
        told = read(heads, batch).success != read(heads, batch, reference=-batch["reference"]).success
        assert bool(told.all()) == bool(told.any()) == reference
        loss, _ = heads(batch)
        other, _ = heads(batch | {"reference": -batch["reference"]})
        assert bool(loss != other) == reference


def test_patches_of_cells_are_read_as_one():
    torch.manual_seed(0)
    config = HeadsConfig(("push", "stack"), (2, 4, 3), 16, 2, 1, patch_size=2)
    heads = Heads(config)
    assert heads.position.shape == (2, 16)
    latents = torch.rand(1, 2, 2, 4, 3)
    seen = []
    heads.embed_cells.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    heads.read(latents, torch.zeros(1, 7), torch.zeros(1, 2, 7), torch.zeros(1, dtype=torch.int64), latents[:, 0])
    left = torch.cat([latents[0, t, :, :2].flatten() for t in (0, 1)])
    torch.testing.assert_close(seen[0][0, 0], left)
    with pytest.raises(ValueError, match=r"patch_size must divide \(2, 3\), got 2"):
        HeadsConfig(("push",), (2, 3, 4), patch_size=2)


def test_where_things_are_is_said_cell_by_cell():
    torch.manual_seed(0)
    plain, heads = (
        Heads(HeadsConfig(("push", "stack"), (2, 4, 4), 16, 2, 1, patch_size=2, places_weight=weight))
        for weight in (0.0, 0.5)
    )
    heads.load_state_dict(plain.state_dict(), strict=False)
    latents = torch.rand(3, 2, 2, 4, 4)
    batch = some_batch(3) | {"latents": latents, "reference": latents[:, 0]}
    places = torch.full((3, 2, 3), torch.nan)
    loss, told = heads(batch | {"places": places})
    assert loss == plain(batch)[0] and told["places_off"] == 0
    with torch.no_grad():  # cell (1, 2), the third of the second patch, says a gripper is 0.2 to its right
        heads.place_head[1].bias.view(4, 8)[2, :3] = torch.tensor([50.0, 0.2, 0.0])
    places[:, 0] = torch.tensor([(2.5 + 0.2) / 4, 1.5 / 2, 0.0])
    assert heads(batch | {"places": places})[1]["places_off"] < 1e-6
    places[:, 0, 0] = (1.5 + 0.2) / 4  # in the first patch, where the same is said of its fourth cell
    assert heads(batch | {"places": places})[1]["places_off"] == pytest.approx(0.2, abs=1e-5)
