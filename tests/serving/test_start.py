"""What is typed on the command line: checked early, and wrong input is one cause and one remedy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from engine.messages import Begin
from serving.cluster.hosts import wire
from serving.config import ServeFlags, parse_bytes
from serving.errors import UserError
from serving.start import check_flags, make_config
from tests.serving.servers import REPOSITORY
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_llama import write_model


def hocket(*args: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from serving.cli import main; main()", *args]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
        check=False,
        env={**os.environ, **({"XDG_CACHE_HOME": str(cache)} if cache else {})},
    )


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (ServeFlags(max_num_running=0), "--max-num-running 0 is too small"),
        (ServeFlags(threads=10**23), f"--threads {10**23} is too large"),
        (ServeFlags(priority_headroom=-1), "--priority-headroom -1 makes no sense"),
        (ServeFlags(priority_headroom=1), "--priority-headroom needs --dispatch freeness and"),
        (ServeFlags(max_num_running=8, max_num_batched_tokens=4), "is less than"),
        (ServeFlags(port=70000), "--port 70000"),
        (ServeFlags(admin_port=-1), "--admin-port -1"),
        (ServeFlags(max_num_waiting=-1), "--max-num-waiting -1"),
        (ServeFlags(max_step_ms=-1.0), "--max-step-ms -1"),
        (ServeFlags(max_step_ms=float("nan")), "--max-step-ms nan"),
        (ServeFlags(drain_timeout=-1.0), "--drain-timeout -1"),
        (ServeFlags(drain_timeout=float("nan")), "--drain-timeout nan"),
        (ServeFlags(served_model_name=""), "--served-model-name is empty"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, cause):
    with pytest.raises(UserError, match=cause) as error:
        check_flags(flags)
    assert error.value.remedy


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GiB", 4 << 30), ("500MB", 500_000_000), ("1.5g", 3 << 29), ("123", 123), ("2 KiB", 2048)],
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "4GiBs", "-1GiB", "GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="--kv-memory"):
        make_config(ServeFlags(kv_memory=text), "m", Path(), port=1)


def test_the_limit_of_a_step_is_in_milliseconds_and_0_is_none():
    made = [make_config(ServeFlags(max_step_ms=ms), "m", None, port=1) for ms in (80.0, 0.0)]
    assert [config.engine.max_step_s for config in made] == [0.08, None]
    assert [config.engine.profile for config in made] == [None, None]


def test_what_hocket_profile_writes_a_server_reads(tmp_path):
    folder, out = write_model(tmp_path / "tiny"), tmp_path / "profile.json"
    found = hocket("profile", str(folder), "--rounds", "1", "--out", str(out))
    assert f"written to {out}" in found.stdout, found.stderr
    config = make_config(ServeFlags(step_costs=out), "tiny", folder, port=1)
    profile = config.engine.profile
    assert profile.what.model == "tiny"
    assert profile.cells
    begun = wire.decode_begin(wire.encode(Begin(config.engine)))
    assert begun.config == config.engine, "it reaches the process of an instance"


def test_step_costs_that_cannot_be_read_are_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match=r"--step-costs .* cannot be read"):
        make_config(ServeFlags(step_costs=tmp_path / "none"), "m", None, port=1)


def test_a_profile_of_no_rounds_is_refused():
    assert "--rounds must be at least 1" in hocket("profile", "--rounds", "0").stderr


def test_the_version_is_the_distributions():
    assert hocket("--version").stdout.strip() == version("hocket")


def test_the_defaults_are_safe():
    config = make_config(ServeFlags(), "m", Path("x"), port=8000)
    assert config.host == "127.0.0.1"
    assert config.max_body_bytes == 1 << 20
    assert config.admission.max_num_running == 64


@pytest.mark.parametrize(
    ("given", "num_tenants", "share"), [(None, 1, 1), (None, 2, 0.5), (1, 2, 1)]
)
def test_one_of_several_tenants_leaves_room_for_others(given, num_tenants, share):
    flags = ServeFlags(tenant_share=given)
    config = make_config(flags, "m", None, port=1, num_tenants=num_tenants)
    assert config.admission.tenant_share == share


def test_flags_reach_the_engine():
    config = make_config(ServeFlags(), "m", None, port=1)
    engine = config.engine
    assert (engine.policy, engine.prefix_caching, engine.batch_invariant) == ("fcfs", True, False)
    assert engine.depth == 1
    flags = ServeFlags(
        scheduling_policy="priority",
        prefix_caching=False,
        batch_invariant=True,
        depth=2,
    )
    config = make_config(flags, "m", None, port=1)
    engine = config.engine
    assert (engine.policy, engine.prefix_caching, engine.batch_invariant) == (
        "priority",
        False,
        True,
    )
    assert engine.depth == 2


@pytest.mark.parametrize("flag", [("--scheduling-policy", "lifo"), ("--depth", "3")])
def test_a_flag_with_another_value_is_refused(flag):
    done = hocket("serve", "--fake", *flag)
    assert done.returncode == 2
    assert flag[0] in done.stdout + done.stderr


def test_a_port_in_use_is_one_cause_and_one_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = hocket("serve", "--fake", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert done.stdout == ""
    cause, remedy = done.stderr.splitlines()[-2:]
    assert cause.startswith("hocket: cannot listen on 127.0.0.1:")
    assert "--port" in remedy
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fake", "--kv-memory", "100TiB"], "not enough memory"),
        (["{model}", "--kv-memory", "100TiB"], "not enough memory"),
        (["{model}", "--kv-memory", "1"], "holds no block"),
        (["{model}", "--device", "cuda:7x"], "--device cuda:7x is not supported"),
    ],
)
def test_what_the_machine_cannot_do_is_one_cause_and_one_remedy(tmp_path, flags, words):
    write_tiny_gguf(tmp_path / "Tiny.gguf")
    arguments = [flag.format(model=tmp_path / "Tiny.gguf") for flag in flags]
    done = hocket("serve", *arguments, "--port", "0", cache=tmp_path / "cache")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    cause, remedy = done.stderr.splitlines()[-2:]
    assert words in cause
    assert remedy.strip()


def test_an_unknown_model_is_one_cause_and_one_remedy():
    done = hocket("serve", "smollm2", "--port", "0")
    assert done.returncode == 1
    cause, remedy = done.stderr.splitlines()[-2:]
    assert "no model 'smollm2'" in cause
    assert "smollm2-135m" in remedy


def test_a_folder_that_is_no_model_is_one_cause_and_one_remedy(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "tokenizer.json").write_text("{}")
    done = hocket("serve", str(tmp_path), "--port", "0")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()[-2:]) == 2
