"""Post-train a world model on a robot's own data, and say whether it obeys that robot's actions.

    worldsim-posttrain init=bridge-nano-ar 'data=[path/to/mine]' 'held_out=[path/to/rest]' out=runs/mine
    worldsim-posttrain init=bridge-nano-diffusion method=lora rank=16 'data=[...]' 'held_out=[...]' out=runs/lora
    worldsim-posttrain 'data=[...]' 'held_out=[...]' out=runs/other '+options={convention: own, action_key: action}'

Data sets of any known format (see worldsim-convert --help). First the tokenizer's decoder learns how they look
(decoder_steps=400). The first line keeps the pretrained action projection, for Bridge-style actions; another robot's
actions (convention=own), of any size, get a new one, zero at first, and bounds read off the data.
freeze=[layers,position] keeps parts as they are; frame_size=192 changes the size of the frames; text_encoder=bytes has
the model read the instruction; rays=true tells it from where a moving camera looks;
'cameras=[observation.images.image_0,observation.images.wrist]' has it imagine two views together. actions=none learns
from frames alone; what comes out is post-trained with actions later, which takes fewer episodes that have any.

A killed run goes on from its last checkpoint. `out`/checkpoint loads as any other; `out`/posttrain.json says which
weights were loaded, new or left, how well held-out episodes are imagined before and after, and what others' actions and
none do to them; `out`/before_after.*.mp4 show it. Settings of the loop are given as, say,
+train.num_steps=500.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch

from wfm_core.checkpoint import as_json, build_config, load_world_model
from wfm_core.data.actions import CONTROL_HZ
from wfm_core.data.files import write_atomic
from wfm_core.data.video import VideoEncoding, encode_video
from wfm_core.encoding import encode_frames
from wfm_core.fidelity import action_fidelity, by_episode
from wfm_core.lora import merge_lora
from wfm_core.memory import keep_freed_memory
from wfm_core.metrics import psnr
from wfm_core.models.patch_world_model import PatchWorldModel
from wfm_core.rollouts import first_rows, imagined_frames
from wfm_core.train import TrainConfig, fit
from worldsim.commands.entry import launch, register, training_bar
from worldsim.posttraining import TRAIN, PosttrainCommand, Prepared, keep, prepare, teach_decoder

SHOWN = 4  # held-out episodes in the video
_ENCODING = VideoEncoding("libx264", "yuv420p", (("crf", "20"), ("preset", "fast")))


def run(command: PosttrainCommand) -> dict[str, Any]:
    """Adapt, train, keep, and judge; returns what `posttrain.json` holds."""
    if command.threads:
        torch.set_num_threads(command.threads)
    keep_freed_memory()
    torch.manual_seed(command.seed)
    began = time.perf_counter()
    out = Path(command.out)
    settings = build_config(TrainConfig, TRAIN | command.train, Path("train"))
    made = prepare(command)
    print(made.report)
    if command.decoder_steps:
        bar, show = training_bar(command.decoder_steps, "decoder")
        teach_decoder(command, made, show)
        bar.close()
    bar, show = training_bar(settings.num_steps, "posttrain")
    # These decide nothing of the network, or the loop knows them itself.
    rest = ("out", "caches", "num_judged", "threads", "device", "decoder_steps", "train")
    made_of = {name: value for name, value in asdict(command).items() if name not in rest}
    made.model.to(command.device)
    weights = fit(made.model, made.batches, settings, out / "dynamics", batches=made_of, on_log=show)
    bar.close()
    made.model.load_state_dict(weights)
    merge_lora(made.model)
    keep(command, out / "checkpoint", made, made.model.state_dict())
    found = {
        "report": asdict(made.report),
        "actions": as_json(made.config.actions),
        "steps": settings.num_steps,
        "minutes": (time.perf_counter() - began) / 60,
        "held_out": [_judge(command, made, k) for k in range(len(made.held_out))],
    }
    write_atomic(out / "posttrain.json", (json.dumps(found, indent=1) + "\n").encode())
    print(f"{settings.num_steps} steps done; checkpoint in {out / 'checkpoint'}, figures in {out / 'posttrain.json'}")
    return found


def _judge(command: PosttrainCommand, made: Prepared, k: int) -> dict[str, Any]:
    """Roll episodes of held-out data set k out before and after, say how well, and film both."""
    folder, cache = command.held_out[k], made.held_out[k]
    out, real = Path(command.out), np.concatenate(list(encode_frames(made.tokenizer, cache)))
    model = load_world_model(out / "checkpoint")
    assert isinstance(model, PatchWorldModel)
    codec = model.codec
    frames = np.asarray(cache.frames)
    actions = np.full_like(cache.columns["actions"], np.nan) if made.action_free else cache.columns["actions"]
    pictures = {"copy": frames[first_rows(cache)]}
    if made.comparable:
        pictures["before"] = imagined_frames(load_world_model(command.init), codec, cache, real, actions)
    pictures["after"] = imagined_frames(model, codec, cache, real, actions)
    figures: dict[str, Any] = {"data": folder, "episodes": len(cache)}
    figures |= {f"{name}_db": float(by_episode(cache, psnr(shown, frames)).mean()) for name, shown in pictures.items()}
    shown = [frames, *pictures.values()]
    end = int(cache.lengths[:SHOWN].sum())
    video = np.concatenate([each[:end] for each in shown], axis=2)
    name = f"before_after.{k}.mp4"
    write_atomic(out / name, encode_video(video, fps=CONTROL_HZ, encoding=_ENCODING))
    said = ", ".join(f"{name} {figures[f'{name}_db']:.2f} dB" for name in pictures)
    print(f"{folder}: {said} on {len(cache)} held-out episodes; {out / name} shows true, {', '.join(pictures)}")
    if not made.action_free:
        given = (pictures["after"], made.config.actions, made.caches, command.seed)
        probe = action_fidelity(model, codec, cache, real, *given)
        print(f"{folder}: {probe}")
        found = {name: None if value != value else value for name, value in asdict(probe).items()}  # JSON has no NaN
        figures["actions"] = {"follows": probe.follows, **found}
    return figures


register("posttrain", PosttrainCommand, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="posttrain")
def main(config: Any) -> None:
    """Run the console script."""
    launch("posttrain", config, PosttrainCommand, run)


if __name__ == "__main__":
    main()
