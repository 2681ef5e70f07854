import json
import shutil

import pytest
import torch

from wfm_core import checkpoint
from wfm_core.checkpoint import (
    as_json,
    build_config,
    build_tokenizer,
    find_checkpoint,
    load_patch_tokenizer,
    load_tokenizer,
    load_weights,
    load_world_model,
    read_config,
    read_part,
    save_weights,
    write_config,
)
from wfm_core.models.autoregressive import AutoregressiveConfig
from wfm_core.models.diffusion_config import DiffusionConfig
from wfm_core.models.latent_world_model import LatentWorldModel
from wfm_core.models.positions import RopeConfig
from wfm_core.models.token_world_model import TokenWorldModel
from wfm_core.models.transformer_config import TransformerConfig
from wfm_core.precision import compute_dtype
from wfm_core.tokenizers.patch import PatchTokenizer, PatchTokenizerConfig
from wfm_core.tokenizers.video import VideoTokenizer


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def test_weights_come_back_rounded_to_half_and_then_stay(tmp_path):
    module = torch.nn.Linear(5, 3)
    module.register_buffer("count", torch.tensor(70_000))
    save_weights(tmp_path / "new", "part", module.state_dict())
    loaded = torch.nn.Linear(5, 3)
    loaded.register_buffer("count", torch.tensor(0))
    assert load_weights(loaded, tmp_path / "new", "part") is loaded and not loaded.training
    for name, value in module.state_dict().items():
        rounded = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], rounded) and loaded.state_dict()[name].dtype == value.dtype
    before = (tmp_path / "new" / "part.safetensors").read_bytes()
    save_weights(tmp_path / "new", "part", loaded.state_dict())
    assert (tmp_path / "new" / "part.safetensors").read_bytes() == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["part.safetensors"]


def test_channels_last_weights_keep_their_values(tmp_path):
    conv = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    save_weights(tmp_path, "part", conv.state_dict())
    loaded = load_weights(torch.nn.Conv2d(4, 6, 3), tmp_path, "part")
    assert torch.equal(loaded.weight, conv.weight.half().float())


