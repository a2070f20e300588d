"""One version in all places, and a release check that finds what it looks for."""

import importlib.util
import re
import zipfile
from pathlib import Path

import pytest

import mmkern

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "release/check.py").exists(), reason="not a checkout")


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "release/check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_stands_in_one_place(check):
    assert check.version() == mmkern.__version__
    text = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "mmkern.__version__" }' in text
    assert not re.search(r'^version = "', text, re.M)
    assert f"version: {mmkern.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_version_without_changelog_or_tag_is_a_fault(check):
    faults = list(check.faults_of_texts("99.9"))
    assert [fault.split()[0] for fault in faults] == ["CHANGELOG.md", "CITATION.cff", "the"]


def test_workflows_run_what_ci_runs():
    assert "run: bash .ci/run" in (ROOT / ".github/workflows/test.yml").read_text()
    assert re.search(r"run: make .*wheel", (ROOT / ".github/workflows/wheels.yml").read_text())


@pytest.fixture
def contents(check):
    """What a wheel of this checkout holds."""
    info = "mmkern-0.1.0.dist-info"
    files = {f"{info}/METADATA": "License-Expression: Apache-2.0\n", f"{info}/licenses/LICENSE": "", "mmkern/_C.so": ""}
    for here, there in check.PACKAGES.items():
        for path in (ROOT / here).rglob("*"):
            if path.suffix in (".py", ".pyi", ".typed"):
                files[f"{there}/{path.relative_to(ROOT / here)}"] = ""
    return files


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"mmkern/ops/softmax.py": None}, "modules differ"),
        ({"mmkern/ops/removed_since.py": ""}, "modules differ"),
        ({"mmkern.libs/libtorch_cpu.so": ""}, "holds what is not ours"),
        ({"mmkern/libgomp.so.1": ""}, "no library of others"),
        ({"mmkern/_C.so": None}, "expected mmkern/_C"),
        ({"mmkern-0.1.0.dist-info/licenses/LICENSE": None}, "its licence"),
    ],
)
def test_what_a_wheel_must_hold(check, contents, tmp_path, change, fault):
    path = tmp_path / "mmkern-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in (contents | change).items():
            if text is not None:
                wheel.writestr(name, text)
    found = list(check.faults_of_wheel(path, "0.1.0"))
    assert (not found) if fault is None else any(fault in each for each in found), found


def test_a_wheel_that_only_this_machine_can_install_is_a_fault(check, contents, tmp_path):
    path = tmp_path / "mmkern-0.1.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in contents.items():
            wheel.writestr(name, text)
    assert [fault.split(": ")[1] for fault in check.faults_of_wheel(path, "0.1.0")] == [
        "no platform that others can install"
    ]
