# SPDX-License-Identifier: Apache-2.0
"""Other models' tokenizers, with the symbols that ours need added after their own."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import sentencepiece
import tokenizers

from mm1_jax import untrusted
from mm1_jax.checkpoint import TOKENIZERS
from mm1_jax.convert import ConvertError
from mm1_jax.data.tokenizer import IMAGE, IMAGE_END, IMAGE_START, is_json, token_text

PAD = "<pad>"
SYMBOLS = (IMAGE, IMAGE_START, IMAGE_END)
# Files of a tokenizer's folder that are not the tokenizer.
BESIDE = ("added_tokens.json", "config.json", "special_tokens_map.json", "tokenizer_config.json")
ROWS = 128  # a vocabulary is rounded up to a multiple of this, so that it splits over devices


class Vocabulary(NamedTuple):
  """A tokenizer with our symbols."""

  files: Mapping[str, bytes]  # by name, the tokenizer's own first
  size: int
  image_id: int
  own: int  # the largest id that it had, and 1
  new: tuple[int, ...]  # ids of the symbols that were added
  bos: str  # how a text begins and ends, as its own chat template has it
  eos: str
  chat: str | None  # its chat template, a Jinja program


def extend(path: pathlib.Path) -> Vocabulary:
  """Returns the tokenizer of a model's folder, or of a file, with what it lacks for ours.

  Ids that it has are unchanged. Added are the picture's symbols, and `<pad>` if there is none.
  Where no id begins a text, the one that ends it is used, as in Qwen.

  Raises:
    ConvertError: there is no tokenizer, or it cannot be read.
  """
  names = ("tokenizer.json", "tokenizer.model")
  if path.is_file() and path.name in BESIDE:
    path = path.parent
  files = [path] if path.is_file() else [path / name for name in names]
  file = next((file for file in files if file.exists()), None)
  if file is None:
    raise ConvertError(f"'{path}' has no {' nor '.join(names)}; name the file with --tokenizer.")
  data = file.read_bytes()
  extend_as = _extend_json if is_json(data) else _extend_sentencepiece
  return extend_as(file, data)


def round_up(size: int) -> int:
  """Returns the rows of an embedding for so many ids."""
  return -(-size // ROWS) * ROWS


def _extend_json(file: pathlib.Path, data: bytes) -> Vocabulary:
  own, beside = TOKENIZERS[".json"]
  values = untrusted.parse_json(data, f"'{file}'", ConvertError)
  if not (file.parent / beside).exists():
    raise ConvertError(f"'{file}' has no {beside} beside it, which says how texts end.")
  config = untrusted.read_object(file.parent / beside, ConvertError)
  with untrusted.of_form(f"'{file.parent / beside}' is not of its form", ConvertError):
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: token_text(config, name) for name in names}
    listed = list(_listed(config))
  if not tokens["eos_token"]:
    raise ConvertError(f"'{file.parent / beside}' names no eos_token.")
  tokenizer = _load_json(file, values, listed)
  size = tokenizer.get_vocab_size()
  chat = _chat_template(file.parent, config)
  ends = tokens["bos_token"], tokens["eos_token"]
  tokens["bos_token"] = tokens["bos_token"] or tokens["eos_token"]
  tokens["pad_token"] = tokens["pad_token"] or PAD
  wanted = (tokens["bos_token"], tokens["eos_token"], tokens["pad_token"], *SYMBOLS)
  tokenizer.add_special_tokens(
    [tokenizers.AddedToken(token, special=True, normalized=False) for token in wanted]
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
  grown = tokenizer.get_vocab_size()
  return Vocabulary(files, grown, image_id, size, tuple(range(size, grown)), *ends, chat)


class _Added(NamedTuple):
  """A token that is not of the vocabulary itself."""

  id: int
  text: str
  special: bool


def _listed(config: Mapping[str, Any]) -> Iterator[_Added]:
  """Yields the tokens that a tokenizer_config.json adds."""
  for index, token in (config.get("added_tokens_decoder") or {}).items():
    yield _Added(int(index), token_text({"token": token}, "token"), bool(token.get("special")))


def _load_json(file: pathlib.Path, values: Any, listed: list[_Added]) -> tokenizers.Tokenizer:
  """Returns a tokenizer whose ids are those of the file, and have no holes.

  Holes are filled with texts that nothing is encoded to. The library takes the number of words for
  the next free id, and numbers added tokens anew: an id after a hole would be given out twice.
  """
  with untrusted.of_form(f"'{file}' is not of its form", ConvertError):
    words, added = values["model"]["vocab"], values.setdefault("added_tokens", [])
    known = set(words) if isinstance(words, dict) else {word for word, _ in words}
    known |= {token["content"] for token in added}
    added += [_described(token) for token in listed if token.text not in known]
    added.sort(key=lambda token: token["id"])
    asked = {token["content"]: int(token["id"]) for token in added}
    if isinstance(words, dict):
      _fill_holes(words, asked)
  try:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
  except Exception as e:  # the library raises plain Exception
    raise ConvertError(f"'{file}' cannot be read: {e}.") from e
  for text, index in asked.items():
    if tokenizer.token_to_id(text) != index:
      raise ConvertError(
        f"'{file}' gives {untrusted.shown(text)} the id {index}, which the library makes "
        f"{tokenizer.token_to_id(text)}: ids are given twice, or have a hole before them."
      )
  if tokenizer.get_vocab_size() != 1 + max(tokenizer.get_vocab().values(), default=-1):
    raise ConvertError(f"'{file}' gives one id to two tokens.")
  return tokenizer


def _described(token: _Added) -> dict[str, Any]:
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  return {"id": token.id, "content": token.text, "special": token.special, **flags}


def _fill_holes(words: dict[str, int], asked: Mapping[str, int]) -> None:
  """Adds what is missing to `words`, if ids have holes: fillers, and the added tokens."""
  used = {*words.values(), *asked.values()}
  holes = sorted(set(range(max(used, default=-1) + 1)) - used)
  if holes:
    # A space and a private character: no form of text before the model has both.
    words |= {f"\ue000 hole {index}": index for index in holes}
    words |= {text: index for text, index in asked.items() if text not in words}


def _chat_template(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
  """Returns a model's chat template, from where `transformers` looks for it, in its order."""
  file = folder / "chat_template.jinja"
  if file.exists():
    limit = untrusted.MAX_CONFIG_BYTES
    return untrusted.read_bytes(file, ConvertError, most=limit).decode(errors="replace")
  file = folder / "chat_template.json"
  if file.exists():
    config = {**config, **untrusted.read_object(file, ConvertError)}
  template = config.get("chat_template")
  if isinstance(template, list):  # several, by name
    named = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}
    template = named.get("default")
  return template if untrusted.is_text(template) and template else None


