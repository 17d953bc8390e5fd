# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models as tokenizer.json: the same ids, also of long runs of one character."""

import random
import struct

import pytest
import sentencepiece

from mm1_jax.convert.export import vocabulary

MARK = vocabulary.SPACE_MARK
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
BPE = b"\x18\x02"  # TrainerSpec.model_type
AS_IT_IS = b"\x0a\x08identity\x18\0\x20\0\x28\x01"  # NormalizerSpec: no prefix, no space removed


def field(number: int, value: bytes) -> bytes:
  assert len(value) < 128
  return bytes([number << 3 | 2, len(value)]) + value


def piece(text: str, score: float, kind: int = NORMAL) -> bytes:
  scored = b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
  return field(1, field(1, text.encode()) + scored)


def model(runs: list[int], step: float) -> bytes:
  """Returns a BPE with runs of spaces as pieces, each by `step` less likely than the one before."""
  pieces = [piece("<unk>", 0, UNKNOWN), piece("<s>", 0, CONTROL), piece("</s>", 0, CONTROL)]
  pieces += [piece(MARK * num, -1 - step * i) for i, num in enumerate(runs)]
  pieces += [piece(text, -50 - i) for i, text in enumerate((MARK, "a", "b"))]
  return b"".join(pieces) + field(2, BPE) + field(3, AS_IT_IS)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("runs", [[2, 4, 8, 16, 3, 6, 12, 7, 5, 10], [*range(2, 17)]])
def test_runs_have_the_ids_of_sentencepiece(runs, step):
  """Where scores are equal, SentencePiece goes by the place in the text, and the JSON by ranks."""
  data = model(runs, step)
  theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
  ours = vocabulary._from_sentencepiece(data)
  rng = random.Random(0)
  texts = [f"a{' ' * num}b" for num in range(1, 120)]
  texts += [
    "".join(rng.choice(["a", "b", " " * 5, " " * 12]) for _ in range(30)) for _ in range(200)
  ]
  wrong = [t for t in texts if ours.encode(t, add_special_tokens=False).ids != theirs.encode(t)]
  assert wrong == []


def test_long_runs_are_probed():
  assert any(" " * 40 in probe for probe in vocabulary.PROBES)
  assert any("-" * 40 in probe for probe in vocabulary.PROBES)
