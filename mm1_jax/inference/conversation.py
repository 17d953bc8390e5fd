# SPDX-License-Identifier: Apache-2.0
"""A conversation with a model: who said what, and which pictures come with the next question."""

from collections.abc import Iterator, Sequence
from typing import Any

from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import Item, fill_slots
from mm1_jax.inference.sampler import GREEDY, Sampling


class Conversation:
  """Turns by turns; a question that fails, or is not answered by a word, leaves it as it was.

  Args:
    model: who answers.
    max_new_tokens: of an answer; fewer where the conversation leaves less room.
    sampling: how answers are drawn.
    stop: texts that end an answer.
    seed: of what is drawn.

  Attributes:
    turns: what has been said, as `Model.generate` takes it.
    images: they come with the next question.
    run: what the model was trained on.
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
    self.run = model.run
    self._model = model
    self._max_new_tokens = max_new_tokens
    self._how = {"sampling": sampling, "stop": stop}
    self._seed = seed

  def clear(self, system: str = "") -> None:
    """Begins anew, with or without a system turn."""
    self.turns = [{"role": "system", "content": system}] if system else []
    self.images = []

  def ask(self, text: str) -> Iterator[str]:
    """Yields the answer to a question as it grows.

    What was said when the caller stops listening, or Ctrl-C comes, counts as the answer.

    Raises:
      PromptError: the question cannot be used, or the conversation has no room for an answer.
    """
    question = {"role": "user", "content": fill_slots(text, self.images)}
    request = self._model.encode([*self.turns, question])
    answers = self._model.stream(
      request,
      max_new_tokens=min(self._max_new_tokens, self._model.room(request)),
      seed=self._seed + len(self.turns),
      **self._how,
    )
    return self._listen(question, answers)

  def _listen(self, question: dict[str, Any], answers: Iterator[str]) -> Iterator[str]:
    answer = ""
    try:
      for answer in answers:
        yield answer
    finally:
      if answer:
        self.turns += [question, {"role": "assistant", "content": answer}]
        self.images = []
