# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: SentencePiece with control symbols for images.

Control symbols have an id but no text: `encode("<image>")` gives the ids of seven characters, never
`image_id`. What a user types can therefore not pretend to be a picture or the end of a document.
"""

import functools
import re
from collections.abc import Sequence

import sentencepiece
from etils import epath

from mm1_jax.data.sources import DataError

IMAGE, IMAGE_START, IMAGE_END = "<image>", "<image_start>", "<image_end>"
# SentencePiece writes a space as this character, and so cannot tell the two apart in a text.
_SPACE_MARK = "\u2581"


class Tokenizer:
  """Text to ids and back, without loss: `decode(encode(text)) == text`.

  Args:
    path: a SentencePiece model trained as in `build/sample.py`.

  Raises:
    DataError: the file is missing, is no SentencePiece model, or lacks a symbol we need.
  """

  def __init__(self, path: str):
    self.path = str(path)
    try:
      model = epath.Path(path).read_bytes()
    except OSError as e:
      raise DataError(
        f"data.tokenizer '{path}' cannot be read ({type(e).__name__}). It must be a SentencePiece "
        f"model file; the shipped one is mm1_jax/data/sample/tokenizer.model."
      ) from e
    self._load(model)

  def _load(self, model: bytes) -> None:
    self.model = model
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
      self.vocab_size = self._processor.vocab_size()
    except Exception as e:
      raise DataError(f"data.tokenizer '{self.path}' is not a SentencePiece model ({e}).") from e
    self.pad_id = self._special("<pad>", self._processor.pad_id())
    self.bos_id = self._special("<s>", self._processor.bos_id())
    self.eos_id = self._special("</s>", self._processor.eos_id())
    self.unk_id = self._processor.unk_id()
    self.image_id = self._control(IMAGE)
    self.image_start_id = self._control(IMAGE_START)
    self.image_end_id = self._control(IMAGE_END)
    self._space_mark_ids = [
      self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()
    ]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`; never a special one."""
    parts = text.split(_SPACE_MARK)
    ids = self._processor.encode(parts[0])
    for part in parts[1:]:
      ids += self._space_mark_ids + self._processor.encode(part)
    return ids

  def encode_markup(self, text: str) -> list[int]:
    """Returns the ids of what a template says: control symbols in it take their own ids.

    Only for templates: of what comes from data or users, `encode` makes text.
    """
    if not self._symbols:
      return self.encode(text)
    parts = re.split("(" + "|".join(map(re.escape, self._symbols)) + ")", text)
    ids = [[self._symbols[p]] if p in self._symbols else self.encode(p) for p in parts]
    return [i for part in ids for i in part]

  @functools.cached_property
  def _symbols(self) -> dict[str, int]:
    """Control symbols by their names, the longest first; without those of pictures."""
    names = {self._processor.id_to_piece(i): i for i in self.special_ids}
    for picture in (IMAGE, IMAGE_START, IMAGE_END):
      names.pop(picture, None)
    return dict(sorted(names.items(), key=lambda item: -len(item[0])))

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`; special ids have none and are skipped."""
    return self._processor.decode([int(i) for i in ids if int(i) not in self.special_ids])

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    """Ids that no text encodes to."""
    size = self.vocab_size
    return frozenset(
      i for i in range(size) if self._processor.is_control(i) or self._processor.is_unknown(i)
    )

  def __getstate__(self):
    return {"path": self.path, "model": self.model}

  def __setstate__(self, state):
    self.path = state["path"]
    self._load(state["model"])

  def _control(self, piece: str) -> int:
    """Returns the id of a control symbol."""
    index = self._processor.piece_to_id(piece)
    return self._special(piece, index if self._processor.is_control(index) else -1)

  def _special(self, piece: str, index: int) -> int:
    if index < 0:
      raise DataError(
        f"data.tokenizer '{self.path}' has no control symbol '{piece}'. Train it with "
        f"control_symbols=['{IMAGE}', '{IMAGE_START}', '{IMAGE_END}'] and pad, bos and eos ids, "
        f"as mm1_jax/data/build/sample.py does."
      )
    return index
