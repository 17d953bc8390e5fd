# SPDX-License-Identifier: Apache-2.0
"""VLMEvalKit's TSVs: one table with pictures as base64, of any benchmark that it has.

  index  image  question  hint  A  B  C  D  answer  category  l2-category  split  image_path

`image` is base64, a Python list of several, or the index of a row that has the picture. With
columns A, B, ... a row is multiple choice; without, its answer is a text. What pandas takes for
missing is a text here (VLMEvalKit loses choices such as "None"); only an empty field, or "nan", is
none.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from mm1_jax import untrusted
from mm1_jax.eval.task import EvalError, Item, Picture
from mm1_jax.eval.tasks import files

LETTERS = "ABCDEFGHIJ"
SHORTEST = 64  # characters of a picture; a shorter text is another row's index


def read(path: epath.Path) -> list[Item]:
  """Returns the items of a TSV; `details` has its other columns, and `row`, all but the picture.

  Raises:
    EvalError: it is not of the form above.
  """
  rows = files.read_rows(path)
  pictures = {row.get("index"): row.get("image", "") for row in rows}
  folder, decode = path.parent, functools.cache(files.decode)  # a picture of many rows is one

  def make(row: Mapping[str, str]) -> Iterator[Item]:
    known = {name: text for name, text in row.items() if name != "image" and present(text)}
    choices = tuple(known[letter] for letter in _letters(known))
    answer = known.get("answer", "")
    right = files.letter_index(answer, choices) if choices and answer else -1
    yield Item(
      row["index"],
      row["question"],
      _pictures(row, pictures, folder, decode),
      (choices[right],) if right >= 0 else (answer,) if answer else (),
      choices,
      right,
      details={
        **{name: text for name, text in known.items() if name not in LETTERS},
        "row": {name: text for name, text in row.items() if name != "image"},
      },
    )

  return files.items(path, rows, make)


def present(text: str) -> bool:
  return text not in ("", "nan")


def _letters(row: Mapping[str, str]) -> str:
  """Returns the letters of a row's choices.

  Raises:
    EvalError: one in the middle is missing, so that letters would name other choices.
  """
  letters = "".join(letter for letter in LETTERS if letter in row)
  if not LETTERS.startswith(letters):
    raise EvalError(f"it has the choices {', '.join(letters)}, and not those between")
  return letters


def _pictures(
  row: Mapping[str, Any], of: Mapping[Any, str], folder: epath.Path, decode: Callable[[str], bytes]
) -> tuple[Picture, ...]:
  image = row.get("image", "")
  if 0 < len(image) <= SHORTEST:
    if len(of.get(image, "")) <= SHORTEST:
      raise EvalError(f"its picture is that of row '{image}', which has none")
    image = of[image]
  if image:
    several = untrusted.parse_literal(image) if image.startswith("[") else [image]
    return tuple(decode(one) for one in several)
  path = row.get("image_path", "")
  names = untrusted.parse_literal(path) if path.startswith("[") else [path] if present(path) else []
  return tuple(files.picture(folder, name) for name in names)
