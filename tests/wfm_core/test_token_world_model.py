import pytest
import torch

from wfm_core.checkpoint import load_world_model
from wfm_core.models.autoregressive import AutoregressiveConfig
from wfm_core.models.decoding import TransformerModel
from wfm_core.models.motion import Contact
from wfm_core.models.revealing import AutoregressiveModel
from wfm_core.models.token_world_model import TokenWorldModel
from wfm_core.models.transformer_config import TransformerConfig
from wfm_core.tokenizers.patch import to_float, to_uint8
from wfm_core.world_model import Reference, merge_rows, repeat_rows


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tiny_transformer"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(folder) -> TokenWorldModel:
    return load_world_model(folder, dtype=torch.float32)


def some_frames(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*shape, 32, 32, 3), dtype=torch.uint8, generator=generator)


def some_actions(*shape: int) -> torch.Tensor:
    return 0.05 * torch.rand(*shape, 7, generator=torch.Generator().manual_seed(1))


def test_encoding_a_clip_is_encoding_its_frames(model):
    frames = some_frames(2, 3)
    latents = model.encode(frames)
    assert latents.shape == (2, 3, *model.latent_shape) == (2, 3, 2, 2, 3) and latents.dtype == torch.float32
    assert torch.equal(latents[1, 2], model.tokenizer.encode(to_float(frames[1, 2:]))[0])
    with pytest.raises(ValueError, match=r"\(B, T, \(32, 32, 3\)\), got \(1, 2, 16, 32, 3\)"):
        model.encode(torch.zeros(1, 2, 16, 32, 3, dtype=torch.uint8))


def test_latents_and_tokens_say_the_same_in_the_same_order(model):
    latents = model.encode(some_frames(2, 3))
    actions = some_actions(2, 3)
    state = model.start(latents, actions[:, :2], [1, 2])
    tokens = model.tokenizer.fsq.to_indices(latents[:, -1])
    for row in range(2):
        for column in range(2):
            assert torch.equal(state["tokens"][:, 2 * row + column].long(), tokens[:, row, column])
    for step in (model.step, model.step_token_by_token):
        after, predicted, uncertainty = step(state, actions[:, 2])
        expected, doubt = getattr(model.dynamics, step.__name__)(state, actions[:, 2])
        assert torch.equal(after["tokens"], expected["tokens"]) and torch.equal(uncertainty, doubt)
        assert predicted.shape == (2, 2, 2, 3) and uncertainty.shape == (2,)
        assert torch.equal(model.tokenizer.fsq.to_indices(predicted).flatten(1, 2), after["tokens"].long())
        again = model.start(predicted[:, None], actions[:, :0], [1, 2])
        assert torch.equal(again["tokens"], after["tokens"])


def test_decoding_is_the_tokenizers_in_pixels(model):
    frames = some_frames(2, 2)
    latents = model.encode(frames)
    decoded = model.decode(latents[:, 1], Reference(frames[:, 0], latents[:, 0]))
    assert decoded.shape == (2, *model.frame_shape) and decoded.dtype == torch.uint8
    expected = model.tokenizer.decode(latents[:, 1], to_float(frames[:, 0]), latents[:, 0])
    assert torch.equal(decoded, to_uint8(expected))


def test_a_start_needs_no_gradient_and_rows_are_independent(folder):
    training = load_world_model(folder, dtype=torch.float32).requires_grad_(True)
    frames, actions = some_frames(3, 2), some_actions(3, 2)
    latents = training.encode(frames)
    state = training.start(latents, actions[:, :1], [1, 2, 3])
    _, predicted, _ = training.step(state, actions[:, 1])
    decoded = training.decode(predicted, Reference(frames[:, 1], latents[:, 1]))
    assert not any(value.requires_grad for value in (*state.values(), predicted, decoded))
    row = training.start(latents[2:], actions[2:, :1], [3])
    assert torch.equal(training.step(row, actions[2:, 1])[1], predicted[2:])


