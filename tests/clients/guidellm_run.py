# env guidellm: guidellm==0.8.1
# server: --max-model-len 2048
"""guidellm, to the end: no request errored, and the tokens are as many as were asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, MODEL, FOLDER = sys.argv[1:]
NUM, TOKENS = 10, 16
FLAGS = {
    "--backend": f"kind=openai_http,target={URL}",
    "--profile": "kind=concurrent,streams=2",
    "--constraint": f"kind=max_requests,count={NUM}",
    "--data": f"kind=synthetic_text,prompt_tokens=48,output_tokens={TOKENS}",
    "--tokenizer": "kind=huggingface_auto,model=./tokenizer",
    "--output": "kind=json,path=out.json",
}

with tempfile.TemporaryDirectory() as name:
    (Path(name) / "tokenizer").symlink_to(FOLDER)
    command = ["guidellm", "run", "--disable-console"]
    done = subprocess.run(
        [*command, *(word for pair in FLAGS.items() for word in pair)],
        cwd=name, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (found,) = json.loads((Path(name) / "out.json").read_text())["benchmarks"]
requests, metrics = found["requests"], found["metrics"]
assert len(requests["successful"]) == NUM, {kind: len(those) for kind, those in requests.items()}
assert not requests["errored"], requests["errored"][:1]
tokens = {request["output_metrics"]["text_tokens"] for request in requests["successful"]}
assert tokens == {TOKENS}, tokens
ttft, itl = (
    metrics[name]["successful"]["median"]
    for name in ("time_to_first_token_ms", "inter_token_latency_ms")
)
print(f"ok {NUM} successful, median TTFT {ttft:.0f} ms, mean gaps {itl:.1f} ms")
