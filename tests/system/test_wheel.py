"""The built wheel, alone in an environment, started from a folder that has our names in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import urllib.request
import venv
import zipfile

import pytest

from tests.serving.servers import REPOSITORY

PACKAGES = {"scheduler", "engine", "serving", "loadgen", "deploy"}


def build(tmp_path_factory, **environment):
    """Build as a user's pip would, but for the optimiser: nothing computes with these kernels.

    The build tools are those of this environment.
    """
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    subprocess.run(
        ["git", "-C", str(REPOSITORY), "checkout-index", "-a", f"--prefix={source}/"], check=True
    )
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out), str(source)],
        check=True,
        capture_output=True,
        env=os.environ | {"CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0"} | environment,
    )
    (path,) = out.glob("hocket-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory)


def test_without_a_compiler_the_wheel_lacks_nothing_but_the_kernels(wheel, tmp_path_factory):
    pure = build(tmp_path_factory, CXX="false")
    assert pure.name.endswith("py3-none-any.whl")
    whole, rest = (
        {name for name in zipfile.ZipFile(path).namelist() if ".dist-info" not in name}
        for path in (wheel, pure)
    )
    (kernels,) = whole - rest
    assert kernels.startswith("engine/kernels/_native.")
    assert not rest - whole


def test_the_wheel_holds_the_five_packages_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == PACKAGES
    assert "engine/py.typed" in names


def test_the_installed_wheel_serves_from_a_folder_with_our_names(wheel, tmp_path):
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    # What Hocket depends on comes from this environment; a .pth adds the path, not its .pth files,
    # so the editable install of this checkout is not among it.
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    foreign = tmp_path / "work"
    for name in ("engine", "scheduler", "serving"):
        (foreign / name).mkdir(parents=True)
        (foreign / name / "__init__.py").write_text("raise ImportError('the wrong package')")
    script = home / "bin" / "hocket"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(
        [str(script), "serve", "--fake", "--port", "0"],
        cwd=foreign,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = next(
                found[1]
                for line in process.stdout
                if (found := re.search(r"at (http\S+)/v1", line))
            )
            request = urllib.request.Request(
                f"{url}/v1/completions",
                json.dumps({"prompt": "hello", "max_tokens": 4}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=30) as response:
                answer = json.load(response)
            assert answer["usage"]["prompt_tokens"] == 5
        finally:
            process.kill()
