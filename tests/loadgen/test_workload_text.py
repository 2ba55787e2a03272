"""Prompts: exact counts with several kinds of tokenizer, real prose, and early differences."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from loadgen.types import LoadError
from loadgen.workload.corpus import default_text, load_text
from loadgen.workload.text import Counted, IdPrompts, PromptMaker, random_ids
from loadgen.workload.tokenizer import ByteTokenizer, ModelTokenizer, load_tokenizer

TEXT = default_text()[:60_000]
LENGTHS = [*range(1, 61), *range(61, 1500, 9)]


def rng(seed=0):
    return np.random.default_rng(seed)


def byte_level():
    """As GPT-2 and those after it: words split first, with their space in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def marked_words():
    """As SentencePiece: a mark for the space, and one more in front of the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def across_words():
    """Merges go over spaces, so that no place of a text splits its tokens for sure."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("_"), normalizers.Replace(" ", "_")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(set(TEXT)), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT[at : at + 400] for at in range(0, 12_000, 400)], trainer)
    return tokenizer


MADE = {
    "byte_level": byte_level,
    "marked_words": marked_words,
    "across_words": across_words,
}


REAL = pytest.param("real", marks=pytest.mark.realmodel)


@pytest.fixture(scope="module", params=[*MADE, REAL, "bytes"])
def tokenizer(request):
    if request.param == "real":
        return load_tokenizer(str(request.getfixturevalue("real_model")))
    if request.param == "bytes":
        return ByteTokenizer()
    return ModelTokenizer(MADE[request.param]())


@pytest.fixture(scope="module")
def maker(tokenizer):
    return PromptMaker(TEXT, tokenizer)


@pytest.fixture(scope="module")
def words():
    return PromptMaker(TEXT, ModelTokenizer(byte_level()))


def test_counts_are_exact(tokenizer, maker):
    source = rng()
    for num_tokens in LENGTHS if maker.corpus.is_additive else LENGTHS[::5]:
        prompt, counted = maker.make(num_tokens, source)
        assert counted == num_tokens
        assert len(tokenizer.encode(prompt)) == num_tokens
        assert prompt == prompt.strip()


def test_counts_are_exact_behind_a_head_and_its_tokens_stay(tokenizer, maker):
    source = rng()
    head = maker.make(40, source)
    head_ids = tokenizer.encode(head.prompt)
    for num_tokens in range(40, 240, 7):
        prompt, _ = maker.make(num_tokens, source, head)
        ids = tokenizer.encode(prompt)
        assert len(ids) == num_tokens
        assert prompt.startswith(head.prompt)
        assert ids[:38] == head_ids[:38]  # merges over spaces may change the last


def test_the_head_keeps_all_its_tokens_where_words_are_split(words):
    head = words.make(40, rng())
    encode = ModelTokenizer(byte_level()).encode
    assert encode(words.make(90, rng(1), head).prompt)[:40] == encode(head.prompt)


def test_only_merges_over_spaces_need_the_slow_way():
    assert PromptMaker(TEXT, ModelTokenizer(byte_level())).corpus.is_additive
    assert PromptMaker(TEXT, ModelTokenizer(marked_words())).corpus.is_additive
    assert PromptMaker(TEXT, ByteTokenizer()).corpus.is_additive
    assert not PromptMaker(TEXT, ModelTokenizer(across_words())).corpus.is_additive


def test_a_prompt_may_be_longer_than_the_corpus():
    tokenizer = ByteTokenizer()
    maker = PromptMaker(TEXT[:2000], tokenizer)
    assert len(tokenizer.encode(maker.make(9001, rng()).prompt)) == 9001


@pytest.mark.parametrize("text", ["word", "字" * 50, "one two", "aé" * 30, "a b c d e f g h i j"])
def test_counts_are_exact_with_hardly_any_corpus(text):
    tokenizer = ModelTokenizer(byte_level())
    maker = PromptMaker(text, tokenizer)
    for num_tokens in (3, 6, 12, 30, 96):
        assert len(tokenizer.encode(maker.make(num_tokens, rng()).prompt)) == num_tokens


