"""Turn a data set of any known format into a LeRobotDataset v3.0.

    worldsim-convert data=path/to/bridge_data_v2 out=runs/bridge size=128
    worldsim-convert data=path/to/lerobot_v2 out=runs/mine '+options={camera: observation.images.wrist}' relabel=true
    worldsim-convert data=path/to/videos out=runs/labelled size=128 actions_by=runs/inverse

Known are LeRobot v2 and v3, RLDS (TFRecord shards), JSON and mp4 (IRASim, Cosmos), raw BridgeData V2, its processed
copies (numpy lists, TFRecords of tensors), and mp4 and npz pairs. `options` go to the format's reader: camera, split,
state_key, ... (a wrong one is answered with what there is); '+options={views: {wrist: observation.images.wrist}}' keeps
what further cameras saw, too, each under a name. Actions come out in metres, radians and gripper openness, whatever
they went in as; with relabel=true they are what was reached from frame to frame instead of what was commanded, which
makes recordings of different delay alike: published copies of BridgeData mix them, and only the raw one says which is
which. With actions_by they are inferred from the frames, as are poses that are not known, so that video becomes
demonstrations; it names a folder of inverse dynamics (worldsim-train-policy recipe=inverse_dynamics). The frame rate
stays what it was. Interrupt it and start it again with the same settings: it goes on where it stopped. A damaged
episode stops it, and is named; worldsim-curate leaves such ones out and says which in its manifest.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra

from wfm_core.data.episode import UNKNOWN_ACTIONS, Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.lerobot_v3 import LeRobotV3Reader
from wfm_core.data.readers import open_dataset
from wfm_core.data.video import ENCODINGS
from worldsim.commands.entry import launch, register
from worldsim.recording import deciding, make_dataset

if TYPE_CHECKING:  # torch is slow to load
    from policies.inverse_dynamics import InverseDynamics


@dataclass
class ConvertConfig:
    """What to convert.

    Attributes:
        data: folder of the data set.
        out: folder of the new one.
        options: of the format's reader.
        size: height and width of the frames, whatever their aspect was; 0 leaves them as they are.
        relabel: replace actions by what was reached, for which the data must have proprioception.
        actions_by: folder of inverse dynamics, which infer actions, and poses that are not known, from the frames.
        encoding: "lossless" (pixels as they were decoded) or "compact" (yuv420p, plays everywhere).
        num_episodes: at most so many, the first ones; 0: all.
        workers: processes; 0 converts in this one.
    """

    data: str = ""
    out: str = "runs/converted"
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    relabel: bool = False
    actions_by: str = ""
    encoding: str = "lossless"
    num_episodes: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must be the folder of a data set, got nothing; say data=<folder>")
        if self.relabel and self.actions_by:
            raise ValueError("actions are either relabelled or inferred, got relabel=true and actions_by")
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding must be among {', '.join(ENCODINGS)}, got {self.encoding}")
        for name in ("size", "num_episodes", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")


def convert_episode(config: ConvertConfig, index: int) -> Episode:
    """Read episode `index` and bring it to what is asked for.

    Raises:
        DataError: it is damaged; names the file, and what does without it.
        ValueError: it has no actions, or no proprioception to relabel them by, or inverse dynamics want another size.
    """
    try:
        episode = _source(config.data, json.dumps(config.options))[index]
    except DataError as error:
        raise DataError(f"{error}; worldsim-curate leaves damaged episodes out and says which") from error
    if config.size:
        episode = episode.resized(config.size, config.size)
    if config.relabel:
        episode = episode.relabelled()
    if config.actions_by:
        episode = _inverse_dynamics(config.actions_by).label(episode)
    if episode.convention == UNKNOWN_ACTIONS:
        raise ValueError(
            f"a data set of episodes needs actions, got frames only in {episode.episode_id}; actions_by infers them"
        )
    return episode


@lru_cache(maxsize=1)
def _source(data: str, options: str) -> EpisodeSequence:
    return open_dataset(data, **json.loads(options))


@lru_cache(maxsize=1)
def _inverse_dynamics(folder: str) -> "InverseDynamics":
    import torch

    from policies.inverse_dynamics import load_inverse_dynamics

    torch.set_num_threads(1)  # each process has its own
    return load_inverse_dynamics(folder)


def run(config: ConvertConfig) -> None:
    """Convert what is missing and print where it is.

    Raises:
        ValueError: no data set, a wrong option, a damaged episode, or `out` holds something else.
        OSError: the disk is full; what is converted so far is kept.
    """
    try:
        source = _source(config.data, json.dumps(config.options))
    except TypeError as error:
        raise ValueError(f"options are not those of the reader of {config.data}: {error}") from error
    out, available = Path(config.out), len(source)
    make_dataset(
        out,
        partial(convert_episode, config),
        min(config.num_episodes or available, available),
        command="convert",
        settings=deciding(config),
        defaults=asdict(ConvertConfig(data=config.data)),
        encoding=config.encoding,
        fps=source.fps,
        workers=config.workers,
    )
    reader = LeRobotV3Reader(out)
    frames = sum(reader.length(k) for k in range(len(reader)))
    print(f"{len(reader)} episodes, {frames} frames in {out.resolve()}")


register("convert", ConvertConfig, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="convert")
def main(config: Any) -> None:
    """Run the console script."""
    launch("convert", config, ConvertConfig, run)


if __name__ == "__main__":
    main()
