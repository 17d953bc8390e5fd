# SPDX-License-Identifier: Apache-2.0
"""A model's own chat template, a Jinja program, in our form of templates where that can say it.

The program is run on a few conversations of marked words. The text between the words is read
off, and the template made of it is kept if it writes the same texts.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mm1_jax.convert import ConvertError
from mm1_jax.data.template import ChatTemplate, Markup

MAX_CHARS = 1 << 18  # of a template, and of what it writes
SECONDS = 120  # a template is a program, and may have no end
USER, ANSWER, MORE, LAST, SYSTEM = (f"{word}words" for word in "UAMLS")

Turns = Sequence[Mapping[str, str]]


def _turns(*words: str) -> Turns:
  roles = {USER: "user", MORE: "user", SYSTEM: "system"}
  return [{"role": roles.get(word, "assistant"), "content": word} for word in words]


# Conversations, and whether an answer is asked for.
PROBES: dict[str, tuple[Turns, bool]] = {
  "asked": (_turns(USER), True),
  "said": (_turns(USER), False),
  "answered": (_turns(USER, ANSWER), False),
  "long": (_turns(USER, ANSWER, MORE, LAST), False),
  "asked again": (_turns(USER, ANSWER, MORE), True),
  "system": (_turns(SYSTEM, USER, ANSWER, MORE), True),
}


def translate(program: str, bos: str, eos: str) -> tuple[ChatTemplate | None, str]:
  """Returns a template in our form, None where it cannot say it, and what is lost, if anything.

  Args:
    program: in Jinja, as `transformers` renders it.
    bos: text of the symbol that begins a text; eos, that ends one.
  """
  try:
    texts = _render(program, bos, eos)
    template = _read(texts, bos, eos)
  except (ConvertError, ValueError) as e:
    return None, f"{e}"
  wrong = [name for name, text in texts.items() if text not in _written(template, name, bos)]
  if not wrong:
    return template, ""
  if wrong == ["system"]:
    return template, "a system turn of your own is written in another way than by the model's"
  return None, "what it writes depends on more than a turn's role"


def _written(template: ChatTemplate, name: str, bos: str) -> tuple[str, str]:
  """Returns a probe's text, without and with what may be left out at its end."""
  text, ask = written(template, *PROBES[name], bos), PROBES[name][1]
  return text.removesuffix(" " if ask else template.assistant.after), text


def written(template: ChatTemplate, turns: Turns, ask: bool, bos: str) -> str:
  """Returns the text of a conversation."""
  if template.default_system and turns[0]["role"] != "system":
    turns = [{"role": "system", "content": template.default_system}, *turns]
  text = bos * template.bos
  for turn in turns:
    markup = template.markup(turn["role"])
    text += markup.before + turn["content"] + markup.end + markup.after
  return text + template.assistant.before * ask


def _read(texts: Mapping[str, str | None], bos: str, eos: str) -> ChatTemplate:
  """Returns the template that wrote the texts, if any did; raises ValueError where none can."""
  asked, said, answered, long = (texts[name] for name in ("asked", "said", "answered", "long"))
  if asked is None or said is None or answered is None or long is None:
    raise ValueError("it refuses plain turns of user and assistant")
  head, question = _split(asked, USER)
  user_after = _split(said, USER)[1]
  around, tail = _split(answered, ANSWER)
  around = _split(around, USER)[1]
  # Without the space that is tokenised with an answer, perhaps.
  if question not in (around, around.removesuffix(" ")) or not around.startswith(user_after):
    raise ValueError("a question is written otherwise where an answer is asked for")
  before_answer = around.removeprefix(user_after)
  between = _split(_split(long, ANSWER)[1], MORE)[0]
  if not tail or not between.startswith(tail):
    raise ValueError("nothing ends an answer, or something else than before the next question")
  between = between.removeprefix(tail)
  before_user = _common_end(between, head)
  if not before_user:
    raise ValueError("the first question begins otherwise than the next")
  between, head = between.removesuffix(before_user), head.removesuffix(before_user)
  begins = bool(bos) and head.startswith(bos)
  head = head.removeprefix(bos) if begins else head
  system, default = _system(texts["system"], head, before_user, bos if begins else "")
  end, after = _end(tail, eos)
  answer = Markup(before_answer, end, after + between)
  return ChatTemplate(system, Markup(before_user, after=user_after), answer, begins, default)


