# SPDX-License-Identifier: Apache-2.0
"""The terminal chat: what is typed, what is printed, and what stays in the conversation."""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import PIL.Image
import pytest

from mm1_jax.inference import sampler
from mm1_jax.inference.conversation import Conversation
from mm1_jax.inference.prompts import PromptError
from mm1_jax.inference.terminal import Chat

pytestmark = pytest.mark.compiles


@pytest.fixture
def conversation(model):
  return Conversation(model, max_new_tokens=9)


@pytest.fixture
def chat(conversation, capsys):
  """Reads lines, and returns what is printed."""
  one = Chat(conversation)

  def read(*lines: str) -> str:
    for line in lines:
      assert one.read(line) is (line != "/quit")
    return capsys.readouterr().out

  return read


def test_the_model_reads_all_turns(chat, conversation, model, pictures):
  a, b = pictures
  shown = chat(f"/image {a}", "What is this?")
  first = {"role": "user", "content": [a, "What is this?"]}
  (answer,) = model.generate([[first]], max_new_tokens=9)
  assert shown == f"[image 1: a.png, 30 x 20]\n{answer}\n"
  turns = [first, {"role": "assistant", "content": answer}]
  assert conversation.turns == turns
  assert conversation.images == []
  shown = chat(f"/image {b} '{a}'", "Is <image> like <image>?")
  turns.append({"role": "user", "content": ["Is ", b, " like ", a, "?"]})
  (answer,) = model.generate([turns], max_new_tokens=9)
  assert shown.splitlines()[-1] == answer.splitlines()[-1]
  history = chat("/history")
  assert "user: [a.png] What is this?\n" in history
  assert "user: Is  [b.png]  like  [a.png] ?\n" in history


def test_system_turn_and_a_new_beginning(chat, conversation):
  chat("Hi", "/system Be brief.", "Hi")
  assert [turn["role"] for turn in conversation.turns] == ["system", "user", "assistant"]
  assert conversation.turns[0]["content"] == "Be brief."
  assert "nothing was said yet" in chat("/clear", "/history")
  assert conversation.turns == []


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("/image", "/image needs a file"),
    ("/image /no/such.png", "image '/no/such.png' cannot be read: No such file"),
    (f"/image {__file__}", "cannot be used: unreadable image"),
    ("/image 'open", "No closing quotation in 'open"),
    ("/imgae x", "there is no /imgae; /help lists"),
    ("<image> what?", "has 1 <image> slot, but there are 0 images"),
    ("word " * 300, "but the model was trained on 192"),
    ("/image a\0.png", "cannot be read: ValueError: embedded null byte"),
    ("/image ~no_such_user/a.png", "user/a.png' cannot be read: No such file"),
    ("/image " + "x" * 5000, "File name too long"),
  ],
)
def test_a_mistake_is_told_and_changes_nothing(chat, conversation, line, message):
  expected = chat("Hi")
  chat("/clear")
  assert message in chat(line)
  assert conversation.turns == conversation.images == []
  assert chat("", "Hi") == expected


def test_halves_of_characters_are_mended_and_end_nothing(chat):
  """What a terminal of Latin-1 sends, where UTF-8 is expected."""
  expected = chat("/system café", "café?")
  assert chat("/system caf\udce9", "caf\udce9?") == expected
  chat("\ud800", "/history")


def test_a_fault_of_ours_is_told_and_changes_nothing(chat, conversation, model, monkeypatch):
  expected = chat("Hi")
  chat("/clear")

  def fail(*_, **__):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

  with monkeypatch.context() as patch:
    patch.setattr(model, "stream", fail)
    assert chat("Hi") == "error: RuntimeError: RESOURCE_EXHAUSTED: out of memory\n"
  assert conversation.turns == []
  assert chat("Hi") == expected


def test_pictures_that_do_not_fit_can_be_let_go(chat, conversation, pictures):
  expected = chat(f"/image {pictures[1]}", "Hi")
  chat("/clear", "/image" + f" {pictures[0]}" * 40)
  shown = chat("Hi")
  assert "(40 x 6 of them for images) and the answer" in shown
  assert shown.endswith("[40 images for the next question; /drop lets go of them]\n")
  assert len(conversation.images) == 40
  chat("/drop")
  assert chat(f"/image {pictures[1]}", "Hi") == expected


def test_pixels_are_bounded(chat, pictures, tmp_path):
  """50 million in some thousand bytes are read, 70 million are not."""
  expected = chat(f"/image {pictures[0]}", "Hi").splitlines()[1:]
  for name, height in (("large.png", 5000), ("bomb.png", 7000)):
    PIL.Image.new("1", (10_000, height)).save(tmp_path / name)
  shown = chat("/clear", f"/image {tmp_path / 'bomb.png'}")
  assert "image too large (more than 64 million pixels)" in shown
  assert "[image 1: large.png, 10000 x 5000]" in chat(f"/image {tmp_path / 'large.png'}", "Hi")
  assert chat("/clear", f"/image {pictures[0]}", "Hi").splitlines()[2:] == expected


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(chat, conversation, model, monkeypatch):
  (whole,) = model.generate([["Hi"]], max_new_tokens=9, chat=True)
  (first,) = model.generate([["Hi"]], max_new_tokens=1, chat=True)
  decode = sampler.decode

  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(sampler, "decode", interrupt)
  assert chat("Hi") == f"{first} [stopped]\n"
  assert conversation.turns[-1] == {"role": "assistant", "content": first}
  monkeypatch.setattr(sampler, "decode", decode)
  assert chat("/clear", "Hi").endswith(f"{whole}\n")


