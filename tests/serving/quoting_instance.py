"""A fake instance whose exceptions quote the prompt that they were raised for.

A program, as `serving.instance` is: `python -P -m tests.serving.quoting_instance --fd N`.
"""

from __future__ import annotations

from engine.build import build_engine
from engine.fake import ChecksumExecutor
from scheduler.request import InvariantError
from serving.instance import main
from serving.text.tokenizer import fake_codec

FAILS, BREAKS = "this one fails", "this one breaks the instance"

# For `starting_server(prelude=...)`: be served by such an instance.
PRELUDE = """
from serving.cluster.hosts.child import Child
from serving.cluster.hosts.child_host import ChildHost
program = ("-m", "tests.serving.quoting_instance")
Child.__init__.__defaults__ = (program,)
ChildHost.__init__.__defaults__ = (None, program)
"""


def spoil(executor):
    compute, codec = executor._compute, fake_codec()

    def compute_or_quote(self, batch):
        text = codec.decode(batch.token_ids_T.tolist(), skip_special_tokens=False)
        if BREAKS in text:
            raise InvariantError(f"no room for {text!r}")
        if FAILS in text:
            raise ValueError(f"cannot compute {text!r}")
        return compute(self, batch)

    executor._compute = compute_or_quote


if __name__ == "__main__":
    spoil(ChecksumExecutor)
    main(build_engine)
