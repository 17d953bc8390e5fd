# SPDX-License-Identifier: Apache-2.0
"""Talks with a model in the terminal: what `chat.py` does with each line that is typed."""

import contextlib
import shlex
import signal
import threading
from collections.abc import Iterator

from etils import epath

from mm1_jax import untrusted
from mm1_jax.config import UserError
from mm1_jax.data.tokenizer import IMAGE
from mm1_jax.inference.conversation import Conversation
from mm1_jax.inference.prompts import PromptError

HELP = f"""\
/image FILE ...   pictures for the next question; in front of it, or at each {IMAGE} in it
/drop             lets go of pictures that wait for the next question
/system TEXT      begin anew, and tell the model how to behave
/history          what has been said
/clear            begin anew
/help             this list
/quit             the end; Ctrl-D too
Ctrl-C stops an answer, twice at once; what was said of it stays in the conversation."""


class Chat:
  """Lines of a user go in, answers are printed."""

  def __init__(self, conversation: Conversation):
    self._conversation = conversation
    self._commands = {
      "image": self._image,
      "drop": self._drop,
      "system": self._system,
      "history": self._history,
      "clear": self._clear,
      "help": lambda _: print(HELP),
    }

  def read(self, line: str) -> bool:
    """Does what a line says; returns whether to continue. Mistakes are told and change nothing."""
    line = line.strip()
    try:
      if line in ("/quit", "/exit"):
        return False
      if line.startswith("/"):
        self._command(*line[1:].partition(" ")[::2])
      elif line:
        self._ask(line)
    except UserError as e:
      self._tell(str(e))
    except Exception as e:  # a fault of one line ends no conversation
      self._tell(untrusted.why(e))
    return True

  def _tell(self, mistake: str) -> None:
    print(untrusted.visible(f"error: {mistake}"))
    if num := len(self._conversation.images):
      print(f"[{num} image{'s'[: num > 1]} for the next question; /drop lets go of them]")

  def _command(self, name: str, rest: str) -> None:
    if name not in self._commands:
      raise PromptError(f"there is no /{name}; /help lists what there is.")
    self._commands[name](rest.strip())

  def _ask(self, text: str) -> None:
    shown = ""
    try:
      with _noted_interrupts() as interrupted:
        for answer in self._conversation.ask(text):
          print(untrusted.visible(answer[len(shown) :]), end="", flush=True)
          shown = answer
          if interrupted.is_set():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
      print(" [stopped]", end="")
    print()

  def _image(self, rest: str) -> None:
    try:
      files = [epath.Path(name) for name in shlex.split(rest)]
    except ValueError as e:
      raise PromptError(f"{e} in {rest}; put names with spaces in quotes.") from e
    if not files:
      raise PromptError("/image needs a file, such as /image photo.jpg.")
    for file in files:
      file = file.expanduser()
      height, width = self._conversation.show(file)
      shown = untrusted.visible(file.name)
      print(f"[image {len(self._conversation.images)}: {shown}, {width} x {height}]")

  def _drop(self, _: str) -> None:
    self._conversation.images = []
    print("[no images for the next question]")

  def _system(self, rest: str) -> None:
    self._conversation.clear(rest)
    print("[a new conversation, with these instructions]" if rest else "[a new conversation]")

  def _clear(self, _: str) -> None:
    self._conversation.clear()
    print("[a new conversation]")

  def _history(self, _: str) -> None:
    for turn in self._conversation.turns or [{"role": "", "content": "[nothing was said yet]"}]:
      items = [turn["content"]] if isinstance(turn["content"], str) else turn["content"]
      said = " ".join(i if isinstance(i, str) else f"[{epath.Path(i).name}]" for i in items)
      print(untrusted.visible(f"{turn['role']}: {said}" if turn["role"] else said))


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[threading.Event]:
  """Notes Ctrl-C instead of raising it: raised in a callback of JAX's, it would be lost.

  The second one is raised: compiling and beam search may yield nothing for long.
  """
  interrupted = threading.Event()

  def note(*_) -> None:
    if interrupted.is_set():
      raise KeyboardInterrupt
    interrupted.set()

  before = signal.signal(signal.SIGINT, note)
  try:
    yield interrupted
  finally:
    signal.signal(signal.SIGINT, before)
