# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: SentencePiece or Hugging Face's, with control symbols for images.

Control symbols have an id but no text: `encode("<image>")` gives the ids of seven characters, never
`image_id`. What a user types can therefore not pretend to be a picture or the end of a document.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sentencepiece
from absl import logging
from etils import epath

from mm1_jax import extras, untrusted
from mm1_jax.data.sources import DataError

IMAGE, IMAGE_START, IMAGE_END = "<image>", "<image_start>", "<image_end>"
# Beside a tokenizer.json: which of its tokens begin, end and pad a text.
TOKENIZER_CONFIG = "tokenizer_config.json"
# Text that a tokenizer must give back: indentation, runs of spaces, line breaks, and characters
# that normalisation would change or that no vocabulary has. It is in NFC, which some write.
PROBE = (
  "  def f(x):\n\treturn x  # two  spaces \u00bd \ufb01 \u2460\r\n\n\u65e5\u672c\u8a9e "
  "\U0001f389 \U00012000 \U0010fffd   A "
)
# Flags of SentencePiece's trainer with which no text is changed and no character is unknown.
LOSSLESS = {
  "byte_fallback": True,
  "normalization_rule_name": "identity",
  "add_dummy_prefix": False,
  "remove_extra_whitespaces": False,
}
# SentencePiece writes a space as this character, and so cannot tell the two apart in a text.
_SPACE_MARK = "\u2581"


class _Files(NamedTuple):
  """What a tokenizer is made of."""

  path: str
  model: bytes
  config: bytes  # of TOKENIZER_CONFIG; empty for SentencePiece, which needs none


class Tokenizer:
  """Text to ids and back, without loss: `decode(encode(text)) == text`.

  One that loses something of `PROBE` is used as it is, with a warning that says what and why:
  models that were trained with it need it.

  Args:
    path: a SentencePiece model trained as in `build/sample.py`, or a `tokenizer.json` with its
      `tokenizer_config.json` beside it; `mm1_jax.convert import` makes either from open weights.

  Raises:
    DataError: the file is missing, is no tokenizer, or lacks a symbol we need.
    UserError: a tokenizer.json needs the extra `convert`.
  """

  def __init__(self, path: str):
    file = epath.Path(path)
    try:
      model = file.read_bytes()
      config = (file.parent / TOKENIZER_CONFIG).read_bytes() if is_json(model) else b""
    except OSError as e:
      raise DataError(
        f"data.tokenizer '{path}' cannot be read ({type(e).__name__}: {e.filename or path}). It "
        f"must be a SentencePiece model, or a tokenizer.json with {TOKENIZER_CONFIG} beside it; "
        f"the shipped one is mm1_jax/data/sample/tokenizer.model."
      ) from e
    self._load(_Files(str(path), model, config))

  def _load(self, files: _Files) -> None:
    self._files = files
    self.path = files.path
    self._backend = (_HuggingFace if is_json(files.model) else _SentencePiece)(files)
    self.vocab_size = self._backend.vocab_size
    self.unk_id = self._backend.unk_id
    # Ids that no text encodes to.
    self.special_ids = self._backend.special_ids
    self.pad_id, self.bos_id, self.eos_id = self._backend.pad_bos_eos
    for name, index in zip(("pad", "bos", "eos"), self._backend.pad_bos_eos, strict=True):
      self._require(f"{name} token", index)
    self.image_id = self._control(IMAGE)
    self.image_start_id = self._control(IMAGE_START)
    self.image_end_id = self._control(IMAGE_END)
    if lost := self.lost():
      logging.warning("data.tokenizer '%s' %s", self.path, lost)

  def lost(self) -> str:
    """Returns what of `PROBE` is other text after encoding and decoding, and why; '' of nothing."""
    back = self.decode(self.encode(PROBE))
    if back == PROBE:
      return ""
    at = next((i for i, (a, b) in enumerate(zip(PROBE, back, strict=False)) if a != b), len(back))
    start = max(0, at - 3)
    return (
      f"changes text: {PROBE[start : at + 9]!r} comes back as {back[start : at + 9]!r}. "
      f"{self._backend.why_lossy()}"
    )

  @property
  def model(self) -> bytes:
    """All that ids depend on; caches of what is made with a tokenizer are named by its hash."""
    return self._files.model + self._files.config

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`; never a special one."""
    return self._backend.encode(text)

  def encode_markup(self, text: str) -> list[int]:
    """Returns the ids of a template's text: control symbols in it take their own ids.

    Only for templates: in text of data or users, `encode` makes ordinary characters of them.
    """
    if not self.symbols:
      return self.encode(text)
    parts = re.split("(" + "|".join(map(re.escape, self.symbols)) + ")", text)
    ids = [[self.symbols[p]] if p in self.symbols else self.encode(p) for p in parts]
    return [i for part in ids for i in part]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`; special ids have none and are skipped."""
    return self._backend.decode([int(i) for i in ids if int(i) not in self.special_ids])

  def __getstate__(self):
    return self._files

  def __setstate__(self, state):
    self._load(state)

  @functools.cached_property
  def symbols(self) -> dict[str, int]:
    """Control symbols by their names, the longest first; without those of pictures."""
    names = {self._backend.id_to_piece(i): i for i in self.special_ids}
    for picture in (IMAGE, IMAGE_START, IMAGE_END):
      names.pop(picture, None)
    return dict(sorted(names.items(), key=lambda item: -len(item[0])))

  def _control(self, piece: str) -> int:
    """Returns the id of a control symbol."""
    index = self._backend.piece_to_id(piece)
    self._require(f"control symbol '{piece}'", index if index in self.special_ids else -1)
    return index

  def _require(self, what: str, index: int) -> None:
    if index < 0:
      raise DataError(
        f"data.tokenizer '{self.path}' has no {what}. Train it with pad_id=0, bos_id=1, eos_id=2, "
        f"unk_id=3, control_symbols=['{IMAGE}', '{IMAGE_START}', '{IMAGE_END}'], "
        f"{_flags(LOSSLESS)}, as mm1_jax/data/build/sample.py does, or give another model's to "
        f"`python -m mm1_jax.convert import`, which adds them."
      )


def is_json(model: bytes) -> bool:
  """Returns whether a tokenizer's file is Hugging Face's JSON, and not SentencePiece's proto."""
  return model.lstrip()[:1] == b"{"


