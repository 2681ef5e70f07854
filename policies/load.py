"""One function that loads any policy from a shipped name or a path."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldsim.protocols import Policy

if TYPE_CHECKING:  # torch is slow to load
    from policies.actor import ActorNetwork

CHECKPOINT_DIR = Path(__file__).parent / "checkpoints"

KINDS = ("bc", "lerobot", "sb3", "scripted", "torchrl", "wfm")
"""Values of "kind" in a checkpoint's config.json; a plain LeRobot folder has LeRobot's "type" instead."""

NOT_CONTENT = ("CARD.md",)
"""Files of a checkpoint that do not change what the policy does."""


def shipped_policies() -> list[str]:
    """Return the names of the policies in the package, sorted."""
    return sorted(path.parent.name for path in CHECKPOINT_DIR.glob("*/config.json"))


def policy_path(name_or_path: str | Path) -> Path:
    """Return the checkpoint folder (or SB3 .zip file) that a shipped name or a path stands for.

    Raises:
        ValueError: it is neither; the message names the nearest shipped policy.
    """
    names = shipped_policies()
    if str(name_or_path) in names:
        return CHECKPOINT_DIR / str(name_or_path)
    path = Path(name_or_path)
    if path.exists():
        return path
    nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)
    hint = f"; nearest shipped policy: {nearest[0]!r}" if nearest else ""
    raise ValueError(f"a policy must be an existing path or a shipped name, got {str(name_or_path)!r}{hint}")


def load_policy(name_or_path: str | Path) -> Policy:
    """Load a policy, ready for `reset` and `act`.

    Args:
        name_or_path: a name of `shipped_policies()`, a checkpoint folder (config.json with "kind" and weights), a
            folder written by LeRobot's `save_pretrained`, or a Stable-Baselines3 .zip file. Such a .zip holds
            pickled objects: load it only if you trust where it comes from.

    Raises:
        ValueError: unknown name, or a missing or damaged file, which the message names.
        ImportError: the policy's library is not installed; the message says how to.
    """
    path = policy_path(name_or_path)
    if path.suffix == ".zip":
        from policies.sb3_policy import load_sb3

        return load_sb3(path)
    config = _read_config(path)
    kind = config.get("kind", "lerobot" if "type" in config else None)
    if kind == "bc":
        from policies.bc import load_bc

        return load_bc(path)
    if kind == "wfm":
        from policies.wfm_policy import load_wfm

        return load_wfm(path)
    if kind == "scripted":
        from policies.scripted_vision import VisionScriptedPolicy

        if set(config) != {"kind", "noise"}:
            raise ValueError(f"{path / 'config.json'} must have the keys kind and noise, got {sorted(config)}")
        if not isinstance(config["noise"], int | float):
            raise ValueError(f"{path / 'config.json'}: noise must be a number, got {config['noise']!r}")
        return VisionScriptedPolicy(noise=config["noise"])
    if kind == "lerobot":
        from policies.lerobot_policy import load_lerobot

        return load_lerobot(path)
    if kind == "sb3":
        from policies.sb3_policy import load_sb3

        return load_sb3(path / config.get("file", "model.zip"), config.get("algorithm"), config.get("world_model"))
    if kind == "torchrl":
        from policies.torchrl_policy import load_torchrl

        return load_torchrl(path)
    nearest = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.0)[0]
    raise ValueError(f"{path / 'config.json'}: kind must be one of {KINDS}, got {kind!r}; nearest: {nearest!r}")


def load_network(name_or_path: str | Path) -> "ActorNetwork":
    """Load the network of a policy that predicts action chunks, to be trained on.

    Raises:
        ValueError: unknown name, a missing or damaged file, or a policy of another kind.
    """
    from policies import bc, wfm_policy

    path = policy_path(name_or_path)
    loaders = {"bc": bc.load_network, "wfm": wfm_policy.load_network}
    kind = _read_config(path).get("kind")
    if kind not in loaders:
        raise ValueError(f"the policy must be of kind {' or '.join(loaders)}, got {kind!r} in {path}")
    return loaders[kind](path)


def policy_hash(name_or_path: str | Path) -> str:
    """Return 16 hex digits that change with any byte of the checkpoint (but its card); names and places do not matter.

    Raises:
        ValueError: unknown name or path.
    """
    path = policy_path(name_or_path)
    digest = hashlib.sha256()
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name not in NOT_CONTENT)
    )
    for file in files:
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _read_config(path: Path) -> dict[str, Any]:
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{config_path} must be the configuration of a policy: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} must hold a JSON object, got {type(config).__name__}")
    return config
