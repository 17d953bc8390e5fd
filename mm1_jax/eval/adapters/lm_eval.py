# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""A trained model in lm-evaluation-harness, for its tasks of text and of text with pictures.

  python -m mm1_jax.eval lm_eval --checkpoint=runs/mm1_debug --tasks=piqa,arc_easy
  python -m mm1_jax.eval lm_eval run --help

All flags but --checkpoint are the harness's own; --model, --device and --batch_size=auto are set if
left out. --model_args may have data, fsdp, expert, tensor (devices) and quantize as in Model.load;
bos=False, for documents without `<s>`; max_gen_toks=N, where a task does not say (256).

With --apply_chat_template, a context is a conversation, tokenised turn by turn as in training.
"""

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from mm1_jax.data.tokenizer import IMAGE
from mm1_jax.eval import likelihood
from mm1_jax.eval.adapters import harness
from mm1_jax.eval.likelihood import Continuation
from mm1_jax.eval.task import EvalError
from mm1_jax.inference.generate import tell
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import PromptError, Request, fill_slots

NAME = "mm1_jax"
MAX_GEN_TOKS = 256  # the default of the harness's own models


@register_model(NAME)
class LmEval(LM):
  """The harness's interface over a `Model`.

  A text that is longer than the model loses its beginning, as with the harness's own models;
  `truncated` counts them. Pictures are not cut: then it is a PromptError.

  Args:
    model: what is evaluated.
    bos: whether a document begins with `<s>`.
    batch_size: prompts that are read at once to be answered; likelihoods fill rows by themselves.
    max_gen_toks: longest answer, in tasks that do not say.
  """

  MULTIMODAL = True

  def __init__(
    self,
    model: Model,
    *,
    bos: bool = True,
    batch_size: int = harness.BATCH_SIZE,
    max_gen_toks: int = MAX_GEN_TOKS,
  ):
    super().__init__()
    self.model = model
    self.bos = bos
    self.batch_size = batch_size
    self.max_gen_toks = max_gen_toks
    self.max_length = model.run.data.seq_len
    self.truncated = 0
    # What was said in the conversations that the harness has as texts.
    self._turns: dict[str, list[dict[str, Any]]] = {}
    self._with_template = False

  @classmethod
  def create_from_arg_obj(
    cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
  ) -> "LmEval":
    """Returns the model that --model_args, --batch_size and --device ask for.

    Raises:
      EvalError: they ask for what is not offered here.
      UserError: the checkpoint cannot be loaded.
    """
    flags = additional_config or {}
    harness.check_device(flags.get("device"), jax.default_backend())
    if flags.get("max_batch_size") is not None:
      raise EvalError("--max_batch_size is for models that search for a size; use --batch_size.")
    bos = arg_dict.get("bos", True)
    if not isinstance(bos, bool):
      raise EvalError(f"bos is {bos!r}; it must be True or False.")
    return cls(
      harness.load(arg_dict, others=("bos", "max_gen_toks")),
      bos=bos,
      batch_size=harness.batch_size(flags.get("batch_size")),
      max_gen_toks=harness.whole_number(
        "max_gen_toks", arg_dict.get("max_gen_toks", MAX_GEN_TOKS), 1
      ),
    )

  @classmethod
  def create_from_arg_string(
    cls, arg_string: str, additional_config: dict[str, Any] | None = None
  ) -> "LmEval":
    """The same, of `key=value,key=value`."""
    return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

  def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
    """Returns log p of each continuation, and whether each of its tokens is the likeliest.

    Raises:
      PromptError: a picture cannot be read, a continuation has no tokens, or what is left of a text
        without its beginning is still too long.
    """
    asked: list[Continuation] = []
    for _, group in itertools.groupby((r.args for r in requests), key=_context_of):
      args: list[tuple[Any, ...]] = list(group)
      asked += self._continuations(args[0][0], [arg[1] for arg in args], _visuals(args[0]))
    news = harness.teller("continuations", len(asked))
    found = likelihood.log_likelihoods(self.model, [self._fit(one) for one in asked], tell=news)
    self._report()
    return [(one.log_prob, one.greedy) for one in found]

  def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
    """Returns log p of each text, of any length; see `likelihood.rolling`."""
    windows = [likelihood.rolling(self.model, request.args[0]) for request in requests]
    asked = list(itertools.chain.from_iterable(windows))
    news = harness.teller("windows", len(asked))
    found = iter(likelihood.log_likelihoods(self.model, asked, tell=news))
    return [sum(one.log_prob for one in itertools.islice(found, len(w))) for w in windows]

  def generate_until(self, requests: list[Instance]) -> list[str]:
    """Returns answers; generation_kwargs are honoured or refused, see `harness.read_decoding`.

    Raises:
      EvalError: generation_kwargs ask for what is not offered, or for answers that leave no room
        for a prompt.
      PromptError: a picture cannot be read, or a prompt with pictures does not fit.
    """
    prompts, decodings = [], []
    for request in requests:
      args: tuple[Any, ...] = request.args
      decoding = harness.read_decoding(args[1], max_new_tokens=self.max_gen_toks)
      room = self.max_length - decoding.max_new_tokens
      if room < 1:
        raise EvalError(
          f"answers of up to {decoding.max_new_tokens} tokens leave no room for a prompt: the "
          f"model was trained on {self.max_length} positions. Set --gen_kwargs max_gen_toks=N."
        )
      prompts.append(self._shorten(self._prompt(args[0], _visuals(args)), room))
      decodings.append(decoding)
    answers = harness.generate(self.model, prompts, decodings, batch_size=self.batch_size)
    self._report()
    return answers

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Returns a conversation as text, and remembers it: the model reads its turns.

    Without `add_generation_prompt`, the last turn is the beginning of an answer.
    """
    template, turns = self.model.encoder.template, [dict(turn) for turn in chat_history]
    parts = []
    for turn in turns:
      markup = template.markup(turn["role"])
      parts += [markup.before, turn["content"], markup.end + markup.after]
    text = "".join(parts if add_generation_prompt else parts[:-1])
    if add_generation_prompt:
      text += template.assistant.before
    self._turns[text] = turns
    self._with_template = True
    return text

  def chat_template(self, chat_template: bool | str = False) -> str:
    """Returns the run's template, which is what the harness records.

    Raises:
      EvalError: another one is asked for by name.
    """
    if isinstance(chat_template, str):
      raise EvalError(
        f"--apply_chat_template={chat_template}: a run has one template, the one it was trained "
        f"with; leave the name out."
      )
    self._with_template = bool(chat_template)
    return self.model.encoder.template.to_json()

  @property
  def tokenizer_name(self) -> str:
    """A name for tokenizer and template, by which the harness keeps requests."""
    made_of = self.model.tokenizer.model + self.model.encoder.template.to_json().encode()
    return f"{NAME}-{hashlib.sha256(made_of).hexdigest()[:16]}"

  def get_model_info(self) -> dict[str, Any]:
    """Returns what the harness's results say about the model."""
    return {
      "model_name": self.model.run.name,
      "model_dtype": self.model.run.model.dtype,
      "model_num_parameters": sum(x.size for x in jax.tree.leaves(self.model.params)),
      "max_length": self.max_length,
      "bos": self.bos,
      "truncated_prompts": self.truncated,
    }

  def _continuations(
    self, context: str, texts: Sequence[str], pictures: Sequence[Any]
  ) -> list[Continuation]:
    """Returns continuations of one context, of any length."""
    turns = self._conversation(context)
    if turns is None:
      items: list[Any] = fill_slots(context, pictures) if pictures else [context]
      return likelihood.of_document(self.model, items, texts, bos=self.bos)
    request, begun = self._turns_prompt(turns, pictures)
    stem = begun.rstrip()
    before = self._answer_ids(stem) if stem else []
    request = request._replace(ids=[*request.ids, *before])
    found = []
    for text in texts:
      whole = begun + text if stem else text.strip()
      found.append(Continuation(request, tuple(self._answer_ids(whole)[len(before) :])))
    return found

  def _prompt(self, context: str, pictures: Sequence[Any]) -> Request:
    """Returns what an answer follows, of any length."""
    turns = self._conversation(context)
    if turns is not None:
      request, begun = self._turns_prompt(turns, pictures)
      return request._replace(ids=[*request.ids, *(self._answer_ids(begun) if begun else [])])
    if pictures:
      return self.model.encode(fill_slots(context, pictures), chat=False)
    ids = self.model.encoder.encode_prefix([{"text": context}]).ids
    return Request((ids if self.bos else ids[1:]) or [self.model.tokenizer.eos_id], [], chat=False)

  def _turns_prompt(
    self, turns: Sequence[Mapping[str, Any]], pictures: Sequence[Any]
  ) -> tuple[Request, str]:
    """Returns a conversation up to where the answer begins, and what has been said of that."""
    turns, left = [dict(turn) for turn in turns], list(pictures)
    begun = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
    for turn in turns:
      num = turn["content"].count(IMAGE) if pictures else 0
      turn["content"] = fill_slots(turn["content"], left[:num]) if num else [turn["content"]]
      del left[:num]
    if pictures:
      turns[-1]["content"] = [*left, *turns[-1]["content"]]  # those without a slot come first
      return self.model.encode(turns, chat=True), begun
    plain = [{**turn, "content": [{"text": text} for text in turn["content"]]} for turn in turns]
    return Request(self.model.encoder.encode_prompt(plain).ids, [], chat=True), begun

  def _answer_ids(self, text: str) -> list[int]:
    encoder = self.model.encoder
    return encoder.encode_answer([{"text": text}])[: -len(encoder.answer_end)]

  def _conversation(self, context: str) -> list[dict[str, Any]] | None:
    """Returns the turns of a context; None if it is a document.

    Raises:
      EvalError: it is a conversation that another process made.
    """
    turns = self._turns.get(context)
    if turns is None and self._with_template and context:
      raise EvalError("conversations cannot be read from --cache_requests; leave that flag out.")
    return turns

  def _fit(self, asked: Continuation) -> Continuation:
    """Returns a continuation with the beginning of its context cut off where it is too long."""
    if not asked.target:
      raise PromptError(f"a continuation of {len(asked.context.ids)} ids has no tokens.")
    room = self.max_length - len(asked.target) + 1  # the last id is not read
    if room < 1:
      raise PromptError(
        f"a continuation of {len(asked.target)} tokens exceeds the {self.max_length} positions "
        f"that the model was trained on."
      )
    return asked._replace(context=self._shorten(asked.context, room))

  def _shorten(self, request: Request, room: int) -> Request:
    if len(request.ids) <= room:
      return request
    if request.images:
      raise PromptError(
        f"a prompt with {len(request.images)} pictures takes {len(request.ids)} positions; there "
        f"is room for {room}, and only texts are cut."
      )
    self.truncated += 1
    return request._replace(ids=request.ids[-room:])

  def _report(self) -> None:
    if self.truncated:
      tell(
        f"{self.truncated} prompts so far lost their beginning: they exceed the {self.max_length} "
        f"positions that the model was trained on"
      )


