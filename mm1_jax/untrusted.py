# SPDX-License-Identifier: Apache-2.0
"""What strangers wrote, read within bounds: JSON, pickles of plain values, Python's literals.

Every file that comes from somewhere else takes one of the ways here: its bytes are counted before
they are read, its depth before anything walks it, and what is wrong with it is one error of the
caller's kind. `of_form` is for the code that takes a form for granted; `visible` is for what is
printed.
"""

import ast
import contextlib
import io
import json
import pickle
import pickletools
import re
import struct
from collections.abc import Iterator
from typing import Any

from etils import epath

from mm1_jax.config import UserError

MAX_DEPTH = 100  # of lists and objects within each other
MAX_CONFIG_BYTES = 16 << 20  # of a file that describes something: a config, an index, a template
MAX_LITERAL_CHARS = 1_000_000
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
TOO_DEEP = "JSON nested too deeply"
# What a value that is not of the form that code expects makes that code raise.
STRAY = (
  *(LookupError, TypeError, AttributeError, ValueError, SyntaxError),
  *(ArithmeticError, RecursionError, MemoryError, struct.error),
)
_SHOWN_CHARS = 200
# A terminal obeys the control characters, and the marks of direction reorder what is beside them.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_KEPT_BYTE = re.compile("[\udc80-\udcff]")
_HALF = re.compile("[\ud800-\udfff]")


