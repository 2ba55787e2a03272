"""The cluster scheduler in random histories of a fleet, and the same history twice the same."""

from __future__ import annotations

import os
from collections import Counter

from tests.properties.fleet import Fleet

FIRST_SEED = int(os.environ.get("HOCKET_FIRST_SEED", "0"))
NUM_HISTORIES = int(os.environ.get("HOCKET_HISTORIES", "300"))


def test_every_request_is_in_one_place_until_it_ends_in_random_histories(capsys):
    seen: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_HISTORIES):
        try:
            seen += Fleet(seed).play()
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    with capsys.disabled():
        print(f" histories {FIRST_SEED} to {FIRST_SEED + NUM_HISTORIES - 1} ", end="")
    # The histories must really have been eventful, or nothing was tested.
    for what in ("Dispatch", "Reject", "Abort", "replays", "moved", "no_instance"):
        assert seen[what] >= NUM_HISTORIES / 2, (what, seen)
    for what in ("quarantined", "too_many_losses", "trials"):
        assert seen[what] >= NUM_HISTORIES / 25, (what, seen)