def _system(text: str | None, head: str, before_user: str, bos: str) -> tuple[Markup, str]:
  """Returns what is around a system turn, and the text of one that is not given."""
  before = after = ""
  if text is not None and SYSTEM in text:
    before, rest = _split(text, SYSTEM)
    before = before.removeprefix(bos)
    after = _split(rest, USER)[0].removesuffix(before_user)
  elif head.strip():
    begins = head.rstrip()
    return Markup("", after=head[len(begins) :]), begins
  else:
    after = "\n\n"
  if not head:
    return Markup(before, after=after), ""
  if len(head) > len(before + after) and head.startswith(before) and head.endswith(after):
    return Markup(before, after=after), head[len(before) : len(head) - len(after)]
  if head == before + after and "\n\n" in before[:-2]:
    # A text that begins every system turn, such as a date.
    at = before.index("\n\n") + 2
    return Markup(before[:at], after=after), before[at:]
  raise ValueError("the text that begins a conversation is no system turn")


def _end(tail: str, eos: str) -> tuple[str, str]:
  """Returns what an answer ends with, which is trained on, and what comes after that."""
  if eos and eos in tail:
    at = tail.index(eos) + len(eos)
    return tail[:at], tail[at:]
  end = tail.rstrip()
  if not end:
    raise ValueError("an answer ends with nothing but space")
  return end, tail[len(end) :]


def _common_end(a: str, b: str) -> str:
  num = 0
  while num < min(len(a), len(b)) and a[-1 - num] == b[-1 - num]:
    num += 1
  return a[len(a) - num :]


def _split(text: str, word: str) -> tuple[str, str]:
  before, found, after = text.partition(word)
  if not found or word in after:
    raise ValueError("it does not write each turn once")
  return before, after


def _render(program: str, bos: str, eos: str) -> dict[str, str | None]:
  """Returns the text of each probe, None where the program refuses it, from a process of its own.

  Raises:
    ConvertError: it is no Jinja, or did not end in time.
  """
  if len(program) > MAX_CHARS:
    raise ConvertError(f"it has {len(program):,} characters")
  asked = {"program": program, "bos": bos, "eos": eos, "probes": list(PROBES.values())}
  command = [sys.executable, "-m", __name__]
  try:
    ended = subprocess.run(
      command, input=json.dumps(asked).encode(), capture_output=True, timeout=SECONDS, check=True
    )
  except subprocess.TimeoutExpired as e:
    raise ConvertError(f"it did not end in {SECONDS} s") from e
  except subprocess.CalledProcessError as e:
    raise ConvertError("it cannot be rendered") from e
  return dict(zip(PROBES, json.loads(ended.stdout), strict=True))


def _render_here(asked: Mapping[str, Any]) -> list[str | None]:
  """Renders as `transformers.utils.chat_template_utils` does."""
  import jinja2
  from jinja2 import sandbox

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  made = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )
  made.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
  made.globals["raise_exception"] = refuse
  template, texts = made.from_string(asked["program"]), []
  for turns, ask in asked["probes"]:
    values = {"bos_token": asked["bos"], "eos_token": asked["eos"]}
    try:
      text = template.render(messages=turns, add_generation_prompt=ask, **values)
    except jinja2.TemplateError:
      text = None
    texts.append(text if text is None or len(text) <= MAX_CHARS else None)
  return texts


def _bound() -> None:
  """Bounds this process, which runs a stranger's program."""
  import resource

  resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
  resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


if __name__ == "__main__":
  _bound()
  sys.stdout.write(json.dumps(_render_here(json.loads(sys.stdin.buffer.read()))))
