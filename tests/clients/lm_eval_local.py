# env lm_eval: lm-eval[api]==0.4.13 accelerate peft
# host-packages
# server: --dtype float32
"""lm-eval: `local-completions` on a task of our own, beside its own backend on the same model.

Both score the same answers of 24 questions; accuracies must be equal, and so must the answer that
each question got. The server's tokenizer is used (token-id prompts), as found in the model folder.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import lm_eval
from lm_eval.tasks import TaskManager

URL, MODEL, FOLDER = sys.argv[1:]
QUESTIONS = [
    ("The capital of France is", " Paris", " Berlin"),
    ("The capital of Germany is", " Berlin", " Rome"),
    ("The capital of Italy is", " Rome", " London"),
    ("The capital of Japan is", " Tokyo", " Madrid"),
    ("Water is made of hydrogen and", " oxygen", " iron"),
    ("The opposite of hot is", " cold", " tall"),
    ("The opposite of up is", " down", " red"),
    ("The opposite of black is", " white", " seven"),
    ("Two plus two is", " four", " nine"),
    ("The sun rises in the", " east", " cup"),
    ("A week has seven", " days", " wheels"),
    ("A year has twelve", " months", " legs"),
    ("Cats like to chase", " mice", " mountains"),
    ("Bees make", " honey", " steel"),
    ("Cows give", " milk", " light"),
    ("At night we see the", " moon", " lunch"),
    ("Fish live in", " water", " trees"),
    ("Birds can", " fly", " read"),
    ("Snow is", " white", " loud"),
    ("Grass is", " green", " angry"),
    ("The Earth goes around the", " Sun", " spoon"),
    ("Ice is frozen", " water", " paper"),
    ("He put the letter in the", " mailbox", " yesterday"),
    ("She opened the door with a", " key", " cloud"),
]
TASK = """
task: hocket_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def scores(
    folder: Path, backend: str, **args: object
) -> tuple[dict[str, float], list[list[float]]]:
    """Return the metrics, and the log-likelihood of each choice of each question."""
    found = lm_eval.simple_evaluate(
        model=backend,
        model_args=args,
        tasks=["hocket_pairs"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        log_samples=True,
    )
    metrics = found["results"]["hocket_pairs"]
    samples = sorted(found["samples"]["hocket_pairs"], key=lambda sample: sample["doc_id"])
    return (
        {name: metrics[f"{name},none"] for name in ("acc", "acc_norm")},
        [[float(score[0]) for score in sample["filtered_resps"]] for sample in samples],
    )


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    lines = [json.dumps({"question": q, "choices": [a, b]}) for q, a, b in QUESTIONS]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "pairs.yaml").write_text(TASK.format(data=folder / "pairs.jsonl"))
    served = {"base_url": f"{URL}/v1/completions", "model": MODEL, "num_concurrent": 2}
    ours, our_scores = scores(
        folder, "local-completions", **served, tokenizer=FOLDER, tokenized_requests=True
    )
    print("local-completions", ours, flush=True)
    remote, remote_scores = scores(
        folder, "local-completions", **served, tokenizer_backend="remote", tokenized_requests=True
    )
    print("... with the server's /tokenize", remote, flush=True)
    theirs, their_scores = scores(folder, "hf", pretrained=FOLDER, dtype="float32", device="cpu")
    print("hf", theirs, flush=True)
worst = max(
    abs(one - other)
    for mine, its in zip(our_scores, their_scores, strict=True)
    for one, other in zip(mine, its, strict=True)
)
print(f"largest difference of a log-likelihood: {worst:.2e}")
assert ours == theirs == remote
assert [s.index(max(s)) for s in our_scores] == [s.index(max(s)) for s in their_scores]
assert worst < 1e-2
