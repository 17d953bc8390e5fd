# SPDX-License-Identifier: Apache-2.0
"""Chat templates: the text around the turns of a conversation, read from a JSON file.

  {
    "bos": true,
    "default_system": "Be brief.",
    "system":    {"before": "", "after": "\\n\\n"},
    "user":      {"before": "USER: ", "after": "\\n"},
    "assistant": {"before": "ASSISTANT: ", "end": "</s>", "after": ""}
  }

A conversation is `<s>` if `bos` says so, then each turn as `before`, what is said, `end`, `after`.
Trained on are the assistant's words and their `end`, nothing else. `default_system` (none if left
out) begins conversations without a system turn of their own. A space at the end of `before` is
tokenised with the text after it. Control symbols of the tokenizer, such as `</s>`, take their one
id where a template has them; the same characters in a user's text do not.

Templates that are shipped lie in `templates/`: `default`, `vicuna`, `llama3`, `chatml`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from mm1_jax import untrusted
from mm1_jax.data.sources import ROLES, DataError

SHIPPED = pathlib.Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Markup:
  """The text around one role's words."""

  before: str
  end: str = ""  # of an answer: said by the assistant, so trained on
  after: str = ""  # left out after the last answer, where nothing follows


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A checked template."""

  system: Markup
  user: Markup
  assistant: Markup
  bos: bool = True
  default_system: str = ""

  def markup(self, role: str) -> Markup:
    return getattr(self, role)

  def to_json(self) -> str:
    """Returns a file that `load_template` reads as this template."""
    values = dataclasses.asdict(self)
    for role in ROLES:
      values[role] = {key: text for key, text in values[role].items() if text}
    return json.dumps(values, indent=2) + "\n"


def load_template(name: str = "default") -> ChatTemplate:
  """Returns the template in a file, or a shipped one by its name.

  Raises:
    DataError: there is none, or it is not of the form above; the message names file and key.
  """
  names = sorted(path.stem for path in SHIPPED.glob("*.json"))
  path = epath.Path(SHIPPED / f"{name}.json" if name in names else name)
  where = f"data.chat_template '{path}'"
  try:
    data = untrusted.read_bytes(path, DataError, most=untrusted.MAX_CONFIG_BYTES)
  except DataError as e:
    raise DataError(
      f"data.chat_template {e} It must be one of {names}, or a JSON file such as "
      f"{SHIPPED / 'default.json'}."
    ) from e
  return _template(untrusted.parse_json(data, where, DataError), where)


def _template(values: Any, where: str) -> ChatTemplate:
  fields = _object(
    values, where, {"bos": bool, "default_system": str, **dict.fromkeys(ROLES, dict)}
  )
  for role in ROLES:
    if role not in fields:
      raise DataError(f"{where} has no '{role}'.")
    keys = ("before", "end", "after") if role == "assistant" else ("before", "after")
    markup = _object(fields[role], f"{where}: {role}", dict.fromkeys(keys, str))
    fields[role] = Markup(**{"before": "", **markup})
  if not fields["assistant"].end:
    raise DataError(
      f"{where}: assistant has no 'end', so no answer would ever end; '</s>' ends most."
    )
  return ChatTemplate(**fields)


def _object(value: Any, where: str, types: Mapping[str, type]) -> dict[str, Any]:
  """Returns a JSON object whose keys are among those of `types`, and its values of their types."""
  if not isinstance(value, Mapping):
    raise DataError(f"{where} is {untrusted.shown(value)}; it must be an object.")
  for key, entry in value.items():
    if key not in types:
      raise DataError(
        f"{where} has the key {untrusted.shown(key)}; it may have {', '.join(types)}."
      )
    kind = types[key]
    if not isinstance(entry, kind) or (kind is str and not untrusted.is_text(entry)):
      entry = untrusted.shown(entry)
      raise DataError(f"{where}: '{key}' is {entry}; it must be of type {kind.__name__}.")
  return dict(value)
