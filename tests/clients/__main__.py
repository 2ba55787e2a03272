"""Runs unmodified clients against real servers, each in an environment of its own.

    python -m tests.clients [NAME ...] [--envs FOLDER]     or: make clients ARGS="openai_sdk"

Each script of this folder says in its first lines what it needs:

    # env NAME: packages for pip            one environment; several lines, several runs
    # host-packages                         it also sees this interpreter's packages (torch)
    # server: flags of `hocket serve`       without --fake it is the real model
    # tenants: NAME ...                     with the key NAME-0123456789abcdef; else no keys

It is called with the server's URL, the model's name and the model's folder (or `-`), prints one
line for each thing that it saw hold, and fails with a traceback. Environments are kept; those that
`tests.bench.clients` uses (hocket-peers/NAME in the cache) are taken as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import site
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from serving.progress import NoProgress
from serving.store.local import resolve
from tests.serving.servers import running_server

FOLDER = Path(__file__).parent
_TIMEOUT_S = 1200


@dataclass(frozen=True, slots=True)
class ClientScript:
    path: Path
    environments: dict[str, list[str]]
    sees_host_packages: bool
    server_flags: list[str]
    tenants: list[str]


def read_script(path: Path) -> ClientScript:
    """Return what the head of a script says. Raises ValueError for a line that is not known."""
    environments: dict[str, list[str]] = {}
    host, flags, tenants = False, [], []
    for line in path.read_text().splitlines():
        if not line.startswith("# "):
            break
        word, _, rest = line.removeprefix("# ").partition(":")
        match word.split():
            case ["env", name]:
                environments[name] = rest.split()
            case ["host-packages"]:
                host = True
            case ["server"]:
                flags = rest.split()
            case ["tenants"]:
                tenants = rest.split()
            case _:
                raise ValueError(f"{path}: {line!r}")
    return ClientScript(path, environments, host, flags, tenants)


def interpreter(folder: Path, packages: list[str], *, host: bool) -> Path:
    """Return the python of an environment with these packages, made where it is not there yet."""
    python = folder / "bin" / "python"
    wanted = hashlib.sha256(f"{packages}{host}{sys.version}".encode()).hexdigest()
    stamp = folder / "made-for"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    if host:  # behind the environment's own, which go first
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "host.pth").write_text("\n".join(site.getsitepackages()))
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *packages], check=True)
    stamp.write_text(wanted)
    return python


def run(script: ClientScript, envs: Path, peers: Path) -> dict[str, bool]:
    """Run the script in each of its environments; return which of them went well."""
    fake = "--fake" in script.server_flags
    model = "-" if fake else str(resolve(None, NoProgress()).path)
    keys = [f"{tenant}: {tenant}-0123456789abcdef" for tenant in script.tenants]
    key_env = {"HOCKET_API_KEYS": ",".join(keys)} if keys else {}
    outcomes = {}
    for name, packages in script.environments.items():
        python = peers / name / "bin" / "python"
        if not python.exists():
            python = interpreter(envs / name, packages, host=script.sees_host_packages)
        print(f"--- {script.path.stem} with {' '.join(packages)}", flush=True)
        # PATH: some clients start programs of their environment.
        env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "NO_PROXY": "*"}
        env.pop("PYTHONPATH", None)
        with running_server(*script.server_flags, env=key_env) as server:
            done = subprocess.run(
                [python, script.path, server.url, server.model, model],
                env=env, timeout=_TIMEOUT_S, check=False,
            )  # fmt: skip
        outcomes[f"{script.path.stem} {name}"] = done.returncode == 0
    return outcomes


def main() -> None:
    scripts = {path.stem: path for path in sorted(FOLDER.glob("[a-z]*.py"))}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*scripts, []], metavar="NAME")
    parser.add_argument("--envs", type=Path, default=cache / "hocket-clients")
    args = parser.parse_args()
    outcomes: dict[str, bool] = {}
    for name in args.names or scripts:
        outcomes |= run(read_script(scripts[name]), args.envs, cache / "hocket-peers")
    for name, good in outcomes.items():
        print(f"{name:>28} {'ok' if good else 'FAILED'}")
    sys.exit(0 if all(outcomes.values()) else 1)


if __name__ == "__main__":
    main()
