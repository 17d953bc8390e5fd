# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""A trained model in lmms-eval, which finds it by an entry point once both are installed.

  lmms-eval --model mm1_jax --model_args checkpoint=runs/sft --tasks mme --batch_size 32
  lmms-eval --model mm1_jax --model_args checkpoint=runs/sft --tasks seedbench_ppl --force_simple

--model_args: checkpoint=RUN; data, fsdp, expert, tensor (devices) and quantize as in Model.load.

lmms-eval asks "chat" models for answers to messages, where texts and pictures alternate, and no
others; tasks whose choices are compared by likelihood need the "simple" one, by --force_simple. A
run that was trained on conversations reads a user's turn, any other the beginning of a document.
"""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import simple_parse_args_string

from mm1_jax.eval import likelihood
from mm1_jax.eval.adapters import harness
from mm1_jax.eval.task import EvalError
from mm1_jax.inference.generate import tell
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import Prompt, PromptError, fill_slots

NAME = "mm1_jax"
MAX_NEW_TOKENS = 128  # where a task does not say
STEP = 64  # answers that do not fit are cut to a multiple of this, so that they go in few batches


class LmmsEval(lmms):
  """The harness's interface over a `Model`, for messages.

  Args:
    model: what is evaluated.
    batch_size: prompts that are read at once to be answered.
  """

  is_simple = False

  def __init__(self, model: Model, *, batch_size: int = harness.BATCH_SIZE):
    super().__init__()
    self.model = model
    self.batch_size = batch_size

  @classmethod
  def create_from_arg_string(
    cls, arg_string: str, additional_config: dict[str, Any] | None = None
  ) -> "LmmsEval":
    """Returns the model that --model_args, --batch_size and --device ask for.

    Raises:
      EvalError: they ask for what is not offered here.
      UserError: the checkpoint cannot be loaded.
    """
    flags = additional_config or {}
    harness.check_device(flags.get("device"), jax.default_backend())
    if flags.get("max_batch_size") is not None:
      raise EvalError("--max_batch_size is for models that search for a size; use --batch_size.")
    model = harness.load(simple_parse_args_string(arg_string))
    return cls(model, batch_size=harness.batch_size(flags.get("batch_size")))

  def generate_until(self, requests: list[Instance]) -> list[str]:
    """Returns answers; generation_kwargs are honoured or refused, see `harness.read_decoding`.

    Where fewer tokens fit than a task allows, answers end there, and a line says how many may.

    Raises:
      EvalError: generation_kwargs ask for what is not offered, or a message has no text or picture.
      PromptError: a prompt does not fit, or a picture cannot be read.
    """
    prompts, decodings, num_short = [], [], 0
    for request in requests:
      prompt, kwargs, where = self._asked(request.args)
      decoding = harness.read_decoding(kwargs, max_new_tokens=MAX_NEW_TOKENS)
      try:
        prompts.append(self.model.encode(prompt))
      except PromptError as e:
        raise PromptError(f"{where}: {e}") from e
      room = self.model.room(prompts[-1])
      if room < decoding.max_new_tokens:
        num_short += 1
        decoding = decoding._replace(max_new_tokens=room - room % STEP or room)
      decodings.append(decoding)
    if num_short:
      tell(
        f"{num_short} of {len(requests)} answers may be cut: tasks allow more tokens than fit "
        f"after their prompts into the {self.model.run.data.seq_len} positions of the model"
      )
    return harness.generate(self.model, prompts, decodings, batch_size=self.batch_size)

  def _asked(self, args: tuple) -> tuple[Prompt, Mapping[str, Any], str]:
    """Returns prompt, generation_kwargs, and the document's name."""
    _, doc_to_messages, kwargs, doc_id, task, split = args
    where = _name(doc_to_messages, doc_id, task, split)
    messages = doc_to_messages(self.task_dict[task][split][doc_id])
    turns = [
      {"role": message["role"], "content": [_item(part, where) for part in message["content"]]}
      for message in messages
    ]
    alone = len(turns) == 1 and turns[0]["role"] == "user"
    return (turns[0]["content"] if alone else turns), kwargs, where

  def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
    raise EvalError("likelihoods need --force_simple: messages are for generated answers.")

  def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
    raise EvalError("tasks of several rounds, each of which depends on the last, are not offered.")


class LmmsEvalSimple(LmmsEval):
  """The same for a text and its pictures, which come first unless the text has `<image>` slots."""

  is_simple = True

  def _asked(self, args: tuple) -> tuple[Prompt, Mapping[str, Any], str]:
    context, kwargs, *document = args
    return self._prompt(context, *document), kwargs, _name(*document)

  def _prompt(
    self, context: str, doc_to_visual: Any, doc_id: int, task: str, split: str
  ) -> list[Any]:
    where = _name(doc_to_visual, doc_id, task, split)
    visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
    return fill_slots(context, [_picture(visual, where) for visual in visuals or ()])

  def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
    """Returns how likely continuations are, and whether each of their tokens is the likeliest.

    A choice gets -log p, since lmms-eval takes the choice with the *least* value (its own models
    return a loss there); the target of a "loglikelihood" task gets log p, of which lmms-eval makes
    a perplexity. Its `acc_norm` is then -log p per character.

    Each pair is wrapped: of a bare one, lmms-eval 0.7.3 makes a text, and fails when it scores it
    (`unwrap_generation_output` in its api/instance.py).

    Raises:
      EvalError: a task asks for `acc_mutual_info`, which needs the contrary sign.
      PromptError: context and continuation do not fit, or a picture cannot be read.
    """
    asked, signs = [], []
    for args in (request.args for request in requests):
      if len(args) != 6:
        raise EvalError("acc_mutual_info is not offered: lmms-eval computes it from gains.")
      context, target, *document = args
      is_choice = isinstance(target, str)
      _, doc_id, task, split = document
      text = target if is_choice else target(self.task_dict[task][split][doc_id])
      prompt = self._prompt(context, *document)
      try:
        asked += likelihood.continuations(self.model, prompt, [text])
      except PromptError as e:
        raise PromptError(f"{_name(*document)}: {e}") from e
      signs.append(-1 if is_choice else 1)
    news = harness.teller("continuations", len(asked))
    found = likelihood.log_likelihoods(self.model, asked, tell=news)
    pairs = [(sign * one.log_prob, one.greedy) for sign, one in zip(signs, found, strict=True)]
    return [GenerationResult(pair) for pair in pairs]


def _name(_: Any, doc_id: int, task: str, split: str) -> str:
  """Returns a document's name for messages, of the last arguments of its request."""
  return f"{task}, {split} document {doc_id}"


def _item(part: Mapping[str, Any], where: str) -> Any:
  """Returns a part of a message as a part of a prompt."""
  if part["type"] == "text":
    return part["text"]
  if part["type"] == "image":
    return _picture(part["url"], where)
  raise EvalError(f"{where} has {part['type']}; the model reads text and pictures.")


def _picture(visual: Any, where: str) -> Any:
  """Returns a picture as a part of a prompt, of what a task may have: pixels, or a file's name."""
  if not isinstance(visual, str):
    return visual
  if "://" in visual:
    raise EvalError(f"{where} has the address '{visual}'; only files are read.")
  return epath.Path(visual)


def manifest() -> ModelManifest:
  """Returns what lmms-eval registers; its entry-point group is `lmms_eval.models`."""
  return ModelManifest(
    NAME,
    simple_class_path=f"{__name__}.{LmmsEvalSimple.__name__}",
    chat_class_path=f"{__name__}.{LmmsEval.__name__}",
  )
