# SPDX-License-Identifier: Apache-2.0
"""The web page of `app.py`: pictures and a question go in at the bottom, the answer grows above.

It asks nothing of any other server.
"""

import contextlib
import copy
import dataclasses
import html
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging
from etils import epath

from mm1_jax import untrusted
from mm1_jax.config import UserError
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.conversation import Conversation
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import PromptError, count_pixels
from mm1_jax.inference.sampler import Sampling

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
import gradio as gr
from gradio import themes

SECONDS_OF_AN_ERROR = 20
# Gradio loads the page anew once a lost connection is back: what was typed, and a question whose
# answer was awaited, are in the box again. Kept by the browser, for this tab alone.
KEEP_WORDS = """() => {
  const key = 'mm1-words', kept = sessionStorage.getItem(key);
  sessionStorage.removeItem(key);
  const box = () => document.querySelector('#question textarea');
  if (kept && box()) {
    box().value = kept;
    box().dispatchEvent(new Event('input', {bubbles: true}));
  }
  window.addEventListener('pagehide', () => {
    const asked = [...document.querySelectorAll('#chat [data-testid=user]')].pop();
    const awaited = document.querySelector('#question .stop-button') && asked?.innerText.trim();
    const words = [awaited, box()?.value].filter(Boolean).join('\\n\\n');
    if (words) sessionStorage.setItem(key, words);
  });
}"""
# System fonts: Gradio's own would be fetched.
THEME = themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


@dataclasses.dataclass(frozen=True)
class PageBounds:
  """What a visitor may ask of a model; counted before a picture is decoded or a text is read."""

  pixels: int = 40_000_000  # of a picture
  total_pixels: int = 80_000_000  # of all pictures of a conversation: each answer decodes them
  images: int = 32  # of a conversation
  characters: int = 100_000  # of a question, and of the instructions
  waiting: int = 64  # questions in the queue; the next one is refused


@dataclasses.dataclass
class Visit:
  """One open page: its conversation, and the question that waits for an answer.

  Words that a visitor sent are either in the conversation, in `question`, or still in the box.
  """

  conversation: Conversation
  question: str | None = None
  typed: dict[str, Any] | None = None  # in the box, when an answer failed or was stopped
  answering: bool = False  # an answer is growing
  stopped: threading.Event = dataclasses.field(default_factory=threading.Event)
  lock: Any = dataclasses.field(default_factory=threading.Lock)  # of question and answering

  def messages(self, answer: str = "") -> list[dict[str, Any]]:
    """Returns what a chatbot shows: all turns, the question, and its answer so far."""
    turns = [*self.conversation.turns]
    if self.question is not None:
      turns.append({"role": "user", "content": [*self.conversation.images, self.question]})
    if answer:
      turns.append({"role": "assistant", "content": answer})
    return [
      {"role": turn["role"], "content": part}
      for turn in turns
      if turn["role"] != "system"
      for part in _parts(turn["content"])
    ]