def test_states_branch_and_merge(model):
    frames, actions = some_frames(2, 2), some_actions(4, 3)
    state = model.start(model.encode(frames), actions[:2, :1], [1, 2], ["push", "pull it"])
    before = {name: value.clone() for name, value in state.items()}
    branches, _, _ = model.step(repeat_rows(state, 2), actions[:, 1])
    alone, latents, _ = model.step(state, actions[[1, 3], 1])
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)
    assert torch.equal(branches["tokens"][[1, 3]], alone["tokens"])
    merged = merge_rows(torch.tensor([False, True]), state, alone)
    again, after, _ = model.step(merged, actions[:2, 2])
    assert torch.equal(after[0], model.step(alone, actions[:2, 2])[1][0])
    assert torch.equal(after[1], model.step(state, actions[:2, 2])[1][1])


def test_who_reads_is_told_what_to_do(tiny_checkpoint, tiny_transformer):
    latents, actions = torch.zeros(2, 1, 2, 2, 3), some_actions(2, 1)
    doubts = {}
    for folder in (tiny_checkpoint, tiny_transformer):
        model = load_world_model(folder, dtype=torch.float32)
        for texts in (None, ("", ""), ("push", "lift"), ("push", "pull the whole drawer")):
            state = model.start(latents, actions[:, :0], [1, 2], texts)
            doubts[folder, texts] = model.step(state, actions[:, 0])[2]
    deaf = [doubts[tiny_checkpoint, texts] for _, texts in doubts if _ == tiny_checkpoint]
    assert all(torch.equal(deaf[0], other) for other in deaf)
    silent, empty, two, other = (value for (folder, _), value in doubts.items() if folder == tiny_transformer)
    torch.testing.assert_close(silent, empty)
    assert (silent != two).all() and two[1] != other[1]
    torch.testing.assert_close(two[0], other[0])  # however long the other row's text is


def test_half_precision_reads_the_same_tokens(folder, model):
    half = load_world_model(folder, dtype=torch.bfloat16)
    frames, actions = some_frames(2, 2), some_actions(2, 2)
    latents = half.encode(frames)
    assert torch.equal(latents, model.encode(frames))
    begun = half.start(latents, actions[:, :1], [0, 1]) | {"next_contact": torch.full((2,), Contact.FREE)}
    state, predicted, uncertainty = half.step(begun, actions[:, 1])
    assert predicted.dtype == torch.float32 and state["cache1.0"].dtype == torch.bfloat16
    assert ((0 <= uncertainty) & (uncertainty <= 1)).all()
    reference = Reference(frames[:, 1], latents[:, 1])
    difference = half.decode(predicted, reference).float() - model.decode(predicted, reference).float()
    assert difference.abs().mean() < 2  # of 255
    if "travel" in state:  # a sum of many small numbers: float32
        torch.testing.assert_close(state["travel"], actions[:, :2, :6].sum(dim=1))


def test_parts_that_do_not_fit_are_refused(model):
    for changes in ({"levels": (5, 4, 4)}, {"grid": 3}):
        sizes = {"levels": (5, 4, 3), "grid": 2, "width": 8, "num_heads": 1, "num_layers": 2, "time_layers": (1,)}
        config = AutoregressiveConfig(**sizes | changes)
        with pytest.raises(ValueError, match="must share"):
            TokenWorldModel(model.tokenizer, AutoregressiveModel(config))
    more = {"levels": (5, 4, 3), "groups": 1, "width": 12, "head_dim": 6, "num_layers": 1, "num_cameras": 2}
    larger = TransformerModel(TransformerConfig(**more, grid=(3, 2)))
    with pytest.raises(ValueError, match=r"share cells and levels, got .*\(1, 2, 2\).* and .*\(2, 3, 2\)"):
        TokenWorldModel(model.tokenizer, larger)
    both = TokenWorldModel(model.tokenizer, TransformerModel(TransformerConfig(**more, grid=(2, 2))))
    assert both.frame_shape == (64, 32, 3) and both.latent_shape == (4, 2, 3)  # one camera's above the other's