def test_a_loaded_world_model_is_the_saved_one(folder):
    first, second = load_world_model(folder, dtype=torch.float32), load_world_model(str(folder), dtype=torch.float32)
    assert isinstance(first, TokenWorldModel)
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 2, 32, 32, 3), dtype=torch.uint8, generator=generator)
    latents = first.encode(frames)
    rollouts = []
    for model in (first, second):
        state = model.start(latents, torch.full((2, 1, 7), 0.01), [1, 2])
        rollouts.append(model.step(state, torch.full((2, 7), 0.02))[1])
    assert torch.equal(*rollouts)
    assert torch.equal(load_tokenizer(folder).from_latents.weight, first.tokenizer.from_latents.weight)
    half = load_world_model(folder, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():  # the encoder keeps float32, so that tokens stay the same
        assert parameter.dtype == (torch.float32 if name.startswith("tokenizer.encoder.") else torch.bfloat16)
    assert torch.equal(half.encode(frames), latents)
    assert load_world_model(folder).dynamics.position.dtype == compute_dtype(torch.device("cpu"))


def test_a_diffusion_model_comes_back_with_the_same_bits(tiny_diffusion, tiny_checkpoint, tmp_path):
    first, second = (load_world_model(tiny_diffusion, dtype=torch.float32) for _ in range(2))
    assert isinstance(first, LatentWorldModel) and first.dynamics.config.latent_std == (0.5, 0.4, 0.3)
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    save_weights(tmp_path / "again", "dynamics", first.dynamics.state_dict())
    weights = [folder / "dynamics.safetensors" for folder in (tmp_path / "again", tiny_diffusion)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    frames = torch.randint(0, 256, (2, 2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = []
    for model in (first, second):
        state = model.start(model.encode(frames), torch.full((2, 1, 7), 0.01), [1, 2], ["push", "pull it"])
        made.append(model.step(state, torch.full((2, 7), 0.02))[1])
    assert torch.equal(*made)
    half = load_world_model(tiny_diffusion, dtype=torch.bfloat16)
    assert torch.equal(half.encode(frames), first.encode(frames)) and half.dynamics.dtype == torch.bfloat16
    config = read_config(tiny_diffusion)
    assert build_config(DiffusionConfig, config["dynamics"], tmp_path) == first.dynamics.config
    with pytest.raises(ValueError, match="needs a discrete tokenizer, got CI16x16 patch"):
        load_patch_tokenizer(tiny_diffusion, discrete=True)
    with pytest.raises(ValueError, match="needs a continuous tokenizer, got DI16x16 patch"):
        load_patch_tokenizer(tiny_checkpoint, discrete=False)
    mixed = shutil.copytree(tiny_checkpoint, tmp_path / "mixed")
    shutil.copyfile(tiny_diffusion / "dynamics.safetensors", mixed / "dynamics.safetensors")
    write_config(mixed, read_config(mixed) | {"kind": "diffusion", "dynamics": config["dynamics"]})
    with pytest.raises(ValueError, match="mixed: needs a continuous tokenizer, got DI16x16 patch"):
        load_world_model(mixed)


def test_the_configuration_survives_json(folder):
    for cls, part in ((AutoregressiveConfig, "dynamics"), (PatchTokenizerConfig, "tokenizer")):
        config = build_config(cls, read_part(folder, part), folder)
        assert build_config(cls, json.loads(json.dumps(as_json(config))), folder) == config
        assert isinstance(config.levels, tuple)


def test_a_configuration_within_a_configuration():
    config = TransformerConfig(grid=(2, 3), rope=RopeConfig(extension=2.0, trained_frames=9))
    assert build_config(TransformerConfig, json.loads(json.dumps(as_json(config))), "here") == config
    with pytest.raises(ValueError, match="here/config.json: extension must be of type .*float.*, got '2'"):
        build_config(TransformerConfig, {"rope": {"extension": "2"}}, "here")
    with pytest.raises(ValueError, match="here/config.json: rope must be of type .*RopeConfig.*, got 2"):
        build_config(TransformerConfig, {"rope": 2}, "here")


def test_a_tokenizer_of_either_kind_comes_back(folder, tmp_path):
    assert "kind" not in read_part(folder, "tokenizer") and isinstance(load_tokenizer(folder), PatchTokenizer)
    torch.manual_seed(0)
    sizes = {"kind": "video", "space_factor": 8, "time_factor": 4, "levels": [8, 5], "dims": [8, 8], "num_heads": 2}
    made, values = build_tokenizer(sizes, tmp_path)
    save_weights(tmp_path / "video", "tokenizer", made.state_dict())
    write_config(tmp_path / "video", {"tokenizer": values})
    loaded = load_tokenizer(tmp_path / "video")
    assert isinstance(loaded, VideoTokenizer) and loaded.config == made.config and not loaded.training
    assert loaded.config.levels == (8, 5) and loaded.config.window == 16  # the settings left out, too
    for name, value in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float())
    with pytest.raises(ValueError, match="video: needs a tokenizer of kind 'patch', got DV4x8x8"):
        load_patch_tokenizer(tmp_path / "video")
    write_config(folder, read_config(folder) | {"tokenizer": {"kind": "wavelet"}})
    with pytest.raises(ValueError, match=r"kind must be one of \['patch', 'video'\], got 'wavelet'"):
        load_world_model(folder)


def test_writing_a_configuration_replaces_it_whole(tmp_path):
    write_config(tmp_path / "a" / "b", {"kind": "x"})
    write_config(tmp_path / "a" / "b", {"kind": "y"})
    assert read_config(tmp_path / "a" / "b") == {"kind": "y"}
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


def test_shipped_names_and_paths_are_found_and_the_nearest_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHIPPED_DIR", tmp_path)
    assert find_checkpoint("copy") == folder == find_checkpoint(folder)
    with pytest.raises(ValueError, match=r"no checkpoint 'cpoy'.*shipped \['copy'\]; did you mean 'copy'\?"):
        find_checkpoint("cpoy")
    with pytest.raises(ValueError, match=r"no checkpoint 'zzz'.*\['copy'\]$"):
        load_world_model("zzz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder with config.json"):
        find_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("part", ["tokenizer", "dynamics"])
def test_missing_damaged_and_unfitting_weights_are_named(folder, part):
    path = folder / f"{part}.safetensors"
    data = path.read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"\xff" * 40):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{part}\.safetensors is damaged"):
            load_world_model(folder)
    weights = torch.nn.Linear(2, 2).state_dict()
    save_weights(folder, part, weights)
    with pytest.raises(ValueError, match=rf"{part}\.safetensors does not fit its config\.json"):
        load_world_model(folder)
    path.unlink()
    with pytest.raises(ValueError, match=rf"lacks {part}\.safetensors"):
        load_world_model(folder)


def test_weights_that_are_more_or_fewer_than_the_model_has_are_refused(tmp_path):
    full = torch.nn.Linear(3, 2).state_dict()
    for weights in ({"weight": full["weight"]}, full | {"extra": torch.zeros(1)}, full | {"bias": torch.zeros(3)}):
        save_weights(tmp_path, "part", weights)
        with pytest.raises(ValueError, match="does not fit"):
            load_weights(torch.nn.Linear(3, 2), tmp_path, "part")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": ', r"config\.json is damaged"),
        (b"\xff\xfe\x00", r"config\.json is damaged"),
        ("[1]", "must hold a JSON object, got list"),
        ('{"kind": "mamba"}', "kind must be 'autoregressive', 'transformer', 'diffusion' or 'irasim', got 'mamba'"),
        ("{}", "kind must be 'autoregressive', 'transformer', 'diffusion' or 'irasim', got None"),
        ('{"kind": "diffusion"}', r"config\.json must describe the part 'dynamics', got only \['kind'\]"),
        ('{"kind": "autoregressive"}', r"config\.json must describe the part 'dynamics', got only \['kind'\]"),
    ],
)
def test_a_damaged_configuration_is_named(folder, text, message):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_world_model(folder)


def test_a_configuration_that_does_not_fit_is_named(folder, tmp_path):
    config = read_config(folder)
    write_config(folder, config | {"dynamics": config["dynamics"] | {"widht": 3}})
    with pytest.raises(ValueError, match=r"copy/config\.json does not fit AutoregressiveConfig:.*'widht'"):
        load_world_model(folder)
    for name, value in (("width", "16"), ("levels", 5), ("temperature", None), ("num_layers", True)):
        write_config(folder, config | {"dynamics": config["dynamics"] | {name: value}})
        with pytest.raises(ValueError, match=rf"copy/config\.json: {name} must be of type .*, got {value!r}"):
            load_world_model(folder)
    write_config(folder, config | {"tokenizer": config["tokenizer"] | {"levels": [5, 4, 4]}})
    with pytest.raises(ValueError, match="must share"):
        load_world_model(folder)
    with pytest.raises(ValueError, match=r"nowhere lacks config\.json"):
        read_config(tmp_path / "nowhere")
