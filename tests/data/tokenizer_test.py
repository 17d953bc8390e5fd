# SPDX-License-Identifier: Apache-2.0
"""The tokenizer loses nothing, and no text becomes a special id."""

import io
import pickle
import re

import pytest

from mm1_jax.data.sources import DataError
from mm1_jax.data.tokenizer import (
  IMAGE,
  IMAGE_END,
  IMAGE_START,
  LOSSLESS,
  PROBE,
  Tokenizer,
)

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


def trained(folder, **flags) -> str:
  """A SentencePiece model by the trainer's defaults, but for `flags`."""
  import sentencepiece

  lines = [f"line {i} of some text, with words and more words {i * 7}" for i in range(300)]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    vocab_size=400,
    hard_vocab_limit=False,
    minloglevel=2,
    **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, **flags},
  )
  (folder / "a.model").write_bytes(model.getvalue())
  return str(folder / "a.model")


SYMBOLS = [IMAGE, IMAGE_START, IMAGE_END]
LOST = {
  "the trainer's defaults": ({}, "normalization_rule_name='nmt_nfkc'"),
  "no bytes": ({**LOSSLESS, "byte_fallback": False}, "byte_fallback=False"),
  "normalised": ({**LOSSLESS, "normalization_rule_name": "nfkc"}, "normalization_rule_name='nfkc'"),
  "spaces": (
    {**LOSSLESS, "remove_extra_whitespaces": True},
    "remove_extra_whitespaces=True",
  ),
}


@pytest.mark.parametrize("case", LOST)
def test_a_tokenizer_that_changes_text_is_told(tmp_path, caplog, case: str):
  flags, told = LOST[case]
  path = trained(tmp_path, control_symbols=SYMBOLS, **flags)
  with caplog.at_level("WARNING", "absl"):
    tokenizer = Tokenizer(path)
  assert "changes text: " in caplog.text
  assert told in tokenizer.lost()
  assert "Train it with byte_fallback=True" in tokenizer.lost()


def test_a_prefix_alone_loses_nothing(tmp_path, caplog):
  """As Llama's have it: a text comes back, and no more is asked."""
  path = trained(tmp_path, control_symbols=SYMBOLS, **{**LOSSLESS, "add_dummy_prefix": True})
  assert Tokenizer(path).lost() == ""
  assert "changes text" not in caplog.text


def test_the_errors_own_flags_pass(tmp_path, caplog):
  """What the text of the error says to train with makes a tokenizer that is taken in silence."""
  with pytest.raises(DataError) as error:
    Tokenizer(trained(tmp_path))
  said = re.search(r"Train it with (.*), as mm1_jax", str(error.value))
  assert said is not None
  flags = eval(f"dict({said[1]})", {})
  tokenizer = Tokenizer(trained(tmp_path, **flags))
  assert tokenizer.lost() == ""
  assert tokenizer.decode(tokenizer.encode(PROBE)) == PROBE
  assert "changes text" not in caplog.text
