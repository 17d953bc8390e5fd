# SPDX-License-Identifier: Apache-2.0
"""The web page: what its events do, and a visit with a browser."""

import contextlib
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from typing import ClassVar

import numpy as np
import PIL.Image
import pytest

from mm1_jax.inference.sampler import Sampling

pytestmark = pytest.mark.compiles

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
  "--no-sandbox",  # root has none
  "--disable-gpu",
  "--disable-dev-shm-usage",
  "--disable-background-networking",
  "--disable-component-update",
  "--no-first-run",
]
SLOW_MACHINE = 600_000  # milliseconds


@pytest.fixture(scope="module")
def app():
  from mm1_jax.inference import page as app

  return app


@pytest.fixture
def page(app, model, monkeypatch):
  monkeypatch.setattr(model, "run", model.run)  # which a page bounds
  return app.Page(model, max_new_tokens=9, sampling=Sampling())


def say(page, visit, text: str, *files, system: str = "", tokens: int = 9):
  """Returns the visit after a message, and all that the chatbot has shown."""
  message = {"text": text, "files": [str(file) for file in files]}
  visit = page.begin(visit, message, system)
  shown = [*page.answer(visit, 0.0, 1.0, tokens)]
  return visit, [*shown, page.end(visit)[0]]


def test_a_conversation_with_pictures(page, model, pictures):
  a, b = pictures
  first = {"role": "user", "content": [a, "What is this?"]}
  (answer,) = model.generate([[first]], max_new_tokens=9)
  visit, shown = say(page, None, "What is this?", a)
  begun = [
    {"role": "user", "content": {"path": str(a)}},
    {"role": "user", "content": "What is this?"},
  ]
  assert shown[0][:2] == begun
  assert shown[-1] == [*begun, {"role": "assistant", "content": answer}]
  turns = [
    first,
    {"role": "assistant", "content": answer},
    {"role": "user", "content": ["Is ", b, " like it?"]},
  ]
  (answer,) = model.generate([turns], max_new_tokens=5)
  visit, shown = say(page, visit, "Is <image> like it?", b, tokens=5)
  assert shown[-1][-1] == {"role": "assistant", "content": answer}
  visit, messages = page.new(visit)
  assert messages == []
  assert visit.conversation.turns == []


def test_instructions_are_read_when_a_conversation_begins(page):
  visit, shown = say(page, None, "Hi", system="Be brief.")
  assert visit.conversation.turns[0] == {"role": "system", "content": "Be brief."}
  assert [message["role"] for message in shown[-1]] == ["user", "assistant"]
  visit, _ = say(page, visit, "And now?", system="Be long.")
  assert [turn["role"] for turn in visit.conversation.turns].count("system") == 1


def test_settings_reach_the_model(page, model):
  visit = page.begin(None, {"text": "Hi", "files": []}, "")
  *_, shown = page.answer(visit, 1.5, 0.9, 7)
  drawn = model.stream(
    [{"role": "user", "content": "Hi"}], max_new_tokens=7, sampling=Sampling(1.5, 0, 0.9)
  )
  assert shown[-1] == {"role": "assistant", "content": [*drawn][-1]}