def test_what_cannot_be_had_is_refused():
    maker = PromptMaker("字" * 50, ByteTokenizer())
    with pytest.raises(LoadError, match="exactly 4 tokens"):
        maker.make(4, rng())  # each sign is three bytes


def test_it_is_prose_of_the_corpus(words):
    prompt = words.make(200, rng()).prompt
    middle = len(prompt) // 2
    assert prompt[middle : middle + 100] in TEXT
    first, last = prompt.split()[0], prompt.split()[-1]
    assert first in TEXT.split()
    assert last in TEXT.split()


def test_prompts_differ_within_16_tokens():
    tokenizer = ModelTokenizer(byte_level())
    maker = PromptMaker(default_text(), tokenizer)
    source = rng()
    starts = [tuple(tokenizer.encode(maker.make(40, source).prompt)[:16]) for _ in range(2000)]
    assert len(set(starts)) >= 1996  # of 2 million pairs
    ids = [maker.ids(40, source)[:16] for _ in range(2000)]
    assert len(set(ids)) == 2000


def test_the_generator_decides(words):
    assert words.make(77, rng(5)) == words.make(77, rng(5))
    assert words.make(77, rng(5)) != words.make(77, rng(6))
    assert words.ids(77, rng(5)) == words.ids(77, rng(5))


def test_token_ids_are_prose_too(words):
    tokenizer = ModelTokenizer(byte_level())
    ids = words.ids(50, rng())
    assert len(ids) == 50
    assert tokenizer.decode(ids[6:]) in TEXT
    assert len(words.ids(1_000_000, rng())) == 1_000_000


def test_token_ids_behind_a_head(words):
    prompts = IdPrompts(words.ids)
    head = prompts.make(10, rng())
    assert head.num_tokens == 10
    assert prompts.make(30, rng(1), head).prompt[:10] == head.prompt
    assert len(prompts.make(30, rng(1), head).prompt) == 30
    anything = random_ids(5).make(200, rng())
    assert set(anything.prompt) == {0, 1, 2, 3, 4}


@pytest.mark.realmodel
def test_without_a_tokenizer_the_count_is_near_and_unknown(real_model):
    real = load_tokenizer(str(real_model))
    maker = PromptMaker(default_text())
    source = rng()
    prompts = [maker.make(400, source) for _ in range(50)]
    assert {prompt.num_tokens for prompt in prompts} == {None}
    counts = [len(real.encode(prompt.prompt)) for prompt in prompts]
    assert 340 < np.mean(counts) < 460
    longer = maker.make(600, source, prompts[0]).prompt
    assert longer.startswith(prompts[0].prompt)
    assert maker.corpus.count(longer) == 600


def test_a_head_of_full_length_is_the_prompt(words):
    head = Counted("some words", 4)
    assert words.make(4, rng(), head) == head


def test_truncation_and_special_tokens_of_a_model_are_off():
    tokenizer = byte_level()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    assert len(ModelTokenizer(tokenizer).encode("a b c d e f g h i j k l")) > 9


def test_tokenizers_are_found_or_refused(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    by_folder, by_file = load_tokenizer(str(tmp_path)), load_tokenizer(f"{tmp_path}/tokenizer.json")
    assert by_folder.encode("the statement") == by_file.encode("the statement")
    assert by_folder.decode(by_folder.encode("the statement")) == "the statement"
    assert load_tokenizer("bytes").encode("é") == [195, 169]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(LoadError, match="is not a tokenizer"):
        load_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(LoadError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path / "absent"))


def test_a_text_is_read_or_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Some words.\n\nMore of them.\n")
    assert load_text(path) == "Some words.\nMore of them."
    path.write_text(" \n")
    with pytest.raises(LoadError, match="holds no text"):
        load_text(path)
    path.write_bytes(b"ok\n\xff\xfe\n")
    with pytest.raises(LoadError, match="not UTF-8"):
        load_text(path)