def _extend_sentencepiece(file: pathlib.Path, data: bytes) -> Vocabulary:
  (own,) = TOKENIZERS[".model"]
  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
  except Exception as e:
    raise ConvertError(f"'{file}' is no tokenizer: neither JSON nor SentencePiece ({e}).") from e
  config = _beside(file, "tokenizer_config.json")
  with untrusted.of_form(f"the files beside '{file}' are not of their form", ConvertError):
    listed = {token.id: token for token in _listed(config)}
    for text, index in _beside(file, "added_tokens.json").items():
      listed.setdefault(int(index), _Added(int(index), text, True))
  data += b"".join(_added_pieces(processor, listed))
  extended = sentencepiece.SentencePieceProcessor(model_proto=data)
  size = extended.vocab_size()
  wanted = SYMBOLS if processor.pad_id() >= 0 else (PAD, *SYMBOLS)
  missing = [piece for piece in wanted if extended.piece_to_id(piece) == extended.unk_id()]
  # Serialised protocol buffers that follow each other are one, with the lists of both.
  data += b"".join(_piece(piece, CONTROL) for piece in missing)
  extended = sentencepiece.SentencePieceProcessor(model_proto=data)
  new = tuple(range(size, extended.vocab_size()))
  bos, eos = (
    processor.id_to_piece(index) if index >= 0 else ""
    for index in (processor.bos_id(), processor.eos_id())
  )
  return Vocabulary(
    {own: data},
    extended.vocab_size(),
    extended.piece_to_id(IMAGE),
    size,
    new,
    bos,
    eos,
    _chat_template(file.parent, config),
  )


def _beside(file: pathlib.Path, name: str) -> dict[str, Any]:
  path = file.parent / name
  return untrusted.read_object(path, ConvertError) if path.exists() else {}


CONTROL, USER_DEFINED = 3, 4  # types of a piece


def _added_pieces(
  processor: sentencepiece.SentencePieceProcessor, listed: Mapping[int, _Added]
) -> Iterator[bytes]:
  """Yields pieces of the tokens that files beside a SentencePiece model add after its own."""
  for index in range(processor.vocab_size(), max(listed, default=-1) + 1):
    token = listed.get(index, _Added(index, f"\ue000 hole {index}", True))
    yield _piece(token.text, CONTROL if token.special else USER_DEFINED)


def _piece(piece: str, kind: int) -> bytes:
  """Returns a ModelProto with one piece {1: piece, 2: score 0.0, 3: type}, serialised."""
  text = piece.encode()
  fields = b"\x0a" + _varint(len(text)) + text + b"\x15\0\0\0\0" + b"\x18" + _varint(kind)
  return b"\x0a" + _varint(len(fields)) + fields


def _varint(value: int) -> bytes:
  low, high = value & 127, value >> 7
  return bytes([low | 128]) + _varint(high) if high else bytes([low])