def test_a_second_ctrl_c_does_not_wait_for_the_next_part(chat, conversation, monkeypatch):
  reached = []

  def ask(_):
    yield "one part"
    os.kill(os.getpid(), signal.SIGINT)
    reached.append("after the first")
    os.kill(os.getpid(), signal.SIGINT)
    reached.append("after the second")

  monkeypatch.setattr(conversation, "ask", ask)
  before = signal.getsignal(signal.SIGINT)
  assert chat("Hi") == "one part [stopped]\n"
  assert reached == ["after the first"]
  assert signal.getsignal(signal.SIGINT) is before


def test_answers_get_as_much_room_as_there_is(model):
  conversation = Conversation(model, max_new_tokens=10_000)
  assert len(model.tokenizer.encode([*conversation.ask("Hi")][-1])) > 150
  assert len(conversation.turns) == 2


@pytest.mark.parametrize("changes", [{"max_new_tokens": "9"}, {"seed": 1.5}])
def test_settings_of_another_type_are_refused(model, changes):
  with pytest.raises(PromptError, match="it must be a whole number"):
    Conversation(model, **changes).ask("Hi")


class Terminal:
  """The program on a terminal of its own."""

  def __init__(self, *flags: str):
    self._master, slave = pty.openpty()
    # A session's leader that opens a terminal is ruled by it: Ctrl-C there reaches the program.
    shell = f'exec "$@" <{os.ttyname(slave)} >{os.ttyname(slave)} 2>&1'
    self.process = subprocess.Popen(
      ["sh", "-c", shell, "sh", sys.executable, "-m", "mm1_jax.inference.chat", *flags],
      start_new_session=True,
    )
    self._slave = slave
    self.screen = ""

  def type(self, text: str) -> None:
    os.write(self._master, text.encode())

  def wait_for(self, pattern: str, seconds: float = 600) -> str:
    """Returns what was printed up to and with `pattern`, and forgets it."""
    end = time.monotonic() + seconds
    while not (match := re.search(pattern, self.screen)):
      assert time.monotonic() < end, f"no {pattern!r} in {self.screen!r}"
      if select.select([self._master], [], [], 0.1)[0]:
        self.screen += os.read(self._master, 65536).decode(errors="replace")
    shown, self.screen = self.screen[: match.end()], self.screen[match.end() :]
    return shown

  def press_until(self, key: str, pattern: str, presses: int = 60) -> str:
    """As a user does: Python puts off a Ctrl-C that comes just before it waits for a key."""
    for _ in range(presses):
      self.type(key)
      with contextlib.suppress(AssertionError):
        return self.wait_for(pattern, seconds=2)
    return self.wait_for(pattern, seconds=0)

  def close(self) -> None:
    self.process.kill()
    self.process.wait()
    os.close(self._master)
    os.close(self._slave)


@pytest.mark.long  # on a busy machine the terminal's last Ctrl-C was not answered, once
def test_on_a_terminal(workdir, pictures, tmp_path):
  """Typed as a user types, with Ctrl-C in the middle of an answer that would be long."""
  run = shutil.copytree(workdir, tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["data"] |= {"seq_len": 20_000, "chat": True}
  (run / "config.json").write_text(json.dumps(config))
  terminal = Terminal(f"--checkpoint={run}", "--max-new-tokens=15000")
  try:
    terminal.wait_for("> ")
    terminal.type(f"/image {pictures[0]}\n")
    terminal.wait_for(r"\[image 1: a.png, 30 x 20\]")
    terminal.wait_for("> ")
    terminal.type("What is this?\n")
    terminal.wait_for(r"this\?\r\n.")  # the answer has begun
    terminal.type("\x03")
    terminal.wait_for(r" \[stopped\]\r\n> ", seconds=30)
    terminal.type("/history\n")
    terminal.wait_for(r"user: \[a.png\] What is this\?\r\nassistant: .")
    terminal.wait_for("> ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.press_until("\x03", r"\[Ctrl-D or /quit ends\]\r\n> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
  finally:
    terminal.close()


def test_nothing_that_is_printed_moves_the_cursor(chat, conversation, monkeypatch, tmp_path):
  """An answer, a picture's name, an error and the history, with what a terminal would obey."""
  hostile = "\x1b]0;owned\x07\x1b[2J\x9b31m"
  picture = tmp_path / "a\x1b[2J.png"
  PIL.Image.new("RGB", (9, 9)).save(picture)
  shown = chat(f"/image '{picture}'", f"/image '{picture}x'", "/drop")
  conversation.turns = [{"role": "assistant", "content": hostile}]
  shown += chat("/history", f"/{hostile}")
  monkeypatch.setattr(conversation, "ask", lambda _: iter([hostile[:5], hostile]))
  answer = chat("Hi")
  assert answer == "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\n"
  assert shown.count(r"\x1b[2J") >= 4
  assert not {"\x1b", "\x07", "\x9b"} & {*shown, *answer}
