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

from etils import epath

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
  """One open page: its conversation, and the question that waits for an answer."""

  conversation: Conversation
  question: str | None = None
  stopped: threading.Event = dataclasses.field(default_factory=threading.Event)

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

    Raises:
      gr.Error: there is nothing in it, or a picture of it cannot be used; nothing has changed.
    """
    visit = self.new(None)[0] if visit is None else visit
    conversation = visit.conversation
    try:
      self._check(conversation, message, system)
    except UserError as e:
      raise _error(e, message["files"]) from e
    if not any(turn["role"] == "user" for turn in conversation.turns):
      conversation.clear(system.strip())
    conversation.images = []
    text = message["text"].strip()
    try:
      if not text and not message["files"]:
        raise PromptError("there is nothing to answer; type a question, or add a picture.")
      for name in message["files"]:
        conversation.show(epath.Path(name))
    except UserError as e:
      conversation.images = []
      raise _error(e, message["files"]) from e
    visit.question = text
    visit.stopped.clear()
    return visit

  def _check(self, conversation: Conversation, message: dict[str, Any], system: str) -> None:
    """Raises a PromptError where a message is above a bound; no picture is decoded for it."""
    bounds = self._bounds
    for what, text in (("question has", message["text"]), ("instructions have", system)):
      if len(text) > bounds.characters:
        most = f"{bounds.characters:,}"
        raise PromptError(f"the {what} {len(text):,} characters; at most {most} are read.")
    earlier = [
      item
      for turn in conversation.turns
      for item in turn["content"]
      if isinstance(item, os.PathLike)
    ]
    if (number := len(earlier) + len(message["files"])) > bounds.images:
      raise PromptError(
        f"the conversation would have {number} images; at most {bounds.images} are looked at. "
        f"Begin a new one."
      )
    pixels = sum(count_pixels(epath.Path(file)) for file in (*earlier, *message["files"]))
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
    conversation, question = visit.conversation, visit.question
    if question is None or visit.stopped.is_set():
      return
    conversation.max_new_tokens = int(max_new_tokens)
    if isinstance(conversation.sampling, Sampling):
      conversation.sampling = conversation.sampling._replace(temperature=temperature, top_p=top_p)
    num_turns = len(conversation.turns)
    try:
      # Closed, so that the text so far is in the conversation before the page continues.
      with contextlib.closing(conversation.ask(question)) as answers:
        for text in answers:
          if visit.stopped.is_set():
            return
          yield visit.messages(text)
    except UserError as e:
      raise _error(e, conversation.images) from e
    finally:
      if len(conversation.turns) > num_turns:
        visit.question = None
    if visit.question is not None:
      raise _error(PromptError("the model said nothing."))

  def end(self, visit: Visit) -> tuple[list[dict[str, Any]], Any]:
    """Shows the conversation, and gives back a question that was not answered."""
    unanswered, visit.question = visit.question, None
    files = [str(image) for image in visit.conversation.images] if unanswered else []
    visit.conversation.images = []
    value = {"text": unanswered or "", "files": files}
    return visit.messages(), gr.MultimodalTextbox(value=value, submit_btn=True, stop_btn=False)

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
    shown = taken.success(
      lambda visit: (
        visit.messages(),
        gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True),
      ),
      visit,
      [chatbot, box],
      queue=False,
      **private,
    )
    answered = shown.then(self.answer, [visit, *settings], chatbot, **private)
    answered.success(self.end, visit, [chatbot, box], queue=False, **private)
    answered.failure(self.end, visit, [chatbot, box], queue=False, **private)
    box.stop(lambda visit: visit.stopped.set(), visit, None, queue=False, **private)
    new.click(self.new, visit, [visit, chatbot], queue=False, **private)


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