def _visuals(args: tuple) -> list[Any]:
  """Returns the pictures of a request.

  Raises:
    EvalError: it has something else besides text.
  """
  media = args[2] if len(args) > 2 else {}
  if others := [kind for kind in media if kind != "visual"]:
    raise EvalError(f"a task has {others[0]}; the model reads text and pictures.")
  return list(media.get("visual") or [])


def _context_of(args: tuple) -> tuple:
  """Returns what is equal for two requests of one context; those of a document share its media."""
  return args[0], *(id(medium) for media in args[2:] for medium in media.values())


def main(argv: Sequence[str]) -> None:
  """Runs the harness's own command line with this model.

  Raises:
    EvalError, UserError: see `LmEval.create_from_arg_obj`; the rest is the harness's.
  """
  sys.argv = ["lm-eval", *with_defaults(argv)]
  cli_evaluate()


def with_defaults(argv: Sequence[str]) -> list[str]:
  """Returns the harness's command line: with this model, and a batch size that suits it."""
  command, *flags = argv if argv and argv[0] in ("run", "ls", "validate") else ("run", *argv)
  if command != "run" or {"-h", "--help"} & set(flags):
    return [command, *flags]
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument("--checkpoint")
  ours, flags = parser.parse_known_args(flags)
  if ours.checkpoint is not None:
    flags += ["--model_args", json.dumps({"checkpoint": ours.checkpoint})]
  given = {flag.split("=")[0] for flag in flags}
  # The harness's own default device is a GPU, and its default of prompts at once is one.
  defaults = {("--model", "-M"): NAME, ("--device",): jax.default_backend()}
  if not given & {"--config", "-C"}:  # which may say it
    defaults["--batch_size", "-b"] = "auto"
  for spellings, value in defaults.items():
    if not given & set(spellings):
      flags += [spellings[0], value]
  return [command, *flags]
