"""Plants known bugs, one at a time, and sees whether the tests find them: `make mutants`.

Each `*.patch` here is one bug that others shipped, as a tired engineer would write it into this
tree: first a comment with its name, what happened where, and the tests to run if not all of the
quick ones; then the diff. It is applied to a temporary copy, never to the tree itself. Ends with 1
if a bug is not found, if a patch no longer fits the code, or if the tests fail without any patch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
QUICK_TESTS = (
    "tests/properties",
    "tests/scheduler",
    "tests/engine/test_batch.py",
    "tests/engine/test_core.py",
    "tests/engine/test_decision_log.py",
    "tests/engine/test_isolation.py",
    "tests/engine/test_resume.py",
)
NUM_SCHEDULES = "150"
TEST_LIMIT_S, RUN_LIMIT_S = 60, 240
PASSED, FAILED = 0, 1  # of pytest: all passed; tests ran, and some failed


@dataclass(frozen=True)
class Mutant:
    name: str
    path: Path
    tests: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Mutant:
        header = re.match(r"(?:#.*\n)+", path.read_text())
        lines = header[0].splitlines() if header else []
        if (
            len(lines) < 2
            or lines[0] != f"# {path.stem}"
            or "# the bug at others: " not in lines[1]
        ):
            raise SystemExit(f"{path}: its first lines must be its name and the bug at others")
        tests = [line.removeprefix("# tests: ") for line in lines if line.startswith("# tests: ")]
        return cls(path.stem, path, tuple(" ".join(tests).split()) or QUICK_TESTS)


@dataclass(frozen=True)
class Verdict:
    name: str
    is_caught: bool
    by: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them if none is named")
    names = parser.parse_args().names
    mutants = [Mutant.read(path) for path in sorted(Path(__file__).parent.glob("*.patch"))]
    unknown = set(names) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in mutants if not names or mutant.name in names]
    tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    start_s = time.monotonic()
    print(f"without a patch, {len(tests)} files and folders of tests: ", end="", flush=True)
    complaint = complaint_without_patch(tests)
    print(complaint or f"pass, {time.monotonic() - start_s:.1f} s", flush=True)
    if complaint:
        return 1
    verdicts = []
    for number, mutant in enumerate(mutants, start=1):
        print(f"{number:2} of {len(mutants)}  {mutant.name:32}", end="", flush=True)
        verdicts.append(judge(mutant))
        print(f"{verdicts[-1].seconds:5.1f} s  {verdicts[-1].by}", flush=True)
    report(verdicts)
    print(f"\n{time.monotonic() - start_s:.0f} s in all")
    return 0 if all(verdict.is_caught for verdict in verdicts) else 1


def report(verdicts: list[Verdict]) -> None:
    print("\n| bug | found by | s |\n|---|---|---|")
    for verdict in verdicts:
        print(f"| {verdict.name} | {verdict.by} | {verdict.seconds:.1f} |")
    missed = [verdict.name for verdict in verdicts if not verdict.is_caught]
    print(f"\n{len(verdicts) - len(missed)} of {len(verdicts)} found", end="")
    print(f"; NOT FOUND: {', '.join(missed)}" if missed else "")


def complaint_without_patch(tests: tuple[str, ...]) -> str:
    """Return what is wrong before any bug is planted; nothing if all is well."""
    with TemporaryDirectory(prefix="mutant-") as folder:
        copy = copy_tree(Path(folder))
        code, output = run_tests(copy, tests)
        if code != PASSED:
            return f"FAIL\n{output}"
        # A module that cannot be imported must stop the tests, or they import another tree.
        (copy / "scheduler/kv/blocks.py").write_text("raise ImportError('this is the copy')\n")
        code, output = run_tests(copy, ("tests/scheduler/test_pool.py",))
        if code == PASSED or "this is the copy" not in output:
            return f"FAIL: the tests of a copy do not import the copy\n{output}"
    return ""


def judge(mutant: Mutant) -> Verdict:
    start_s = time.monotonic()
    with TemporaryDirectory(prefix="mutant-") as folder:
        copy = copy_tree(Path(folder))
        applied = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", str(mutant.path)],
            cwd=copy, env={**os.environ, "GIT_CEILING_DIRECTORIES": folder},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if applied.returncode:
            reason = f"NOT RUN, THE PATCH DOES NOT APPLY: {applied.stderr.strip().splitlines()[0]}"
            return Verdict(mutant.name, False, reason, time.monotonic() - start_s)
        code, output = run_tests(copy, mutant.tests)
    seconds = time.monotonic() - start_s
    if code == PASSED:
        return Verdict(mutant.name, False, "NOBODY", seconds)
    if code != FAILED:
        print(output)
        return Verdict(mutant.name, False, "NOT RUN, THE TESTS DO NOT START", seconds)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return Verdict(mutant.name, True, found[1] if found else "no test by name", seconds)


def copy_tree(folder: Path) -> Path:
    """Copy the tracked files as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_tests(copy: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run the tests of a copy until one fails. A run that does not end has failed."""
    command = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider")
    env = {**os.environ, "PYTHONPATH": str(copy), "HOCKET_SCHEDULES": NUM_SCHEDULES}
    try:
        done = subprocess.run(
            [*command, f"--timeout={TEST_LIMIT_S}", *tests],
            cwd=copy, env=env, capture_output=True, text=True, check=False, timeout=RUN_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return FAILED, "FAILED (the tests did not end)"
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