class TestMistakes:
  CASES: ClassVar = {
    "nothing": ("  ", [], "there is nothing to answer; type a question, or add a picture."),
    "no picture": ("?", ["bad.png"], "image 'bad.png' cannot be used: unreadable image."),
    "half a picture": ("?", ["half.png"], "image 'half.png' cannot be used: truncated image."),
    "gone": ("?", ["gone.png"], "image 'gone.png' cannot be read: No such file or directory."),
    "too many": ("?", ["a.png"] * 32, "(32 x 6 of them for images)"),
    "too few": ("<image> and <image>?", ["a.png"], "2 &lt;image&gt; slots, but there is 1 image"),
    "too long": ("word " * 300, [], "but the model was trained on 192"),
  }

  @pytest.mark.parametrize("case", CASES)
  def test_is_told_and_the_next_question_works(self, app, page, pictures, tmp_path, case):
    text, names, message = self.CASES[case]
    shutil.copy(pictures[0], tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(pictures[0].read_bytes()[:900])
    visit, expected = say(page, None, "Hi", pictures[1])
    visit, _ = page.new(visit)
    with pytest.raises(app.gr.Error) as error:
      say(page, visit, text, *(tmp_path / name for name in names))
    assert message in error.value.message
    assert str(tmp_path) not in error.value.message
    shown, box = page.end(visit)
    assert shown == []
    # A question that was taken, and could not be answered, can be mended.
    taken = case in ("too many", "too few", "too long")
    assert (box.value["text"] == text.strip()) == taken or not text.strip()
    _, shown = say(page, visit, "Hi", pictures[1])
    assert shown == expected


def test_stop_ends_the_answer_and_keeps_what_was_said(page, model):
  visit = page.begin(None, {"text": "Hi", "files": []}, "")
  answers = page.answer(visit, 0.0, 1.0, 100)
  first = next(answers)
  visit.stopped.set()
  assert [*answers] == []
  said = page.end(visit)[0]
  assert said[-1]["role"] == "assistant"
  assert said[-1]["content"].startswith(first[-1]["content"])
  assert len(model.tokenizer.encode(said[-1]["content"])) < 50
  visit.stopped.set()  # one that waits in the queue gets no answer, and comes back
  visit.question = "Later"
  assert [*page.answer(visit, 0.0, 1.0, 100)] == []
  messages, box = page.end(visit)
  assert messages == said
  assert box.value["text"] == "Later"


class TestWordsAreNotLost:
  """Each is in the conversation, waits for its answer, or is in the box."""

  def test_enter_again_while_an_answer_grows_is_refused(self, app, page, pictures):
    """The second question took the place of the first, and vanished with its end."""
    visit = page.begin(None, {"text": "First", "files": []}, "")
    answers = page.answer(visit, 0.0, 1.0, 100)
    growing = next(answers)
    second = {"text": "Second", "files": [str(pictures[0])]}
    with pytest.raises(app.gr.Error, match="an answer is still growing; send your message when"):
      page.begin(visit, second, "")
    *_, last = [growing, *answers]
    assert [message["role"] for message in last] == ["user", "assistant"]
    shown, box = page.end(visit)
    assert shown == last
    assert "value" not in box.constructor_args  # the box is left as it is: "Second" is in it
    visit = page.begin(visit, second, "")
    *_, last = page.answer(visit, 0.0, 1.0, 3)
    assert [m["content"] for m in last if m["role"] == "user"] == [
      *("First", {"path": str(pictures[0])}, "Second"),
    ]

  def test_a_message_is_added_to_one_that_waits(self, page, pictures):
    """Other visitors are answered first, or the connection was lost after it was sent."""
    a, b = pictures
    visit = page.begin(None, {"text": "First", "files": [str(a)]}, "")
    visit = page.begin(visit, {"text": "Second", "files": [str(b)]}, "")
    *_, last = page.answer(visit, 0.0, 1.0, 3)
    users = [{"path": str(a)}, {"path": str(b)}, "First\n\nSecond"]
    assert [m["content"] for m in last if m["role"] == "user"] == users
    assert [*page.answer(visit, 0.0, 1.0, 3)] == []  # the second one's own event
    assert page.end(visit)[0] == last

  def test_a_fault_of_ours_gives_the_question_back(self, app, page, pictures, monkeypatch):
    """With what was typed since."""

    def fail(*_, **__):
      raise RuntimeError("RESOURCE_EXHAUSTED at 0x7f00")

    visit = page.begin(None, {"text": "First", "files": [str(pictures[0])]}, "")
    with monkeypatch.context() as patch:
      patch.setattr(page._model, "stream", fail)
      with pytest.raises(app.gr.Error, match="something went wrong at the server"):
        [*page.answer(visit, 0.0, 1.0, 3)]
    page.note(visit, {"text": "Second", "files": [str(pictures[1])]})
    shown, box = page.end(visit)
    assert shown == []
    assert box.value["text"] == "First\n\nSecond"
    given_back = json.dumps([str(file) for file in box.constructor_args["value"]["files"]])
    assert given_back == json.dumps([str(picture) for picture in pictures])
    visit, shown = say(page, visit, box.value["text"])
    assert shown[-1][-1]["role"] == "assistant"

  def test_a_lost_connection_blocks_nothing(self, page, model):
    visit = page.begin(None, {"text": "First", "files": []}, "")
    page.answer(visit, 0.0, 1.0, 100).close()  # before it began
    visit = page.begin(visit, {"text": "Second", "files": []}, "")
    answers = page.answer(visit, 0.0, 1.0, 100)
    next(answers)
    answers.close()  # as Gradio does where a visitor has left
    assert not visit.answering
    visit, shown = say(page, visit, "Third")
    users = [message["content"] for message in shown[-1] if message["role"] == "user"]
    assert users == ["First\n\nSecond", "Third"]

  def test_what_is_typed_while_a_question_is_taken_stays(self, page, pictures):
    a, b = map(str, pictures)
    visit = page.begin(None, {"text": " First ", "files": [a]}, "")
    for typed, left in (
      ({"text": " First ", "files": [a]}, {"text": "", "files": []}),
      ({"text": "Another", "files": [a, b]}, {"text": "Another", "files": [b]}),
      (None, {"text": "", "files": []}),
    ):
      shown, box = page.show(visit, typed)
      assert shown == visit.messages()
      assert box.constructor_args["value"] == left

  @pytest.mark.parametrize(
    ("settings", "message"),
    [
      ((None, 1.0, 9), "temperature is None; it must be a number"),
      ((0.0, None, 9), "top_p is None; it must be a number"),
      ((0.0, 1.0, None), "max_new_tokens is None; it must be a whole number"),
      ((0.0, 1.0, 2.5), "max_new_tokens is 2.5"),
      ((float("nan"), 1.0, 9), "temperature is nan"),
      ((0.0, 1.0, "9"), "max_new_tokens is '9'"),
    ],
  )
  def test_a_setting_that_is_none_is_told_and_gives_the_question_back(
    self, app, page, settings, message
  ):
    """An emptied field of the page sends null."""
    visit = page.begin(None, {"text": "Hi", "files": []}, "")
    with pytest.raises(app.gr.Error) as error:
      [*page.answer(visit, *settings)]
    assert message in error.value.message.replace("&#x27;", "'")
    assert page.end(visit)[1].value["text"] == "Hi"
    assert [*page.answer(page.begin(visit, {"text": "Hi", "files": []}, ""), 0.0, 1.0, 3.0)]

  def test_halves_of_characters_are_mended(self, page):
    _, shown = say(page, None, "caf\udce9 \ud800", system="\ud800")
    assert shown[-1][0]["content"] == "café \ufffd"
    json.dumps(shown, ensure_ascii=False).encode()


def test_pixels_are_bounded_before_they_are_decoded(app, workdir, tmp_path, monkeypatch):
  """50 million pixels in a file of some thousand bytes."""
  from mm1_jax.inference.model import Model

  bomb = tmp_path / "bomb.png"
  PIL.Image.fromarray(np.zeros((5000, 10_000), bool)).save(bomb)
  assert bomb.stat().st_size < 20_000
  model = Model.load(workdir)
  monkeypatch.setattr(PIL.Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
  page = app.Page(model, max_new_tokens=3, sampling=Sampling())
  with pytest.raises(app.gr.Error, match=r"bomb.png'? ?.* image too large \(more than 40 million"):
    page.begin(None, {"text": "?", "files": [str(bomb)]}, "")


class Visitor:
  """A browser at the page."""

  def __init__(self, browser_page):
    self.page = browser_page
    self.hosts: set[str] = set()
    browser_page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
    browser_page.set_default_timeout(SLOW_MACHINE)

  def ask(self, text: str, *files: pathlib.Path) -> None:
    if files:
      self.page.set_input_files("#question input[type=file]", [str(file) for file in files])
      self.page.wait_for_function(
        "n => document.querySelectorAll('#question .thumbnail-item').length === n", arg=len(files)
      )
    self.page.fill("#question textarea", text)
    self.page.click("#question [data-testid=submit-button]")

  def wait_for(self, answer: str = "") -> str:
    """Returns the conversation on the page, when `answer` is in it and nothing is being said."""
    self.page.wait_for_function(
      """answer => document.querySelector('#question [data-testid=submit-button]')
        && document.querySelector('#chat').innerText.replace(/[^A-Za-z0-9]+/g, ' ')
          .includes(answer)""",
      arg=words(answer),
    )
    return words(self.page.inner_text("#chat"))

  def error(self) -> str:
    """Returns what a message on the page says, and closes it."""
    toast = self.page.wait_for_selector("[data-testid=toast-body]")
    text = toast.inner_text()
    self.page.click("[data-testid=toast-close]")
    self.page.wait_for_selector("[data-testid=toast-body]", state="detached")
    return " ".join(text.split())


@pytest.fixture
def long_run(workdir, tmp_path):
  """The run, with room for long answers, taken for one of conversations."""
  run = shutil.copytree(workdir, tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["data"] |= {"seq_len": 4096, "chat": True}
  (run / "config.json").write_text(json.dumps(config))
  return run


@pytest.fixture
def address(long_run):
  """The page, served by a process of its own."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "mm1_jax.inference.app", f"--checkpoint={long_run}"]
  flags = [f"--port={port}", "--max-new-tokens=40", "--max-upload-mb=1"]
  process = subprocess.Popen([*command, *flags])  # what it prints is shown if the test fails
  url = f"http://127.0.0.1:{port}"
  try:
    while True:
      assert process.poll() is None, "the page ended before it began"
      with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url, timeout=60):
        break
    yield url
  finally:
    process.terminate()
    process.wait(30)


@pytest.fixture
def visitor(address, tmp_path):
  from playwright import sync_api

  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    one = Visitor(browser.new_page(viewport={"width": 900, "height": 780}))
    one.page.goto(address)
    yield one
    one.page.screenshot(path=tmp_path / "page.png")
    browser.close()


def words(text: str) -> str:
  """Returns a text's letters and digits: browsers have their own ways with all others."""
  return re.sub(r"[^A-Za-z0-9]+", " ", text).strip()


IN_THE_BOX = """() => [
  document.querySelector('#question textarea').value,
  document.querySelectorAll('#question .thumbnail-item').length
]"""


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt-get install chromium")
def test_a_visitors_words_stay_until_they_are_answered(visitor, pictures):
  """Enter again while an answer grows, and a connection that is lost within one and before one."""
  page = visitor.page
  page.click("text=Settings")
  page.fill("#length input[type=number]", "3900")
  visitor.ask("Tell me everything.")
  page.wait_for_selector("#chat [data-testid=bot]")
  page.set_input_files("#question input[type=file]", [str(pictures[0])])
  page.wait_for_selector("#question .thumbnail-item")
  page.fill("#question textarea", "And this?")
  page.press("#question textarea", "Enter")
  assert "an answer is still growing" in visitor.error()
  assert page.evaluate(IN_THE_BOX) == ["And this?", 1]
  page.dispatch_event("#question .stop-button", "click")
  visitor.wait_for("Tell me everything.")
  assert page.evaluate(IN_THE_BOX) == ["And this?", 1]

  page.press("#question textarea", "Enter")
  page.wait_for_function("() => document.querySelectorAll('#chat [data-testid=bot]').length > 1")
  assert page.evaluate(IN_THE_BOX) == ["", 0]
  page.fill("#question textarea", "Later")
  page.reload()  # as Gradio does when a lost connection is back
  page.wait_for_function("() => document.querySelector('#question textarea')?.value")
  assert page.evaluate(IN_THE_BOX) == ["And this?\n\nLater", 0]
  page.context.set_offline(True)
  page.press("#question textarea", "Enter")
  visitor.error()
  assert page.evaluate(IN_THE_BOX) == ["And this?\n\nLater", 0]
  page.evaluate("() => { window.before = true; }")
  page.context.set_offline(False)  # Gradio notices, and loads the page anew
  page.wait_for_function(
    "() => !window.before && document.querySelector('#question textarea')?.value"
  )
  assert page.evaluate(IN_THE_BOX) == ["And this?\n\nLater", 0]
  page.press("#question textarea", "Enter")
  visitor.wait_for("And this? Later")
  assert page.evaluate(IN_THE_BOX) == ["", 0]


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt-get install chromium")
def test_a_visit(visitor, long_run, pictures, tmp_path):
  """Uploads, asks, reads, makes each mistake, and continues."""
  from mm1_jax.inference.model import Model

  model = Model.load(long_run)
  a, b = pictures
  visitor.page.evaluate("""() => {
    window.seen = new Set();
    new MutationObserver(() => window.seen.add(document.querySelector('#chat').innerText))
      .observe(document.body, {subtree: true, childList: true, characterData: true});
  }""")
  # Params are random: not every question gets a long answer.
  for question in ("What is this?", "Which?", "Tell me.", "Hi", "Describe it.", "How many?"):
    turns = [{"role": "user", "content": [a, question]}]
    (answer,) = model.generate([turns], max_new_tokens=40)
    if len(answer) > 100:
      break
  visitor.ask(question, a)
  visitor.wait_for(answer)
  parts = [words(answer[:length]) for length in range(20, len(answer) - 20)]
  seen = [words(text) for text in visitor.page.evaluate("() => [...window.seen]")]
  assert any(text.endswith(part) for text in seen for part in parts)  # it grew
  assert visitor.page.query_selector("#chat img") is not None

  visitor.ask("And this?", b)
  turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": [b, "And this?"]}]
  (answer,) = model.generate([turns], max_new_tokens=40)
  before = visitor.wait_for(answer)

  bad, large = tmp_path / "bad.png", tmp_path / "large.png"
  bad.write_text("no picture")
  visitor.ask("And this?", bad)
  assert "image 'bad.png' cannot be used: unreadable image." in visitor.error()
  visitor.page.click("#question [aria-label='Remove file']")
  visitor.page.set_input_files("#question input[type=file]", [str(pathlib.Path(__file__))])
  assert "file type" in visitor.error().lower()
  large.write_bytes(bytes(1_100_000))
  visitor.page.set_input_files("#question input[type=file]", [str(large)])
  assert "size" in visitor.error().lower()
  visitor.ask("word " * 9000)
  assert "but the model was trained on 4096" in visitor.error()
  assert visitor.wait_for() == before
  visitor.ask("And now?")
  turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
  visitor.wait_for(model.generate([turns], max_new_tokens=40)[0])

  visitor.page.click("#new")
  visitor.page.wait_for_function("() => !document.querySelector('#chat').innerText.includes('now')")
  visitor.page.click("text=Settings")
  visitor.page.fill("#length input[type=number]", "3900")
  visitor.ask("Tell me everything.")
  # At once: `click` would wait until the page no longer moves.
  visitor.page.dispatch_event("#question .stop-button", "click")
  stopped = visitor.wait_for("Tell me everything.")
  assert len(model.tokenizer.encode(stopped)) < 3000
  assert visitor.hosts == {visitor.page.url.split("/")[2]}  # no other server was asked
