"""A whole session of the kernel's is ended, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from serving.cluster.hosts.process_session import end_session, members_of
from tests.serving.test_process import is_gone, until

FORKS = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(2):
    if os.fork() == 0:
        os.setpgid(0, 0)
        break
print(flush=True)
time.sleep(60)
"""


def started():
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS], start_new_session=True, stdout=subprocess.PIPE
    )
    until(lambda: len(list(members_of(process.pid))) == 3)
    return process


def test_its_processes_are_found_and_ended_whoever_their_parent_is():
    process = started()
    members = list(members_of(process.pid))
    assert os.getpid() not in members
    os.kill(process.pid, signal.SIGKILL)  # what it started is init's now
    assert end_session(process.pid)
    assert all(is_gone(pid) for pid in members)
    process.wait()
    process.stdout.close()


def test_who_is_to_be_kept_is_kept():
    process = started()
    kept = max(members_of(process.pid))
    assert end_session(process.pid, [kept])
    assert list(members_of(process.pid)) == [kept]
    assert end_session(process.pid)
    process.wait()
    process.stdout.close()
