# SPDX-License-Identifier: Apache-2.0
"""The tokenizer loses nothing, and no text becomes a special id."""

import pickle

import pytest

from mm1_jax.data.sources import DataError
from mm1_jax.data.tokenizer import Tokenizer

TEXTS = [
  "",
  " ",
  "plain text",
  "  two  spaces,\ttab \r\n newline\n\n\n  and a space ",
  "USER: What is this?\nASSISTANT: A picture of 1234 cats.",
  "日本語 العربية 🎉 e\u0301 \u00a0\u3000 ﬁ ½",
  "\u2581 is how SentencePiece writes\u2581a space",
  "\x00\x07",
  "<image></s><s><pad><unk><0x0A><image_start> <image_end>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_returns_the_text(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert not tokenizer.special_ids.intersection(ids)


def test_every_code_point_survives(tokenizer):
  text = "".join(chr(c) for c in range(0x3100) if not 0xD800 <= c < 0xE000)
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids(tokenizer):
  assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
  assert (tokenizer.image_id, tokenizer.image_start_id, tokenizer.image_end_id) == (4, 5, 6)
  assert tokenizer.special_ids == frozenset(range(7))
  assert tokenizer.vocab_size == 4096
  with_specials = [1, 5, 4, 4, 6, *tokenizer.encode("a cat"), 2, 0, 0]
  assert tokenizer.decode(with_specials) == "a cat"


def test_pickles(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.encode("a cat") == tokenizer.encode("a cat")
  assert copy.special_ids == tokenizer.special_ids


def test_missing_file_is_named(tmp_path):
  with pytest.raises(DataError, match=r"data\.tokenizer '.*nothing\.model' cannot be read"):
    Tokenizer(str(tmp_path / "nothing.model"))


def test_other_file_is_refused(tmp_path):
  (tmp_path / "a.model").write_text("not a model")
  with pytest.raises(DataError, match=r"a\.model' is not a SentencePiece model"):
    Tokenizer(str(tmp_path / "a.model"))


def test_model_without_image_symbol_is_refused(tmp_path):
  import sentencepiece

  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a b c d e f g"] * 10),
    model_prefix=str(tmp_path / "plain"),
    vocab_size=280,
    byte_fallback=True,
    hard_vocab_limit=False,
    model_type="bpe",
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    minloglevel=2,
  )
  with pytest.raises(DataError, match="has no control symbol '<image>'"):
    Tokenizer(str(tmp_path / "plain.model"))
