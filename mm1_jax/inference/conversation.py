# SPDX-License-Identifier: Apache-2.0
"""A conversation with a model: its turns, and the pictures that come with the next question."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import Image, Item, check_image, fill_slots
from mm1_jax.inference.sampler import GREEDY, Sampling
from mm1_jax.inference.settings import integer, whole


class Conversation:
  """A conversation; a question that fails, or gets an empty answer, leaves it unchanged.

  Args:
    model: gives the answers.
    max_new_tokens: of an answer; fewer where the conversation leaves less room.
    sampling: how answers are drawn.
    stop: texts that end an answer.
    seed: of what is drawn.

  Attributes:
    turns: the turns so far, as `Model.generate` takes them.
    images: pictures for the next question.
    max_new_tokens: as above; may be changed between questions.
    sampling: the same.
  """

  def __init__(
    self,
    model: Model,
    *,
    max_new_tokens: int = 512,
    sampling: Sampling | BeamSearch = GREEDY,
    stop: Sequence[str] = (),
    seed: int = 0,
  ):
    self.turns: list[dict[str, Any]] = []
    self.images: list[Item] = []
    self.max_new_tokens = max_new_tokens
    self.sampling = sampling
    self._model = model
    self._stop = stop
    self._seed = seed

  def clear(self, system: str = "") -> None:
    """Begins anew, with or without a system turn."""
    self.turns = [{"role": "system", "content": system}] if system else []
    self.images = []

  def show(self, image: Image) -> tuple[int, int]:
    """Keeps a picture for the next question; returns its height and width.

    Raises:
      PromptError: it cannot be used.
    """
    size = self.look(image)
    self.images.append(image)
    return size

  def look(self, image: Image) -> tuple[int, int]:
    """Returns the height and width of a picture that can be asked about.

    Raises:
      PromptError: it cannot be used.
    """
    return check_image(image, self._model.run)

  def ask(self, text: str) -> Generator[str]:
    """Yields the answer to a question as it grows.

    When the caller stops iterating, or at Ctrl-C, the text so far counts as the answer.

    Raises:
      PromptError: the question cannot be used, or the conversation has no room for an answer.
    """
    question = {"role": "user", "content": fill_slots(text, self.images)}
    request = self._model.encode([*self.turns, question])
    answers = self._model.stream(
      request,
      max_new_tokens=min(
        whole("max_new_tokens", self.max_new_tokens, 1), self._model.room(request)
      ),
      sampling=self.sampling,
      stop=self._stop,
      seed=integer("seed", self._seed) + len(self.turns),
    )
    return self._listen(question, answers)

  def _listen(self, question: dict[str, Any], answers: Iterator[str]) -> Generator[str]:
    answer = ""
    try:
      for answer in answers:
        yield answer
    finally:
      if answer:
        self.turns += [question, {"role": "assistant", "content": answer}]
        self.images = []
