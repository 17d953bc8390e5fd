# SPDX-License-Identifier: Apache-2.0
"""Other models' tokenizers: ids stay, ours come after them, and text never becomes a symbol."""

import json
import pickle

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mm1_jax.checkpoint import TOKENIZERS
from mm1_jax.convert import ConvertError, vocabulary
from mm1_jax.data.sources import DataError
from mm1_jax.data.tokenizer import IMAGE, IMAGE_END, IMAGE_START, Tokenizer

TEXTS = [
  "Hello, world!",
  " two  spaces",
  "line\nbreak\t",
  "\u00fc\u4f60\U0001f600",
  "",
  "<image>",
  "</s><pad>",
]


@pytest.fixture
def folder(tmp_path):
  """A byte-level BPE of 256 bytes and two merges, with Qwen's kind of special tokens."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = {letter: i for i, letter in enumerate(letters)} | {"ll": 256, "llo": 257}
  model = models.BPE(words, [("l", "l"), ("ll", "o")])
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(["<|end|>"])
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
  return tmp_path


@pytest.fixture
def extended(folder, tmp_path):
  """The tokenizer of the files that an import writes, and what it was made of."""
  words = vocabulary.extend(folder)
  (tmp_path / "out").mkdir()
  for name, data in words.files.items():
    (tmp_path / "out" / name).write_bytes(data)
  assert tuple(words.files) == TOKENIZERS[".json"]
  own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  return Tokenizer(str(tmp_path / "out" / "tokenizer.json")), own, words


def test_ids_stay_and_ours_come_after_them(extended):
  ours, theirs, words = extended
  assert theirs.get_vocab_size() == 259
  for text in TEXTS[:5]:
    assert ours.encode(text) == theirs.encode(text).ids
  assert ours.encode("Hello")[-1] == 257
  # <pad>, which it lacks, then the picture's; the end of a text begins it, too.
  assert (ours.eos_id, ours.bos_id, ours.pad_id) == (258, 258, 259)
  assert (ours.image_id, ours.image_start_id, ours.image_end_id) == (260, 261, 262)
  assert (words.size, words.image_id, ours.vocab_size) == (263, 260, 263)
  assert vocabulary.round_up(words.size) == 384


@pytest.mark.parametrize("text", [*TEXTS, "a<|end|>b"])
def test_text_comes_back_and_is_never_a_symbol(extended, text):
  ours, _, _ = extended
  ids = ours.encode(text)
  assert not set(ids) & ours.special_ids
  assert ours.decode(ids) == text
  assert ours.decode([ours.bos_id, *ids, ours.image_id, ours.pad_id]) == text


def test_a_template_may_name_symbols_but_no_picture(extended):
  ours, _, _ = extended
  assert ours.encode_markup("a<|end|>") == [*ours.encode("a"), ours.eos_id]
  assert ours.image_id not in ours.encode_markup(f"{IMAGE}{IMAGE_START}{IMAGE_END}")


def test_it_goes_to_worker_processes(extended):
  ours, _, _ = extended
  copy = pickle.loads(pickle.dumps(ours))
  assert copy.encode(TEXTS[0]) == ours.encode(TEXTS[0])
  assert copy.special_ids == ours.special_ids


def test_what_is_missing_or_damaged_is_named(folder, tmp_path):
  with pytest.raises(ConvertError, match=r"has no tokenizer\.json nor tokenizer\.model"):
    vocabulary.extend(tmp_path / "nothing")
  # Of the model alone, before it is imported.
  with pytest.raises(DataError, match=r"has no (pad|bos) token"):
    Tokenizer(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text("{}")
  with pytest.raises(ConvertError, match="names no eos_token"):
    vocabulary.extend(folder)
  (folder / "tokenizer_config.json").unlink()
  with pytest.raises(ConvertError, match=r"no tokenizer_config\.json beside it"):
    vocabulary.extend(folder)
  (folder / "tokenizer.json").write_text("{")
  (folder / "tokenizer_config.json").write_text("{}")
  with pytest.raises(ConvertError, match="cannot be read"):
    vocabulary.extend(folder)
