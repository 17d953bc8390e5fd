# SPDX-License-Identifier: Apache-2.0
"""Other models' tokenizers: ids stay, ours come after them, and text never becomes a symbol."""

import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mm1_jax.checkpoint import TOKENIZERS
from mm1_jax.convert import ConvertError, layouts, vocabulary
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
  with pytest.raises(ConvertError, match=r"tokenizer\.json' is not JSON"):
    vocabulary.extend(folder)
  (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
  (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
  with pytest.raises(ConvertError, match=r"tokenizer\.json' cannot be read"):
    vocabulary.extend(folder)


def written(words, out) -> Tokenizer:
  """Returns the tokenizer of the files that an import writes."""
  out.mkdir()
  for name, data in words.files.items():
    (out / name).write_bytes(data)
  return Tokenizer(str(out / next(iter(words.files))))


@pytest.mark.parametrize(
  ("vocab", "added", "own"),
  [
    ({"llo": 300}, [], 301),  # a word after a hole: the library would give 258 out again
    ({}, [(310, "<|end|>")], 311),  # a symbol after a hole, which it would number anew
    ({"llo": 290}, [(280, "<|end|>"), (400, "<tool>")], 401),
    ({}, [(258, "<|end|>"), (300, "<image>")], 301),  # one of ours, trained
  ],
)
def test_ids_with_holes_are_given_once(folder, tmp_path, vocab, added, own):
  file = folder / "tokenizer.json"
  values = json.loads(file.read_text())
  values["model"]["vocab"] |= vocab
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  if added:
    values["added_tokens"] = [
      {"id": index, "content": text, "special": True, **flags} for index, text in added
    ]
  else:
    values["added_tokens"][0]["id"] = own
    own += 1
  file.write_text(json.dumps(values))
  words = vocabulary.extend(folder)
  ours = written(words, tmp_path / "out")
  assert words.own == own
  ids = {**values["model"]["vocab"], **{text: index for index, text in added}}
  for text, index in ids.items():
    assert ours._backend.piece_to_id(text) == index
  has_image = "<image>" in ids
  assert words.new == tuple(range(own, own + 4 - has_image))
  assert words.image_id == (300 if has_image else own + 1)
  assert ours.vocab_size == words.size == own + 4 - has_image
  for text in (*TEXTS, "a<|end|>b", "<tool>", "\ue000 hole 259", "llo"):
    encoded = ours.encode(text)
    assert ours.decode(encoded) == text
    assert not set(encoded) & ours.special_ids
    assert not any("hole" in ours._backend.id_to_piece(i) for i in encoded)


def test_an_id_that_is_given_twice_is_refused(folder):
  file = folder / "tokenizer.json"
  values = json.loads(file.read_text())
  values["added_tokens"][0]["id"] = 5
  file.write_text(json.dumps(values))
  with pytest.raises(ConvertError, match="ids are given twice"):
    vocabulary.extend(folder)


def test_tokens_that_only_the_config_adds_have_their_ids(folder, tmp_path):
  config = {"eos_token": "<|end|>", "added_tokens_decoder": {}}
  config["added_tokens_decoder"]["270"] = {"content": "<tool>", "special": True}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  words = vocabulary.extend(folder)
  ours = written(words, tmp_path / "out")
  assert (ours.symbols["<tool>"], words.own, words.image_id) == (270, 271, 272)


@pytest.mark.parametrize(
  ("beside", "values"),
  [
    ("added_tokens.json", {"<tool>": 4098}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"4098": {"content": "<tool>"}}}),
  ],
)
def test_tokens_beside_a_sentencepiece_model_have_their_ids(
  beside, values, sample_tokenizer, tmp_path
):
  """The rows of their ids are trained; ours come after them."""
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "tokenizer.model").write_bytes(sample_tokenizer.read_bytes())
  (tmp_path / "in" / beside).write_text(json.dumps(values))
  words = vocabulary.extend(tmp_path / "in")
  ours, plain = written(words, tmp_path / "out"), Tokenizer(str(sample_tokenizer))
  assert (words.own, ours.vocab_size) == (4099, 4099)  # the sample's has ours already
  assert ours._backend.id_to_piece(4098) == "<tool>"
  assert ours.encode("Hello <s> there") == plain.encode("Hello <s> there")


def test_rows_of_new_symbols_are_the_mean_of_the_tokenizers(folder):
  """Also where the embedding had padding in their place."""
  table = np.arange(264 * 2, dtype=np.float32).reshape(264, 2)
  words = vocabulary.extend(folder)
  assert (words.own, words.new) == (259, (259, 260, 261, 262))
  grown = layouts.Rows(264, words.own, words.new).load([table], (384, 2))
  mean = table[:259].mean(axis=0)
  np.testing.assert_array_equal(grown[:259], table[:259])
  np.testing.assert_allclose(grown[259:263], [mean] * 4)
  np.testing.assert_array_equal(grown[263], table[263])  # padding still
  np.testing.assert_allclose(grown[264:], [mean] * 120)
