"""API keys: what a file may say, constant-time lookup, reloading without a restart."""

from __future__ import annotations

import hmac
import os

import pytest

from serving import keys
from serving.errors import UserError
from serving.keys import KeyStore, open_store, parse, read_file

ONE, TWO, THREE = ("one-" * 5, "two-" * 5, "three-" * 5)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"acme: {ONE}\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "text",
    [
        f"# ours\n\nacme: {ONE}\n acme :{TWO}  \nother.2-x_:{THREE}",
        f'{{"acme": ["{ONE}", "{TWO}"], "other.2-x_": "{THREE}"}}',
    ],
)
def test_a_tenant_may_have_several_keys(text):
    known = parse(text, "f")
    assert [known.tenant_of(key) for key in (ONE, TWO, THREE)] == ["acme", "acme", "other.2-x_"]
    assert known.num_tenants == 2
    for other in ("", ONE[:-1], ONE + "x", "acme", f"acme: {ONE}", "\ud800", ONE.upper()):
        assert known.tenant_of(other) is None
    assert ONE not in repr(known)


@pytest.mark.parametrize("presented", [ONE, THREE, "nobody's", ""])
def test_every_entry_is_compared_whatever_matches(monkeypatch, presented):
    known, compared = parse(f"a: {ONE}\nb: {TWO}\nc: {THREE}", "f"), []

    def compare(left, right):
        compared.append(left)
        assert len(left) == len(right) == 32, "digests, so that no length shows"
        return hmac_compare(left, right)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    known.tenant_of(presented)
    assert compared == [digest for digest, _ in known.entries]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("{}", "holds no key"),
        (ONE, "entry 1 has no colon"),
        (f"a: {ONE}\nb: short", "entry 2: a key has 16 to 512"),
        (f"a: {ONE} {TWO}", "entry 1: a key has"),
        (f"a: {'x' * 513}", "entry 1: a key has"),
        (f"a: {ONE}é", "entry 1: a key has"),
        (f": {ONE}", "entry 1: this is no name"),
        (f"{'a' * 65}: {ONE}", "entry 1: this is no name"),
        (f"a b: {ONE}", "entry 1: this is no name"),
        (f"a: {ONE}\nb: {ONE}", "entry 2: this key belongs to another"),
        ("{", "not valid JSON"),
        ("{" * 100_000, "not valid JSON"),
        ('{"a": 3}', "tenant 1: a key is a string"),
        (f'{{"a": [["{ONE}"]]}}', "tenant 1: a key is a string"),
        (f'{{"a": "{ONE}", "a b": "{TWO}"}}', "tenant 2: this is no name"),
    ],
)
def test_what_is_wrong_is_said_without_showing_a_key(text, cause):
    with pytest.raises(UserError, match=cause) as error:
        parse(text, "f")
    for secret in (ONE, TWO, "short", "xxx"):
        assert secret not in error.value.cause + error.value.remedy


def test_there_may_be_ten_thousand_and_no_more():
    lines = [f"a: {number:020}" for number in range(10_001)]
    assert len(parse("\n".join(lines[:-1]), "f").entries) == 10_000
    with pytest.raises(UserError, match="more than 10000 keys"):
        parse("\n".join(lines), "f")


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o601, 0o777])
def test_a_file_that_others_may_read_or_change_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(UserError, match="every user") as error:
        read_file(file)
    assert error.value.remedy == f"chmod 600 {file}"


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o660])
def test_owner_and_group_may_read_it(file, mode):
    file.chmod(mode)
    assert read_file(file).tenant_of(ONE) == "acme"


def test_what_is_no_file_is_said(tmp_path, file):
    with pytest.raises(UserError, match="No such file"):
        read_file(tmp_path / "none")
    with pytest.raises(UserError, match="directory"):
        read_file(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not text"):
        read_file(file)
    file.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(UserError, match="larger than"):
        read_file(file)


def test_keys_come_from_one_source_and_leave_the_environment(file):
    assert open_store(None, {}, "KEYS") is None
    environ = {"KEYS": f"a: {ONE}, b: {TWO}", "OTHER": "x"}
    store = open_store(None, environ, "KEYS")
    assert [store.keys.tenant_of(key) for key in (ONE, TWO)] == ["a", "b"]
    assert environ == {"OTHER": "x"}
    assert not store.reloads
    json_store = open_store(None, {"KEYS": f'{{"a": ["{ONE}", "{TWO}"]}}'}, "KEYS")
    assert json_store.keys.tenant_of(TWO) == "a"
    with pytest.raises(UserError, match="two sources"):
        open_store(file, {"KEYS": f"a: {ONE}"}, "KEYS")
    with pytest.raises(UserError, match="KEYS holds no key"):
        open_store(None, {"KEYS": ""}, "KEYS")


def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(file, caplog):
    store = KeyStore(read_file(file), file)
    file.write_text(f"acme: {ONE}\nacme: {TWO}\n")
    store.reload()
    assert [store.keys.tenant_of(key) for key in (ONE, TWO)] == ["acme", "acme"]
    file.write_text("oops")
    store.reload()
    assert store.keys.tenant_of(TWO) == "acme"
    file.unlink()
    store.reload()
    assert store.keys.tenant_of(TWO) == "acme"
    assert caplog.text.count("old API keys stay in force") == 2
    file.write_text(f"acme: {TWO}\n")
    file.chmod(0o600)
    store.reload()
    assert [store.keys.tenant_of(key) for key in (ONE, TWO)] == [None, "acme"]
    assert ONE not in caplog.text
    assert TWO not in caplog.text


def test_a_replaced_file_is_noticed(file, tmp_path):
    """As Kubernetes does it: a link that points elsewhere from now on."""
    link = tmp_path / "link"
    link.symlink_to(file)
    before = keys._signature(link)
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    link.unlink()
    link.symlink_to(other)
    assert keys._signature(link) != before
