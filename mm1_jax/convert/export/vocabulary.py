# SPDX-License-Identifier: Apache-2.0
"""A run's tokenizer as tokenizer.json, which `transformers` reads without SentencePiece."""

import json
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from mm1_jax.convert import ConvertError
from mm1_jax.data.tokenizer import TOKENIZER_CONFIG, Tokenizer, is_json, protobuf_fields

SPACE_MARK = "\u2581"
UNIGRAM, BPE = 1, 2  # TrainerSpec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # a piece's type
# Texts that every exported tokenizer is checked on: ids must be equal. Real texts are for tests;
# these are the characters that such texts are made of.
PROBES = (
  "A photo of two dogs, running on the beach.",
  "  leading, doubled  and trailing spaces  ",
  "line\n\nbreaks\r\n\tand tabs\n ",
  "Zürich, naïve café, 東京, Привет, مرحبا, 👩‍🚀 e\u0301 \u00a0 \u2028",
  "3.14159 x 10^23 = 1,234,567; `code()` <b>html</b> [x] {y} a_b-c/d\\e",
  "</s><s><image><pad> <unk> text that looks like control symbols </s>",
  "ALL CAPS, CamelCase, loooooong, \"quoted\" 'single' don't won't it's",
  "\x00\x07 control characters \ufffd",
  " ",
  "\n",
  # Runs, which a vocabulary may have many pieces of: the order in which these are made shows.
  *(f"a{' ' * num}b" for num in (*range(2, 72), 127, 128, 200)),
  *(f"a{character * num}" for character in "-=*#_.~/\n\t0" for num in (7, 18, 23, 33, 47, 64, 81)),
  *(f"{' ' * num}x = 1;\n{' ' * (num + 3)}return\n" for num in (3, 17, 19, 26, 39)),
)


def files(tokenizer: Tokenizer, model_data: bytes, config_data: bytes) -> dict[str, bytes]:
  """Returns tokenizer.json and tokenizer_config.json.

  Args:
    tokenizer: the run's.
    model_data: its file.
    config_data: the tokenizer_config.json beside it, if there is one.

  Raises:
    ConvertError: the JSON would not give the ids of the original.
  """
  if is_json(model_data):
    built, named = tokenizers.Tokenizer.from_str(model_data.decode()), json.loads(config_data)
  else:
    built, named = _from_sentencepiece(model_data), {}
    for name in ("bos", "eos", "pad", "unk"):
      index = getattr(tokenizer, f"{name}_id")
      if index >= 0:
        named[f"{name}_token"] = built.id_to_token(index)
  _compare(tokenizer, built)
  named |= {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
  }
  return {
    "tokenizer.json": built.to_str().encode(),
    TOKENIZER_CONFIG: (json.dumps(named, indent=2) + "\n").encode(),
  }


def space_mark_ids(tokenizer: Tokenizer) -> list[int]:
  """Returns the ids of U+2581 in a text, where the JSON would take it for a space."""
  return [] if is_json(tokenizer.model) else tokenizer.encode(SPACE_MARK)


def _compare(tokenizer: Tokenizer, built: tokenizers.Tokenizer) -> None:
  built.encode_special_tokens = True
  for text in PROBES:
    wanted, got = tokenizer.encode(text), built.encode(text, add_special_tokens=False).ids
    if wanted != got:
      raise ConvertError(
        f"data.tokenizer '{tokenizer.path}' as tokenizer.json gives {got} for {text!r}, not "
        f"{wanted}; --format=safetensors exports it as it is."
      )
  built.encode_special_tokens = False


def _from_sentencepiece(data: bytes) -> tokenizers.Tokenizer:
  processor = sentencepiece.SentencePieceProcessor(model_proto=data)
  trainer, normalizer = (dict(protobuf_fields(part)) for part in _specs(data))
  kind = trainer.get(3, UNIGRAM)  # protocol buffers leave out what is at its default
  if kind not in (UNIGRAM, BPE):
    raise ConvertError(f"a SentencePiece model of type {kind} is neither Unigram (1) nor BPE (2).")
  pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
  scores = [processor.get_score(i) for i in range(processor.vocab_size())]
  kinds = [
    dict(protobuf_fields(piece)).get(3, NORMAL)
    for number, piece in protobuf_fields(data)
    if number == 1
  ]
  bytes_too = bool(trainer.get(35, 0))
  if kind == BPE:
    normal = {piece: i for i, piece in enumerate(pieces) if kinds[i] == NORMAL}
    model = models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=_merges(normal, scores),
      unk_token=pieces[processor.unk_id()],
      fuse_unk=True,
      byte_fallback=bytes_too,
    )
  else:
    scored = list(zip(pieces, scores, strict=True))
    model = models.Unigram(scored, unk_id=processor.unk_id(), byte_fallback=bytes_too)
  built = tokenizers.Tokenizer(model)
  prefix = bool(normalizer.get(3, 1))
  built.normalizer = _normalizer(normalizer, prefix)
  steps: list[Any] = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
  built.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
  for i, piece in enumerate(pieces):
    if kinds[i] in (CONTROL, UNKNOWN):
      built.add_special_tokens([AddedToken(piece, normalized=False)])
    elif kinds[i] == USER_DEFINED:
      built.add_tokens([AddedToken(piece, normalized=False)])
  return built


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
  """Returns all ways to make a piece of two, the pieces of the highest score first."""
  found = []
  for piece, index in vocabulary.items():
    for at in range(1, len(piece)):
      left, right = piece[:at], piece[at:]
      if left in vocabulary and right in vocabulary:
        # Of equal scores SentencePiece takes the leftmost pair, whose left part has grown already.
        order = (-scores[index], -len(left), index)
        found.append((order, (left, right)))
  return [pair for _, pair in sorted(found)]


def _normalizer(spec: dict[int, Any], prefix: bool) -> Any:
  steps: list[Any] = []
  if spec.get(2):
    steps.append(normalizers.Precompiled(spec[2]))
  if spec.get(4, 1):
    steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
  if prefix:
    steps.append(normalizers.Prepend(" "))
  return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARK)])


def _specs(data: bytes) -> tuple[bytes, bytes]:
  """Returns trainer_spec and normalizer_spec of a ModelProto."""
  parts = {number: value for number, value in protobuf_fields(data) if number in (2, 3)}
  return parts.get(2, b""), parts.get(3, b"")
