"""Episodes in, episodes out: formats, conversions, the clip cache and its sampler."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wfm_core.data.episode import Episode


def open_dataset(path: Path | str, **options: Any) -> Sequence[Episode]:
    """Open a data set of any known format; see `wfm_core.data.readers.open_dataset`."""
    from wfm_core.data import readers  # the readers load video and table libraries, which most importers do not need

    return readers.open_dataset(path, **options)