class Page:
  """What the events of the page do.

  Args:
    model: gives the answers.
    max_new_tokens: of an answer, where the visitor does not change it.
    sampling: how answers are drawn, of which the visitor changes temperature and top-p.
    stop: texts that end an answer.
    seed: of what is drawn.
    bounds: of what is asked. The model refuses larger pictures from now on than in training.
  """

  def __init__(
    self,
    model: Model,
    *,
    bounds: PageBounds = PageBounds(),
    max_new_tokens: int,
    sampling: Sampling | BeamSearch,
    stop: Sequence[str] = (),
    seed: int = 0,
  ):
    data = model.run.data
    data = dataclasses.replace(data, max_image_pixels=min(bounds.pixels, data.max_image_pixels))
    self._model = copy.copy(model)  # the caller's own stays as it was
    self._model.run = dataclasses.replace(model.run, data=data)
    self._bounds = bounds
    self._defaults = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    self._how = {"stop": stop, "seed": seed}

  def new(self, visit: Visit | None) -> tuple[Visit, list[dict[str, Any]]]:
    """Ends a conversation, and any answer that is being generated, and begins another."""
    if visit is not None:
      visit.stopped.set()
    visit = Visit(Conversation(self._model, **self._defaults, **self._how))
    return visit, visit.messages()

  def begin(self, visit: Visit | None, message: dict[str, Any], system: str) -> Visit:
    """Takes a message, and looks at its pictures.

    A message that comes while the one before it waits for its turn is added to it.

    Raises:
      gr.Error: there is nothing in it, a picture of it cannot be used, or an answer is growing;
        nothing has changed, and the box keeps the message.
    """
    visit = self.new(None)[0] if visit is None else visit
    text, files = _box(message)
    with _told(files), visit.lock:
      self._take(visit, text, files, untrusted.mended(system or ""))
    return visit

  def _take(self, visit: Visit, text: str, files: Sequence[str], system: str) -> None:
    """Makes a message the question of a visit, or a part of it.

    Raises:
      PromptError: see `begin`.
    """
    conversation = visit.conversation
    if visit.answering:
      raise PromptError(
        "an answer is still growing; send your message when it has ended, or stop it. The message "
        "stays in the box."
      )
    text, system = text.strip(), system.strip()
    if not text and not files:
      raise PromptError("there is nothing to answer; type a question, or add a picture.")
    waiting = [] if visit.question is None else [*conversation.images]
    text = "\n\n".join(filter(None, [visit.question, text]))
    self._check(conversation, text, [*waiting, *files], system)
    for file in files:
      conversation.look(epath.Path(file))
    if not any(turn["role"] == "user" for turn in conversation.turns):
      conversation.clear(system)
    conversation.images = [*waiting, *map(epath.Path, files)]
    visit.question = text
    visit.stopped.clear()

  def _check(
    self, conversation: Conversation, question: str, files: Sequence[Any], system: str
  ) -> None:
    """Raises a PromptError where a message is above a bound; no picture is decoded for it."""
    bounds = self._bounds
    for what, text in (("question has", question), ("instructions have", system)):
      if len(text) > bounds.characters:
        most = f"{bounds.characters:,}"
        raise PromptError(f"the {what} {len(text):,} characters; at most {most} are read.")
    earlier = [
      item
      for turn in conversation.turns
      for item in turn["content"]
      if isinstance(item, os.PathLike)
    ]
    if (number := len(earlier) + len(files)) > bounds.images:
      raise PromptError(
        f"the conversation would have {number} images; at most {bounds.images} are looked at. "
        f"Begin a new one."
      )
    pixels = sum(count_pixels(epath.Path(file)) for file in (*earlier, *files))
    if pixels > bounds.total_pixels:
      raise PromptError(
        f"the images of the conversation would have {pixels / 1e6:.1f} million pixels together; at "
        f"most {bounds.total_pixels / 1e6:g} are looked at. Begin a new one, or make them smaller."
      )

  def answer(
    self, visit: Visit, temperature: float, top_p: float, max_new_tokens: int
  ) -> Iterator[list[dict[str, Any]]]:
    """Yields what the chatbot shows while the answer grows, until it ends or is stopped.

    Raises:
      gr.Error: the question cannot be answered; the conversation is as before.
    """
    conversation = visit.conversation
    with visit.lock:
      question = visit.question
      if question is None or visit.answering or visit.stopped.is_set():
        return
      visit.answering = True
    whole = isinstance(max_new_tokens, float) and max_new_tokens.is_integer()  # as sliders may say
    conversation.max_new_tokens = int(max_new_tokens) if whole else max_new_tokens
    if isinstance(conversation.sampling, Sampling):
      conversation.sampling = conversation.sampling._replace(temperature=temperature, top_p=top_p)
    num_turns = len(conversation.turns)
    try:
      # Closed, so that the text so far is in the conversation before the page continues.
      with (
        _told(conversation.images),
        contextlib.closing(conversation.ask(question)) as answers,
      ):
        for text in answers:
          if visit.stopped.is_set():
            return
          yield visit.messages(text)
    finally:
      with visit.lock:
        visit.answering = False
        if len(conversation.turns) > num_turns:
          visit.question = None
    if visit.question is not None:
      raise _error(PromptError("the model said nothing."))

  def show(self, visit: Visit, box: dict[str, Any] | None) -> tuple[list[dict[str, Any]], Any]:
    """Shows the question that was taken, and empties the box of it.

    What was typed since then stays.
    """
    text, files = _box(box)
    question, shown = visit.question or "", [str(image) for image in visit.conversation.images]
    if text.strip() and question.endswith(text.strip()):
      text = ""
    value = {"text": text, "files": [file for file in files if file not in shown]}
    return visit.messages(), gr.MultimodalTextbox(value=value, submit_btn=False, stop_btn=True)

  def stop(self, visit: Visit, box: dict[str, Any] | None) -> None:
    """Ends an answer at its next part; it may not have begun."""
    self.note(visit, box)
    visit.stopped.set()

  def note(self, visit: Visit, box: dict[str, Any] | None) -> None:
    """Notes what is in the box, for `end` to give back more than that."""
    visit.typed = box

  def end(self, visit: Visit) -> tuple[list[dict[str, Any]], Any]:
    """Shows the conversation, and gives back a question that was not answered.

    It goes in front of what was typed since; if it was answered, the box is left as it is.
    """
    buttons: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
    with visit.lock:
      unanswered = None if visit.answering else visit.question
      (text, files), visit.typed = _box(visit.typed), None
      if unanswered is None:
        return visit.messages(), gr.MultimodalTextbox(**buttons)
      visit.question = None
      files = [*map(str, visit.conversation.images), *files]
      visit.conversation.images = []
    text = "\n\n".join(filter(None, [unanswered, text]))
    value = {"text": text, "files": [*dict.fromkeys(files)]}
    return visit.messages(), gr.MultimodalTextbox(value=value, **buttons)

  def build(self, title: str) -> gr.Blocks:
    """Returns the page, to be launched."""
    with gr.Blocks(title=title, analytics_enabled=False) as page:
      visit = gr.State()
      gr.Markdown(f"## {title}")
      if not self._model.chat:
        gr.Markdown("This run was not trained on conversations: do not expect answers.")
      chatbot = gr.Chatbot(
        show_label=False,
        height="60vh",
        # Answers are shown as they are: a picture's address in one would be a call to its server.
        render_markdown=False,
        buttons=["copy"],
        allow_file_downloads=False,
        elem_id="chat",
      )
      box = gr.MultimodalTextbox(
        show_label=False,
        placeholder="A question; add pictures with the clip, or drop them here",
        file_types=["image"],
        file_count="multiple",
        autofocus=True,
        max_plain_text_length=self._bounds.characters,
        elem_id="question",
      )
      with gr.Row():
        new = gr.Button("New conversation", size="sm", elem_id="new")
      with gr.Accordion("Settings", open=False):
        system = gr.Textbox(
          "", label="Instructions", info="How to behave; read when a conversation begins."
        )
        settings = self._settings()
      self._connect(visit, chatbot, box, new, system, settings)
      page.load(None, js=KEEP_WORDS)
    return page.queue(max_size=self._bounds.waiting, default_concurrency_limit=1)

  def _settings(self) -> list[Any]:
    """Returns the controls that give `answer` its arguments."""
    sampling = self._defaults["sampling"]
    drawn = isinstance(sampling, Sampling)  # a search draws nothing
    temperature, top_p = (sampling.temperature, sampling.top_p) if drawn else (0.0, 1.0)
    temperature, top_p = float(temperature), float(top_p)
    longest = self._model.run.data.seq_len
    length = min(self._defaults["max_new_tokens"], longest)
    return [
      gr.Slider(
        0, 2, temperature, label="Temperature", info="0 takes the likeliest.", visible=drawn
      ),
      gr.Slider(0.05, 1, top_p, label="Top-p", info="Draws among the likeliest.", visible=drawn),
      gr.Slider(1, longest, length, step=1, label="Longest answer, in tokens", elem_id="length"),
    ]

  def _connect(self, visit, chatbot, box, new, system, settings) -> None:
    """Connects the page's events to the methods above.

    One answer at a time is generated over all visitors; other questions wait. Stop does not wait.
    """
    # A badge of progress, or of an error, would cover the conversation.
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    taken = box.submit(self.begin, [visit, box, system], visit, **private)
    shown = taken.success(self.show, [visit, box], [chatbot, box], queue=False, **private)
    answered = shown.then(self.answer, [visit, *settings], chatbot, **private)
    answered.success(self.end, visit, [chatbot, box], queue=False, **private)
    failed = answered.failure(self.note, [visit, box], None, queue=False, **private)
    failed.then(self.end, visit, [chatbot, box], queue=False, **private)
    box.stop(self.stop, [visit, box], None, queue=False, **private)
    new.click(self.new, visit, [visit, chatbot], queue=False, **private)