class _SentencePiece:
  def __init__(self, files: _Files):
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=files.model)
      self.vocab_size = self._processor.vocab_size()
    except Exception as e:
      raise DataError(f"data.tokenizer '{files.path}' is not a SentencePiece model ({e}).") from e
    processor = self._processor
    self.unk_id = processor.unk_id()
    self.pad_bos_eos = processor.pad_id(), processor.bos_id(), processor.eos_id()
    self.special_ids = frozenset(
      i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i)
    )
    self._space_mark_ids = [
      processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()
    ]

  def why_lossy(self) -> str:
    """Returns the trainer's flags that may be the reason, and those to train it with."""
    has = _trained_with(self._processor.serialized_model_proto())
    odd = {name: value for name, value in has.items() if value != LOSSLESS[name]}
    return f"It was trained with {_flags(odd)}. Train it with {_flags(LOSSLESS)}." if odd else ""

  def piece_to_id(self, piece: str) -> int:
    index = self._processor.piece_to_id(piece)
    return -1 if index == self.unk_id else index

  def id_to_piece(self, index: int) -> str:
    return self._processor.id_to_piece(index)

  def encode(self, text: str) -> list[int]:
    parts = text.split(_SPACE_MARK)
    ids = self._processor.encode(parts[0])
    for part in parts[1:]:
      ids += self._space_mark_ids + self._processor.encode(part)
    return ids

  def decode(self, ids: list[int]) -> str:
    return self._processor.decode(ids)


class _HuggingFace:
  def __init__(self, files: _Files):
    extras.require("convert")
    import tokenizers  # not in a base install

    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(files.model.decode())
    except Exception as e:  # the library raises plain Exception
      raise DataError(f"data.tokenizer '{files.path}' is not a tokenizer.json ({e}).") from e
    beside = f"{TOKENIZER_CONFIG} beside '{files.path}'"
    config = untrusted.parse_json(files.config, beside, DataError)
    with untrusted.of_form(f"{beside} is not of its form", DataError):
      names = {name: token_text(config, f"{name}_token") for name in ("pad", "bos", "eos", "unk")}
    self._tokenizer.encode_special_tokens = True  # as text: only we put them in
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.vocab_size = self._tokenizer.get_vocab_size()
    self.pad_bos_eos = tuple(self.piece_to_id(names[name]) for name in ("pad", "bos", "eos"))
    self.unk_id = self.piece_to_id(names["unk"])
    added = self._tokenizer.get_added_tokens_decoder()
    self.special_ids = frozenset(i for i, token in added.items() if token.special)

  def why_lossy(self) -> str:
    """Returns which of its parts may be the reason."""
    parts = {name: getattr(self._tokenizer, name) for name in ("normalizer", "decoder")}
    kinds = ", ".join(f"{name} {type(part).__name__}" for name, part in parts.items())
    return f"Its tokenizer.json has {kinds}; it may lack tokens of bytes."

  def piece_to_id(self, piece: str) -> int:
    index = self._tokenizer.token_to_id(piece)
    return -1 if index is None else index

  def id_to_piece(self, index: int) -> str:
    return self._tokenizer.id_to_token(index) or ""

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)


def _trained_with(model: bytes) -> dict[str, Any]:
  """Returns the flags of SentencePiece's trainer that a model has, which `LOSSLESS` names.

  They are fields of ModelProto's trainer_spec and normalizer_spec; one that is at its default is
  left out of them. SentencePiece's own classes need a newer protobuf than TensorFlow Datasets.
  """
  parts = dict(protobuf_fields(model))
  trainer, normalizer = (
    dict(protobuf_fields(parts.get(2, b""))),
    dict(protobuf_fields(parts.get(3, b""))),
  )
  return {
    "byte_fallback": bool(trainer.get(35, False)),
    "normalization_rule_name": normalizer.get(1, b"").decode("utf-8", "replace"),
    "add_dummy_prefix": bool(normalizer.get(3, True)),
    "remove_extra_whitespaces": bool(normalizer.get(4, True)),
  }


def protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
  """Yields numbers and values of a serialised protocol buffer's fields.

  SentencePiece's own classes need a newer protobuf than TensorFlow's data sets allow.
  """
  at = 0

  def varint() -> int:
    nonlocal at
    value, shift = 0, 0
    while True:
      byte = data[at]
      at += 1
      value |= (byte & 127) << shift
      shift += 7
      if byte < 128:
        return value

  while at < len(data):
    key = varint()
    if key & 7 == 0:
      yield key >> 3, varint()
      continue
    size = {1: 8, 5: 4}.get(key & 7) or varint()
    yield key >> 3, data[at : at + size]
    at += size


def _flags(values: Mapping[str, Any]) -> str:
  return ", ".join(f"{name}={value!r}" for name, value in values.items())


def token_text(config: Mapping[str, Any], key: str) -> str:
  """Returns a token that a tokenizer_config.json names, "" if it names none.

  Raises:
    TypeError: it is no text.
  """
  token = config.get(key) or ""
  token = token["content"] if isinstance(token, Mapping) else token
  if not untrusted.is_text(token):
    raise TypeError(f"'{key}' is {untrusted.shown(token)}")
  return token
