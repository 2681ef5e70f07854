"""The house rules that a linter cannot express: walls round libraries, light imports, sizes."""

import ast
import subprocess
import sys
import sysconfig
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tasks", "wfm_core", "worldsim", "envs", "policies")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

# library -> files that may import it, wherever in the file
ALLOWED = {
    "mujoco": ["envs/mujoco_*.py"],
    "gymnasium": ["envs/*.py", "policies/*_policy.py", "worldsim/commands/*.py"],
    "hydra": ["worldsim/commands/*.py"],
    "omegaconf": ["worldsim/commands/*.py"],
    "lerobot": ["*/lerobot_*.py"],
    "stable_baselines3": ["*/sb3_*.py"],
    "torchrl": ["*/torchrl_*.py"],
    "tensordict": ["*/torchrl_*.py"],
    "accelerate": ["wfm_core/distributed.py"],
    "transformers": ["wfm_core/models/text.py"],
    "ray": ["worldsim/processes.py"],
    "scenedetect": ["wfm_core/curation/split.py"],
    "httpx": ["wfm_core/curation/captions.py"],
}


def imported_libraries(source: str) -> set[str]:
    """Top-level names of every module imported anywhere in `source`, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def trespasses(path: str, source: str) -> list[str]:
    return [
        name
        for name in sorted(imported_libraries(source) & ALLOWED.keys())
        if not any(fnmatch(path, pattern) for pattern in ALLOWED[name])
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_third_party_walls(path):
    assert trespasses(path.relative_to(ROOT).as_posix(), path.read_text()) == []


def test_the_wall_test_sees_hidden_imports():
    source = "def f():\n    from mujoco.egl import GLContext\n    import hydra.core as h\n"
    assert trespasses("envs/spaces.py", source) == ["hydra", "mujoco"]
    assert trespasses("envs/mujoco_bridge.py", "import mujoco") == []
    assert trespasses("worldsim/evaluate.py", "import gymnasium as gym") == ["gymnasium"]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("tasks", {"torch", "mujoco", "gymnasium", "cv2", "av", "matplotlib"}),
        ("wfm_core", {"torch", "mujoco", "gymnasium"}),
        ("worldsim", {"torch", "mujoco", "gymnasium"}),
        ("envs", {"torch", "mujoco", "cv2", "av", "lerobot", "matplotlib"}),
        ("policies", {"torch", "mujoco", "lerobot", "stable_baselines3", "torchrl"}),
    ],
)
def test_importing_a_package_is_light(package, forbidden):
    code = f"import sys, {package}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(output.split()) & forbidden == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_console_script_explains_itself(script):
    path = Path(sysconfig.get_path("scripts")) / script
    output = subprocess.run([path, "--help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    module, _, _ = SCRIPTS[script].partition(":")
    purpose = ast.get_docstring(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()))
    assert purpose and purpose in output
    assert "\nSettings:\n" in output


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_setting_is_refused(script):
    path = Path(sysconfig.get_path("scripts")) / script
    result = subprocess.run([path, "nmu_episodes=1"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode != 0
    assert "nmu_episodes" in result.stderr


def test_every_dependency_is_constrained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = {wish.split("[")[0].split(">")[0].split("=")[0] for wish in wanted} - {"worldsim"}
    assert names - pinned == set()


def test_no_module_is_longer_than_400_lines():
    assert {str(path): n for path in MODULES if (n := len(path.read_text().splitlines())) > 400} == {}


def test_shipped_files_are_small():
    sizes = {
        path: path.stat().st_size for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()
    }
    assert {path.name: size for path, size in sizes.items() if size > 16 * 2**20} == {}
    assert sum(size for path, size in sizes.items() if path.is_relative_to(ROOT / "policies")) <= 25 * 2**20