@contextlib.contextmanager
def _told(files: Sequence[Any]) -> Iterator[None]:
  """Turns whatever goes wrong into what the visitor is told.

  Raises:
    gr.Error: a mistake is told in its words; of a fault of ours, the log has the traceback.
  """
  try:
    yield
  except UserError as e:
    raise _error(e, files) from e
  except Exception as e:
    logging.exception("a question was not answered")
    reason = "something went wrong at the server, and is in its log; nothing that you sent is lost."
    raise _error(UserError(reason)) from e


def _box(value: dict[str, Any] | None) -> tuple[str, list[str]]:
  """Returns the text of what is in the box, and its files."""
  value = value or {}
  return untrusted.mended(value.get("text") or ""), [*map(str, value.get("files") or [])]


def _parts(content: Any) -> list[Any]:
  """Returns a turn's content as parts that a chatbot shows."""
  items = [content] if isinstance(content, str) else content
  return [i if isinstance(i, str) else {"path": os.fspath(i)} for i in items if i != ""]


def _error(error: UserError, files: Sequence[Any] = ()) -> gr.Error:
  """Returns what the visitor is told; they know a file's name, not where it was put."""
  message = str(error)
  for file in files:
    message = message.replace(os.fspath(file), epath.Path(file).name)
  return gr.Error(
    html.escape(message, quote=False),
    title="Not answered",
    duration=SECONDS_OF_AN_ERROR,
    print_exception=False,
  )
