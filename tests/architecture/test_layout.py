"""What the import contracts cannot say: purity at run time, file sizes, names, what is shipped."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("scheduler", "engine", "serving", "loadgen", "deploy")
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
MAX_LINES = 400
BANNED_NAMES = {"utils", "helpers", "common", "base", "misc"}


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after the statement."""
    program = f"import sys\n{statement}\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def every_module(package: str) -> str:
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return "import " + ", ".join(names)


def test_the_scheduler_imports_nothing_but_the_standard_library():
    foreign = modules_after(every_module("scheduler")) - sys.stdlib_module_names
    assert {name for name in foreign if not name.startswith("_")} == {"scheduler"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import engine.core, engine.fake, engine.messages", {"torch", "ray", "asyncio"}),
        ("import engine.build", {"torch", "ray", "asyncio"}),
        ("import serving.cli", {"torch", "ray", "fastapi", "uvicorn", "tokenizers", "numpy"}),
        ("import serving.server", {"torch", "numpy", "ray", "ortools", "transformers"}),
        ("import serving.cluster.ray.session", {"torch", "ray", "cryptography"}),
        (every_module("engine"), {"ray", "fastapi", "tokenizers", "prometheus_client"}),
        (every_module("loadgen"), {"torch", "scheduler", "engine", "serving", "deploy"}),
        (every_module("deploy"), {"torch", "ray", "engine", "serving"}),
    ],
)
def test_what_is_heavy_is_imported_late(statement, absent):
    assert not modules_after(statement) & absent


def test_ray_is_imported_by_its_own_process_alone_however_late():
    """So neither what serves nor an instance can call it, for a request or for a token."""
    importing = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            if any(name.partition(".")[0] == "ray" for name in names):
                importing.add(path.relative_to(ROOT).as_posix())
    assert importing == {f"serving/cluster/ray/{name}.py" for name in ("backend", "opening")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_small_and_say_what_they_own(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES
    assert path.stem not in BANNED_NAMES
    assert ast.get_docstring(ast.parse(text)), "a module docstring says what the file owns"


def test_the_loop_is_short():
    assert (ROOT / "engine/core.py").read_text().count("\n") < 200


def test_tests_are_never_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(project["tool"]["scikit-build"]["wheel"]["packages"]) == sorted(PACKAGES)
