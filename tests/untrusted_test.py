# SPDX-License-Identifier: Apache-2.0
"""Strangers' values: bounded in bytes and depth; one error, nothing run, nothing hidden."""

import json
import os
import pickle
import pickletools
import random

import pytest

from mm1_jax import untrusted
from mm1_jax.config import UserError
from tests.helpers import fuzz

PLAIN = [{"sent": "a", "box": [1.5, -2, 10**30], "more": (None, True, "\u00e9")}] * 3


@pytest.mark.parametrize(
  ("data", "says"),
  [
    (b"\xff", r"'a' is not UTF-8 \(byte 0\)"),
    (b"{", r"'a' is not JSON \(.*cut off"),
    (b"9" * 5000, r"'a' is not JSON \(Exceeds the limit"),
    (b"[" * 101 + b"]" * 101, "'a' is JSON nested too deeply"),
    (b"[" * 1_000_000, "'a' is JSON nested too deeply"),
    (b'{"a": ' * 1_000_000, "'a' is JSON nested too deeply"),
    (b'{"a": 1, "b": 2, "a": 3}', "'a' has the key 'a' twice in one object"),
  ],
)
def test_what_is_no_json_is_one_error(data, says):
  with pytest.raises(UserError, match=says):
    untrusted.parse_json(data, "'a'", UserError, unique=True)


def test_json_within_the_bounds_is_jsons():
  text = "[" * 100 + '"\u00e9"' + "]" * 100
  for value in (json.loads(text), {"a": [{}, [], None, -1.5e-7]}, 1, None, "[" * 500):
    assert untrusted.loads(json.dumps(value).encode("utf-8-sig")) == value


def test_a_file_is_counted_before_it_is_read(tmp_path):
  path = tmp_path / "a.json"
  path.write_text("[1]")
  assert untrusted.read_json(path, UserError, most=3) == [1]
  with pytest.raises(UserError, match=r"a.json' has more than the 2 bytes"):
    untrusted.read_json(path, UserError, most=2)
  with pytest.raises(UserError, match=r"a.json' is \[1\]; it must be a JSON object"):
    untrusted.read_object(path, UserError)
  for gone in (tmp_path / "b.json", tmp_path, "a\0b"):
    with pytest.raises(UserError, match="cannot be read"):
      untrusted.read_json(gone, UserError)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_plain_values(protocol):
  data = pickle.dumps(PLAIN, protocol)
  assert untrusted.load_pickle(data, "'a'", UserError) == PLAIN


class Hostile:
  def __reduce__(self):
    return os.mkdir, ("was run",)


def doubled(levels: int) -> list:
  value: list = []
  for _ in range(levels):
    value = [value, value]
  return value


@pytest.mark.parametrize(
  "data",
  [
    b"",
    pickle.dumps(Hostile(), 0),
    pickle.dumps(Hostile()),
    pickle.dumps({1, 2}),  # plain, but not what JSON has
    b"\x80\x04]r\xff\xff\xff\xff0",  # a memo of 4 billion entries
    b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.",  # a text of 2**63 bytes
    b"\x80\x04)" + b"\x85" * 200_000 + b".",
    b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",  # as a key: its hash would overflow the stack
    pickle.dumps(doubled(60)),
    b"\x80\x04]q\x00h\x00a.",  # itself within itself
  ],
)
def test_a_hostile_pickle_is_one_error(data, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r"'a' is (no pickle of plain values|a pickle whose values)"):
    untrusted.load_pickle(data, "'a'", UserError)
  assert not list(tmp_path.iterdir())


def test_damaged_pickles_by_seed():
  for protocol in (0, 2, 4):
    data = pickletools.optimize(pickle.dumps(PLAIN, protocol))
    rng = random.Random(protocol)
    cases = (fuzz.damaged(data, rng) for _ in range(500))
    assert not fuzz.strays(cases, lambda d: untrusted.load_pickle(d, "'a'", UserError), UserError)


@pytest.mark.parametrize("text", ["[", "[" * 90_000, "f()", "1 +", None, 3, "9" * 2_000_000])
def test_what_is_no_literal_is_a_value_error(text):
  with pytest.raises(ValueError, match="is no list in Python's notation"):
    untrusted.parse_literal(text)


def test_stray_errors_become_one():
  for stray in (KeyError("a"), TypeError("b"), RecursionError("c"), ZeroDivisionError("d")):
    with (
      pytest.raises(UserError, match=r"^'a' is wrong \(.*[abcd]'?\)\.$"),
      untrusted.of_form("'a' is wrong", UserError),
    ):
      raise stray
  with pytest.raises(OSError, match="disk"), untrusted.of_form("'a' is wrong", UserError):
    raise OSError("disk")


def test_what_a_terminal_would_obey_is_written_out():
  r"""A title, a bell, a cleared screen, an 8-bit CSI, a reversed text, half a character."""
  text = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eabc\ud800\r\x7f"
  shown = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202eabc\ud800\r\x7f"
  assert untrusted.visible(text) == shown
  assert untrusted.visible("Zürich\t東京 👩\u200d🚀\n") == "Zürich\t東京 👩\u200d🚀\n"


@pytest.mark.parametrize(
  ("text", "mended"),
  [
    ("Zürich 東京 👩\u200d🚀\0", "Zürich 東京 👩\u200d🚀\0"),
    ("caf\udce9", "café"),  # Latin-1
    ("caf\udcc3\udca9", "café"),  # UTF-8 where ASCII was expected
    ("\ud83d\ude00", "😀"),
    ("\ud83d \ude00", "\ufffd \ufffd"),
    ("\ude00\ud83d caf\udce9", "\ufffd\ufffd café"),
    ("\ud800" * 3, "\ufffd" * 3),
    ("", ""),
  ],
)
def test_halves_of_characters_are_mended(text, mended):
  assert untrusted.mended(text) == mended
  assert untrusted.is_text(untrusted.mended(text))


def test_values_in_messages_are_short():
  deep: list = []
  for _ in range(5000):
    deep = [deep]
  for value in ("x" * 10**6, list(range(10**5)), 10**5000, deep):
    assert len(untrusted.shown(value)) < 210