class Malformed(ValueError):
  """Bytes that are no JSON within the bounds; `reason` is the same for all of a kind."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason} ({detail})" if detail else reason)
    self.reason = reason


def loads(data: bytes | bytearray | str, *, unique: bool = False) -> Any:
  """Returns the value of a JSON text.

  Args:
    data: UTF-8, with or without a byte order mark; whoever read it has bounded its length.
    unique: whether an object must not have a key twice; `json` would drop the first in silence.

  Raises:
    Malformed: it is none, or nested in more than `MAX_DEPTH` levels.
  """
  try:
    text = data if isinstance(data, str) else data.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise Malformed(NOT_UTF8, f"byte {e.start}") from e
  try:
    value = json.loads(text, object_pairs_hook=_unique if unique else None)
  except RecursionError as e:
    raise Malformed(TOO_DEEP) from e
  except json.JSONDecodeError as e:
    end = e.pos >= len(text.rstrip()) or e.msg.startswith("Unterminated string")
    cut = "; it seems to be cut off: download it again" if end else ""
    raise Malformed(NOT_JSON, f"{e}{cut}") from e
  except Malformed:
    raise
  except ValueError as e:  # an integer of thousands of digits
    raise Malformed(NOT_JSON, str(e)) from e
  if not _is_flat(value, most=len(text)):
    raise Malformed(TOO_DEEP)
  return value


def parse_json(
  data: bytes | str, what: str, error: type[UserError], *, unique: bool = False
) -> Any:
  """Returns the value of a JSON text; `what` it is, such as "'a.json', line 2", begins an error.

  Raises:
    error: as `loads`.
  """
  try:
    return loads(data, unique=unique)
  except Malformed as e:
    raise error(f"{what} is {e}." if e.reason != _TWICE else f"{what} has {e}.") from e


def read_json(path: epath.PathLike, error: type[UserError], *, most: int = MAX_CONFIG_BYTES) -> Any:
  """Returns the value of a JSON file of at most `most` bytes.

  Raises:
    error: it cannot be read, is larger, or as `loads`.
  """
  return parse_json(read_bytes(path, error, most=most), f"'{path}'", error)


def read_object(
  path: epath.PathLike, error: type[UserError], *, most: int = MAX_CONFIG_BYTES
) -> dict[str, Any]:
  """Returns the object of a JSON file, as `read_json`."""
  value = read_json(path, error, most=most)
  if not isinstance(value, dict):
    raise error(f"'{path}' is {shown(value)}; it must be a JSON object.")
  return value


def read_bytes(path: epath.PathLike, error: type[UserError], *, most: int) -> bytes:
  """Returns the bytes of a file; a larger one than `most` is not read.

  Raises:
    error: it cannot be read, or is larger.
  """
  try:
    with epath.Path(path).open("rb") as file:
      data = file.read(most + 1)
  except (OSError, ValueError) as e:  # a name may have a NUL
    raise error(f"'{path}' cannot be read ({e}).") from e
  if len(data) > most:
    raise error(f"'{path}' has more than the {most:,} bytes that can be read at once.")
  return data


def load_pickle(data: bytes, what: str, error: type[UserError]) -> Any:
  """Returns the value of a pickle of lists, dicts, texts and numbers.

  A pickle is a program. Only those instructions are known here that make plain values: there is
  none that could call anything, and none that could reserve memory beyond the pickle's own size.

  Raises:
    error: it is no pickle, asks for anything else, or nests or repeats its values without end.
  """
  try:
    value = _Plain(io.BytesIO(data), encoding="utf-8").load()
    flat = _is_flat(value, most=10 * len(data))  # a value may be shared
  except pickle.UnpicklingError as e:
    raise error(f"{what} is no pickle of plain values ({e}).") from e
  except (EOFError, *STRAY) as e:
    raise error(f"{what} is no pickle of plain values ({why(e)}).") from e
  if not flat:
    raise error(f"{what} is a pickle whose values are nested too deeply, or within themselves.")
  return value


def parse_literal(text: Any) -> Any:
  """Returns the value of Python's notation of a list or the like, as some tables have in a cell.

  Raises:
    ValueError: it is none, or too long or deep to look at.
  """
  if not isinstance(text, str) or len(text) > MAX_LITERAL_CHARS:
    raise ValueError(f"{shown(text)} is no list in Python's notation")
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as e:
    raise ValueError(f"{shown(text)} is no list in Python's notation") from e


@contextlib.contextmanager
def of_form(what: str, error: type[UserError]) -> Iterator[None]:
  """Turns what code raises at a value of another form than it expects into one error.

  Args:
    what: begins the error, such as "'config.json' is not of the form of a model's config".
    error: the kind to raise. UserErrors pass.
  """
  try:
    yield
  except UserError:
    raise
  except STRAY as e:
    raise error(f"{what} ({why(e)}).") from e


def why(error: BaseException) -> str:
  """Returns what a stray error says, in a few words."""
  if isinstance(error, Malformed):
    return str(error)
  if isinstance(error, KeyError):
    return f"it has no {shown(error.args[0] if error.args else error)}"
  try:
    return f"{type(error).__name__}: {str(error)[:_SHOWN_CHARS]}"
  except ValueError:  # it holds an integer of thousands of digits
    return type(error).__name__


def shown(value: Any) -> str:
  """Returns a value as a message shows it: its beginning."""
  try:
    text = repr(value[:_SHOWN_CHARS] if isinstance(value, str | bytes) else value)
  except (ValueError, RecursionError):
    return f"a {type(value).__name__}"
  return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def visible(text: str) -> str:
  r"""Returns a text with what a terminal would obey written out: \x1b for an escape.

  Line breaks and tabs stay. A file's name, a caption and a model's answer may hold such characters.
  """
  return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def mended(text: str) -> str:
  r"""Returns a text without halves of characters: all of it can be written as UTF-8.

  Two halves of one character side by side become it. Bytes that Python kept as `\udc80` to `\udcff`
  because a terminal's or a file system's were not in the encoding that it expected are read as
  UTF-8 where they are, else as Latin-1. Any other half becomes U+FFFD.
  """
  if is_text(text):
    return text
  with contextlib.suppress(UnicodeError):
    return text.encode("utf-8", "surrogateescape").decode()
  text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
  text = _KEPT_BYTE.sub(lambda match: chr(ord(match[0]) - 0xDC00), text)
  return _HALF.sub("\ufffd", text)


def is_text(value: Any) -> bool:
  """Returns whether a value is a text that can be written as UTF-8: no half of a character."""
  if not isinstance(value, str):
    return False
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


_TWICE = "twice in one object"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    seen: set[str] = set()
    key = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise _Twice(key)
  return value


class _Twice(Malformed):
  """Of a key that an object has twice."""

  def __init__(self, key: str):
    super().__init__(_TWICE)
    self._key = key

  def __str__(self) -> str:
    return f"the key {shown(self._key)} {_TWICE}"


def _is_flat(value: Any, *, most: int) -> bool:
  """Returns whether a value has few levels, and at most `most` elements in all.

  Without the second bound, a list that holds one list twice would double at each level.
  """
  level = [value] if isinstance(value, _CONTAINERS) else []
  for _ in range(MAX_DEPTH):
    if not level:
      return True
    most -= sum(map(len, level))
    if most < 0:
      return False
    level = [
      inner
      for outer in level
      for inner in (outer.values() if isinstance(outer, dict) else outer)
      if isinstance(inner, _CONTAINERS)
    ]
  return not level


_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_CONTAINERS = (dict, list, tuple)
_Unpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]


class _Instructions(dict):
  """What `_Plain` does at each byte that is an instruction."""

  def __missing__(self, code: int) -> Any:
    known = _NAMES.get(code)
    name = known or f"0x{code:02x}"
    raise pickle.UnpicklingError(f"it asks for {name}, and only plain values are read")


def _of_plain_values() -> _Instructions:
  names = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE INT LONG LONG1 LONG4 BININT BININT1 BININT2 FLOAT "
    "BINFLOAT NEWTRUE NEWFALSE STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES LIST EMPTY_LIST APPEND APPENDS TUPLE "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 DICT EMPTY_DICT SETITEM SETITEMS GET BINGET LONG_BINGET PUT "
    "BINPUT LONG_BINPUT MEMOIZE"
  )
  codes = [getattr(pickle, name)[0] for name in names.split()]
  return _Instructions({code: _Unpickler.dispatch[code] for code in codes})


class _Plain(_Unpickler):
  """Python's own unpickler in Python, of which plain values are left.

  The one in C reserves as much memory as an instruction names; and it hashes tuples of any depth,
  which overflows the stack, so keys are texts and numbers.
  """

  dispatch = _of_plain_values()

  def load_dict(self) -> None:
    items = self.pop_mark()
    self.append(self._filled({}, items))

  def load_setitem(self) -> None:
    value, key = self.stack.pop(), self.stack.pop()
    self._filled(self.stack[-1], [key, value])

  def load_setitems(self) -> None:
    items = self.pop_mark()
    self._filled(self.stack[-1], items)

  def _filled(self, values: Any, items: list[Any]) -> dict[Any, Any]:
    if not isinstance(values, dict):
      raise pickle.UnpicklingError("it sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
      if not isinstance(key, str | bytes | int | float):
        raise pickle.UnpicklingError(f"a key is a {type(key).__name__}")
      values[key] = value
    return values

  dispatch[pickle.DICT[0]] = load_dict
  dispatch[pickle.SETITEM[0]] = load_setitem
  dispatch[pickle.SETITEMS[0]] = load_setitems
