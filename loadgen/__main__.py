"""`python -m loadgen`: the verbs of `hocket bench` that need nothing else of Hocket."""

from loadgen.cli import app

app()
