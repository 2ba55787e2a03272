"""Text while it arrives: whole characters, stop strings, and pieces that join to the whole."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from serving.errors import InvalidRequest
from serving.text.chat import ChatTemplate
from serving.text.detokenizer import Detokenizer, StopFilter
from serving.text.pieces import PieceBytes, TextsAlone
from serving.text.tokenizer import FAKE_CHAT_TEMPLATE, FAKE_VOCAB_SIZE, TextCodec, fake_codec

CODEC = fake_codec()


def test_the_fake_tokenizer_round_trips_any_text():
    text = "Héllo 🐦\n\ttabs, «quotes» and 漢字"
    ids = CODEC.encode(text, add_special_tokens=False)
    assert CODEC.decode(ids) == text
    spoken = CODEC.decode(list(range(FAKE_VOCAB_SIZE)))
    assert spoken == "".join(chr(code) for code in range(32, 127)), "96 ids: ASCII and the end"


def test_the_bytes_of_tokens_join_to_the_text():
    text = "Héllo 🐦\n\ttabs, «quotes» and 漢字"
    pieces = [CODEC.token_bytes(token) for token in CODEC.encode(text, add_special_tokens=False)]
    assert b"".join(pieces) == text.encode()
    (eos,) = CODEC.eos_token_ids
    assert CODEC.token_bytes(eos) == b"<|im_end|>"
    assert CODEC.token_bytes(CODEC.vocab_size) is None


def test_pieces_of_a_sentencepiece_vocabulary_are_read_as_bytes():
    vocab = {"▁Once": 0, "upon": 1, "<0xF0>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = PieceBytes(tokenizer)
    assert [pieces.of(token) for token in range(5)] == [b" Once", b"upon", b"\xf0", b"<unk>", None]


def test_a_vocabulary_of_words_is_decoded():
    tokenizer = Tokenizer(models.WordLevel(vocab={"once": 0}, unk_token="once"))
    assert PieceBytes(tokenizer).of(0) == b"once"


@given(st.text(max_size=40))
@example("\u200d\ufffd\ufffd😟\ufffd\ufffd\ufffd🇪")
@example("\ufffd" * 9 + "é")
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    detokenizer = Detokenizer(CODEC)
    pieces = [detokenizer.push(i) for i in CODEC.encode(text, add_special_tokens=False)]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + detokenizer.finish() == text


@given(st.lists(st.integers(0, CODEC.vocab_size + 1), max_size=40), st.booleans())
@example([*CODEC.encode("é🐦", add_special_tokens=False)[:5], 95, 40], True)
def test_a_text_that_is_looked_up_is_the_one_decoded_in_its_place(ids, skips):
    looks_up, decodes = (Detokenizer(CODEC, skip_special_tokens=skips) for _ in range(2))
    decodes._alone = TextsAlone(CODEC._tokenizer, skip_special_tokens=skips)
    decodes._alone.join = False
    for token_id in ids:
        assert looks_up.push(token_id) == decodes.push(token_id)
    assert looks_up.finish() == decodes.finish()


def test_texts_that_depend_on_what_stands_around_them_are_decoded_there():
    vocab = {"▁Once": 0, "upon": 1, "<0xC3>": 2, "<0xA9>": 3, "<unk>": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    codec = TextCodec(tokenizer, (), None, {})
    detokenizer = Detokenizer(codec)
    pieces = [detokenizer.push(token_id) for token_id in (0, 0, 1, 2, 3, 0)]
    assert pieces == ["Once", " Once", "upon", "", "é", " Once"]


@given(st.binary(max_size=30))
def test_broken_bytes_never_stall_the_stream(data):
    table = {CODEC.encode(chr(b), add_special_tokens=False)[0]: b for b in range(128)}
    detokenizer = Detokenizer(CODEC)
    held = 0
    for byte in data:
        known = [token for token, value in table.items() if value == byte]
        token = known[0] if known else CODEC.encode("é", add_special_tokens=False)[byte % 2]
        held = 0 if detokenizer.push(token) else held + 1
        assert held <= 4
    detokenizer.finish()


def cut(text, stops):
    """The definition: everything before the earliest stop string."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_they_begin_however_the_text_is_split(text, stops):
    rng = random.Random(text)
    stop_filter = StopFilter(stops)
    shown, at = "", 0
    while at < len(text) and stop_filter.matched is None:
        size = rng.randint(1, 3)
        shown += stop_filter.push(text[at : at + size])
        at += size
    seen = text[:at]
    if stop_filter.matched is None:
        shown += stop_filter.finish()
        assert shown == text == cut(text, stops)
    else:
        assert shown == cut(seen, stops)
        assert stop_filter.push("more") == ""


def test_what_may_become_a_stop_string_is_held_back():
    stop_filter = StopFilter(["END"])
    assert [stop_filter.push(piece) for piece in ("xE", "N", "zEN", "D!")] == ["x", "", "ENz", ""]
    assert stop_filter.matched == "END"


def test_the_template_renders_and_refuses():
    template = ChatTemplate(FAKE_CHAT_TEMPLATE, {})
    assert template.render([{"role": "user", "content": "hi"}]).text == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        refusing.render([])
    escaping = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(InvalidRequest):
        escaping.render([])
