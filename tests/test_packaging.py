"""What is installed is what is in the tree, however it is installed, and torch finds the backend by its name."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import flashdp_compile

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPING = PROJECT["tool"]["setuptools"]["package-dir"]


def installed_names() -> set[str]:
    """Every file of the three folders, under the name that it has once installed."""
    names = set()
    for package, folder in MAPPING.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                names.add(f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}")
    return names


def python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=environment or None
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_folder_with_code_is_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == {name.rpartition("/")[0].replace("/", ".") for name in installed_names() if name.endswith(".py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: building in place would leave files behind, and find those of an earlier build."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in MAPPING.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(copy / "dist"),
        str(copy),
    ]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_the_tree(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    extra = {name for name in packed if ".dist-info/" not in name}
    assert extra == installed_names()
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_the_wheel_works_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import flashdp_compile.passes, flashdp_compile.kernels as k; print(k.__file__)"
    assert python(code, tmp_path, PYTHONPATH=str(tmp_path)).startswith(str(tmp_path))


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_one_copy_of_each_module_from_any_folder(place, tmp_path):
    code = "import flashdp_compile.passes as p, flashdp_compile.kernels as k; print(p.__file__, k.__file__)"
    found = python(code, ROOT if place == "root" else tmp_path).split()
    assert [Path(file) for file in found] == [ROOT / "passes/__init__.py", ROOT / "kernels/__init__.py"]


def test_torch_finds_the_backend():
    (found,) = entry_points(group="torch_dynamo_backends", name="flashdp")
    assert found.value == "flashdp_compile:backend"
    assert "flashdp" in torch._dynamo.list_backends()


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", flashdp_compile.__version__)
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "flashdp_compile._version.__version__"


def test_pins_lie_within_the_ranges_of_the_project():
    """CI must test what users are told to install."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    makefile = (ROOT / "Makefile").read_text()
    for name in ("torch", "triton"):
        pins[name] = re.search(rf"^{name.upper()}\s*:= (\S+)$", makefile, re.MULTILINE).group(1)
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["demo"], *extras["test"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.lower()]), (
            f"{text} does not allow {pins[wanted.name.lower()]}"
        )
