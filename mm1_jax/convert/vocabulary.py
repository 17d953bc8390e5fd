# SPDX-License-Identifier: Apache-2.0
"""Other models' tokenizers, with the symbols that ours need added after their own."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import sentencepiece
import tokenizers

from mm1_jax import untrusted
from mm1_jax.checkpoint import TOKENIZERS
from mm1_jax.convert import ConvertError
from mm1_jax.data.tokenizer import IMAGE, IMAGE_END, IMAGE_START, is_json, token_text

PAD = "<pad>"
SYMBOLS = (IMAGE, IMAGE_START, IMAGE_END)
ROWS = 128  # a vocabulary is rounded up to a multiple of this, so that it splits over devices


class Vocabulary(NamedTuple):
  """A tokenizer with our symbols."""

  files: Mapping[str, bytes]  # by name, the tokenizer's own first
  size: int
  image_id: int


def extend(path: pathlib.Path) -> Vocabulary:
  """Returns the tokenizer of a model's folder, or of a file, with what it lacks for ours.

  Ids that it has are unchanged. Added are the picture's symbols, and `<pad>` if there is none.
  Where no id begins a text, the one that ends it is used, as in Qwen.

  Raises:
    ConvertError: there is no tokenizer, or it cannot be read.
  """
  names = ("tokenizer.json", "tokenizer.model")
  files = [path] if path.is_file() else [path / name for name in names]
  file = next((file for file in files if file.exists()), None)
  if file is None:
    raise ConvertError(f"'{path}' has no {' nor '.join(names)}; name the file with --tokenizer.")
  data = file.read_bytes()
  return _extend_json(file, data) if is_json(data) else _extend_sentencepiece(file, data)


def round_up(size: int) -> int:
  """Returns the rows of an embedding for so many ids."""
  return -(-size // ROWS) * ROWS


def _extend_json(file: pathlib.Path, data: bytes) -> Vocabulary:
  own, beside = TOKENIZERS[".json"]
  try:
    tokenizer = tokenizers.Tokenizer.from_str(data.decode())
  except Exception as e:  # the library raises plain Exception
    raise ConvertError(f"'{file}' cannot be read: {e}.") from e
  if not (file.parent / beside).exists():
    raise ConvertError(f"'{file}' has no {beside} beside it, which says how texts end.")
  config = untrusted.read_object(file.parent / beside, ConvertError)
  with untrusted.of_form(f"'{file.parent / beside}' is not of its form", ConvertError):
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: token_text(config, name) for name in names}
  if not tokens["eos_token"]:
    raise ConvertError(f"'{file.parent / beside}' names no eos_token.")
  tokens["bos_token"] = tokens["bos_token"] or tokens["eos_token"]
  tokens["pad_token"] = tokens["pad_token"] or PAD
  tokenizer.add_special_tokens(
    [
      tokenizers.AddedToken(token, special=True, normalized=False)
      for token in (tokens["bos_token"], tokens["eos_token"], tokens["pad_token"], *SYMBOLS)
    ]
  )
  named = {name: token for name, token in tokens.items() if token}
  described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
  described["clean_up_tokenization_spaces"] = False
  image_id = tokenizer.token_to_id(IMAGE)
  assert image_id is not None
  files = {
    own: tokenizer.to_str().encode(),
    beside: (json.dumps(described, indent=2) + "\n").encode(),
  }
  return Vocabulary(files, tokenizer.get_vocab_size(), image_id)


def _extend_sentencepiece(file: pathlib.Path, data: bytes) -> Vocabulary:
  (own,) = TOKENIZERS[".model"]
  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
  except Exception as e:
    raise ConvertError(f"'{file}' is no tokenizer: neither JSON nor SentencePiece ({e}).") from e
  wanted = SYMBOLS if processor.pad_id() >= 0 else (PAD, *SYMBOLS)
  missing = [piece for piece in wanted if processor.piece_to_id(piece) == processor.unk_id()]
  # Serialised protocol buffers that follow each other are one, with the lists of both.
  data += b"".join(map(_control_piece, missing))
  extended = sentencepiece.SentencePieceProcessor(model_proto=data)
  return Vocabulary({own: data}, extended.vocab_size(), extended.piece_to_id(IMAGE))


def _control_piece(piece: str) -> bytes:
  """Returns a ModelProto with one piece {1: piece, 2: score 0.0, 3: type CONTROL}, serialised."""
  text = piece.encode()
  fields = bytes([0x0A, len(text)]) + text + b"\x15\0\0\0\0" + b"\x18\x03"
  return bytes([0x0A, len(fields)]) + fields
