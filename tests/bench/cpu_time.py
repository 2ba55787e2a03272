"""Run a program and print, as its last line, the CPU seconds of it and all that it started.

    python cpu_time.py LOG PROGRAM ARGUMENTS...

Whatever it leaves behind is waited for and counted too. What it prints goes to the file LOG.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import sys

_PR_SET_CHILD_SUBREAPER = 36
_TIMEOUT_S = 300


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # its orphans become ours
    log_path, *words = sys.argv[1:]
    with open(log_path, "w") as log:
        subprocess.run(words, stdout=log, stderr=log, timeout=_TIMEOUT_S, check=False)
    with contextlib.suppress(ChildProcessError):  # there is none left
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(used.ru_utime + used.ru_stime)


if __name__ == "__main__":
    main()
