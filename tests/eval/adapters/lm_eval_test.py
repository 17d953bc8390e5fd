# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness scores our models: its own tasks and command line, on files made here."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: the extra lm-eval")
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mm1_jax.eval import likelihood  # noqa: E402
from mm1_jax.eval.adapters.lm_eval import LmEval, with_defaults  # noqa: E402
from mm1_jax.eval.task import EvalError  # noqa: E402
from mm1_jax.inference.model import Model  # noqa: E402
from mm1_jax.inference.prompts import PromptError  # noqa: E402

pytestmark = pytest.mark.compiles

ROOT = pathlib.Path(__file__).parents[3]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "bread"]
CHOICES = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWERS = """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity}]
"""
CLOZE = """
output_type: multiple_choice
doc_to_text: answer
doc_to_choice: "{{[question + ' a', question + ' no']}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: acc}]
"""


def words(rng: np.random.Generator, num: int) -> str:
  return " ".join(rng.choice(WORDS, num))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
  rng = np.random.default_rng(3)
  return [
    {
      "question": words(rng, rng.integers(2, 12)),
      "choices": [words(rng, rng.integers(1, 6)) for _ in range(3)],
      "answer": int(rng.integers(2)),
    }
    for _ in range(6)
  ]


@pytest.fixture
def folder(rows, tmp_path, monkeypatch) -> pathlib.Path:
  """Tasks in files, as a user writes them."""
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
  split = "test_split: test\nfewshot_split: test\n"
  tasks = {"choices": CHOICES, "answers": ANSWERS, "rolling": ROLLING, "cloze": CLOZE}
  for name, text in tasks.items():
    (tmp_path / f"{name}.yaml").write_text(f"task: mm1_{name}\n{where}{split}{text}")
  return tmp_path


def run(lm: LmEval, folder: pathlib.Path, task: str, **options) -> tuple[dict, list[dict]]:
  """Returns a task's scores, and what the harness logged of its documents, in order."""
  manager = TaskManager(include_path=str(folder), include_defaults=False)
  found = lm_eval.simple_evaluate(
    lm, tasks=[f"mm1_{task}"], task_manager=manager, bootstrap_iters=0, **options
  )
  samples = sorted(found["samples"][f"mm1_{task}"], key=lambda sample: sample["doc_id"])
  return found["results"][f"mm1_{task}"], samples


def responses(samples: list[dict]) -> list[list]:
  return [[resp for resps in sample["resps"] for resp in resps] for sample in samples]


def scores(model: Model, context, texts, **how) -> list[tuple[float, bool]]:
  asked = likelihood.continuations(model, context, texts, **how)
  return [(one.log_prob, one.greedy) for one in likelihood.log_likelihoods(model, asked)]


def assert_close(found, expected) -> None:
  assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
  np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-4, atol=1e-3)


def request(*args) -> Instance:
  return Instance("loglikelihood", {}, args, 0, ("task", 0, 1))


def test_choices_have_the_models_likelihoods(model, folder, rows):
  results, samples = run(LmEval(model), folder, "choices")
  best, best_norm = [], []
  for row, found in zip(rows, responses(samples), strict=True):
    texts = [f" {choice}" for choice in row["choices"]]
    expected = scores(model, [f"Question: {row['question']}\nAnswer:"], texts, chat=False)
    assert_close(found, expected)
    sums = np.array([x for x, _ in expected])
    best.append(sums.argmax() == row["answer"])
    best_norm.append((sums / [len(c) for c in row["choices"]]).argmax() == row["answer"])
  assert results["acc,none"] == np.mean(best)
  assert results["acc_norm,none"] == np.mean(best_norm)


def test_contexts_that_differ_share_a_continuation(model, folder, rows):
  _, samples = run(LmEval(model), folder, "cloze")
  for row, found in zip(rows, responses(samples), strict=True):
    contexts = [f"{row['question']} {word}" for word in ("a", "no")]
    expected = [scores(model, [c], [f" {row['choices'][0]}"], chat=False)[0] for c in contexts]
    assert_close(found, expected)


def test_answers_are_the_models_own(model, folder, rows):
  _, samples = run(LmEval(model, batch_size=4), folder, "answers")
  expected = model.generate(
    [[f"Question: {row['question']}\nAnswer:"] for row in rows],
    chat=False,
    max_new_tokens=6,
    stop=["\n", "."],
  )
  assert responses(samples) == [[answer] for answer in expected]


def test_settings_of_the_command_line_reach_the_model(model, folder, rows):
  lm = LmEval(model)
  how = {"temperature": 1.0, "do_sample": True, "max_gen_toks": 9}
  _, sampled = run(lm, folder, "answers", gen_kwargs=how)
  _, greedy = run(lm, folder, "answers")
  assert responses(sampled) != responses(greedy)
  assert responses(run(lm, folder, "answers", gen_kwargs=how)[1]) == responses(sampled)
  with pytest.raises(EvalError, match=r"repetition_penalty=1\.2, which is not offered"):
    run(lm, folder, "answers", gen_kwargs={"repetition_penalty": 1.2})
  with pytest.raises(EvalError, match=r"leave no room for a prompt.*192 positions"):
    run(lm, folder, "answers", gen_kwargs={"max_gen_toks": 192})


def test_perplexity_is_of_whole_texts(model, folder, rows):
  results, samples = run(LmEval(model), folder, "rolling")
  total, num = 0.0, 0
  for row, found in zip(rows, responses(samples), strict=True):
    text = f"{row['question']} {row['choices'][0]}"
    (expected,) = scores(model, [], [text], chat=False)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    total, num = total + expected[0], num + len(text.split())
  np.testing.assert_allclose(results["word_perplexity,none"], np.exp(-total / num), rtol=1e-3)


class Harness(TemplateLM):
  """Splits contexts and continuations with the harness's own code."""

  def __init__(self, model: Model, bos: bool):
    super().__init__()
    self.ours, self.bos = model.tokenizer, bos

  eot_token_id = property(lambda self: self.ours.eos_id)
  prefix_token_id = property(lambda self: self.ours.bos_id if self.bos else self.ours.eos_id)

  def tok_encode(self, string, add_special_tokens=None, **kwargs):
    bos = self.bos if add_special_tokens is None else add_special_tokens
    return [self.ours.bos_id] * bos + self.ours.encode(string)

  def _loglikelihood_tokens(self, requests, **kwargs):
    return [(tuple(context), tuple(target)) for _, context, target in requests]

  loglikelihood_rolling = generate_until = lambda self, requests: []


@pytest.mark.parametrize("bos", [True, False])
def test_ids_are_those_of_the_harness(model, bos):
  rng = np.random.default_rng(5)
  spaces, pairs = ["", " ", "  ", "\n"], [("", " the fox"), ("", "dog"), ("a  ", "dog")]
  for _ in range(30):
    context = words(rng, rng.integers(1, 6)) + rng.choice(spaces)
    pairs.append((context, rng.choice(spaces) + words(rng, rng.integers(1, 4))))
  expected = Harness(model, bos).loglikelihood([request(*pair) for pair in pairs], True)
  lm = LmEval(model, bos=bos)
  found = [lm._continuations(context, [text], [])[0] for context, text in pairs]
  assert [(tuple(one.context.ids), one.target) for one in found] == expected


def test_a_text_that_is_too_long_loses_its_beginning(model):
  rng = np.random.default_rng(6)
  context, lm = words(rng, 400), LmEval(model)
  (found,) = lm.loglikelihood([request(context, " the fox")])
  ids, target = model.tokenizer.encode(context), model.tokenizer.encode(" the fox")
  assert model.tokenizer.encode(context + " the fox") == ids + target
  kept = likelihood.Request(ids[-(192 - len(target) + 1) :], [], chat=False)
  (expected,) = likelihood.log_likelihoods(model, [likelihood.Continuation(kept, tuple(target))])
  assert_close([found], [(expected.log_prob, expected.greedy)])
  (answer,) = lm.generate_until([request(context, {"max_gen_toks": 10})])
  kept = likelihood.Request(ids[-182:], [], chat=False)
  assert [answer] == model.generate([kept], max_new_tokens=10)
  assert lm.get_model_info()["truncated_prompts"] == 2
  with pytest.raises(PromptError, match="exceeds the 192 positions"):
    lm.loglikelihood([request("a", f" {context}")])


@pytest.fixture(scope="module")
def converses(model) -> Model:
  """The same params, of a run that was trained on conversations."""
  data = dataclasses.replace(model.run.data, chat=True)
  return Model(model.params, dataclasses.replace(model.run, data=data), model.mesh)


def test_conversations_are_read_turn_by_turn(converses, folder, rows):
  how = {"apply_chat_template": True, "num_fewshot": 2, "system_instruction": "Be brief."}
  _, samples = run(LmEval(converses), folder, "choices", fewshot_as_multiturn=True, **how)
  for row, sample, found in zip(rows, samples, responses(samples), strict=True):
    text = sample["arguments"][0][0]
    assert text.startswith("Be brief.") or "Be brief." in text.split("Question")[0]
    assert text.count("ASSISTANT:") == 3
    parts = [part.split("ASSISTANT:") for part in text.split("USER: ")[1:]]
    turns = [{"role": "system", "content": "Be brief."}]
    for question, answer in parts[:-1]:
      turns += [{"role": "user", "content": question.removesuffix("\n")}]
      turns += [{"role": "assistant", "content": answer.removesuffix("</s>").strip()}]
    turns += [{"role": "user", "content": parts[-1][0].removesuffix("\n")}]
    request = converses.encode(turns)
    ends = len(converses.encoder.answer_end)
    asked = [
      likelihood.Continuation(
        request, tuple(converses.encoder.encode_answer([{"text": choice}])[:-ends])
      )
      for choice in row["choices"]
    ]
    expected = likelihood.log_likelihoods(converses, asked)
    assert_close(found, [(one.log_prob, one.greedy) for one in expected])


def test_an_answer_that_has_begun_is_continued(converses):
  lm = LmEval(converses)
  turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "It is"}]
  text = lm.apply_chat_template(turns, add_generation_prompt=False)
  assert text.endswith("ASSISTANT: It is")
  (found,) = lm._continuations(text, [" a dog"], [])
  ends = len(converses.encoder.answer_end)
  whole = converses.encoder.encode_answer([{"text": "It is a dog"}])[:-ends]
  prompt = converses.encode(["the fox"]).ids
  assert [*found.context.ids, *found.target] == [*prompt, *whole]
  assert converses.tokenizer.decode(found.target).strip() == "a dog"
  (answer,) = lm.generate_until([request(text, {"max_gen_toks": 4})])
  begun = likelihood.Request(found.context.ids, [], chat=True)
  assert [answer] == converses.generate([begun], max_new_tokens=4)


def test_a_conversation_that_was_not_made_here_is_refused(converses):
  lm = LmEval(converses)
  assert json.loads(lm.chat_template(True))["user"]["before"] == "USER: "
  with pytest.raises(EvalError, match="--cache_requests; leave that flag out"):
    lm.loglikelihood([request("USER: a\nASSISTANT:", "b")])
  with pytest.raises(EvalError, match="a run has one template"):
    lm.chat_template("llama3")


def test_pictures_take_their_slots(model, converses, pictures):
  images = [PIL.Image.open(io.BytesIO(data)) for data in pictures]
  lm = LmEval(model)
  args = "<image>\n<image>\nthe fox is"
  found = lm.loglikelihood(
    [request(args, text, {"visual": images}) for text in (" a dog", " bread")]
  )
  expected = scores(model, [*images, "the fox is"], [" a dog", " bread"], chat=False)
  assert_close(found, expected)
  other = lm.loglikelihood([request(args, " a dog", {"visual": images[::-1]})])
  assert abs(other[0][0] - found[0][0]) > 1e-4
  (answer,) = lm.generate_until(
    [request("<image> the", {"max_gen_toks": 5}, {"visual": images[:1]})]
  )
  assert [answer] == model.generate([[images[0], " the"]], chat=False, max_new_tokens=5)
  lm = LmEval(converses)
  text = lm.apply_chat_template([{"role": "user", "content": "see <image> it"}])
  (found,) = lm._continuations(text, ["a dog"], images[:1])
  assert found.context.ids == converses.encode(["see ", images[0], " it"]).ids
  with pytest.raises(EvalError, match="a task has audio"):
    lm.loglikelihood([request("a", "b", {"audio": [0]})])
  with pytest.raises(PromptError, match="only texts are cut"):
    lm.generate_until([request(text, {"max_gen_toks": 185}, {"visual": images[:1]})])


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"device": "cuda"}, "device=cuda, but JAX runs on cpu"),
    ({"max_batch_size": 8}, "--max_batch_size is for models that search"),
  ],
)
def test_flags_that_mean_nothing_here_are_refused(flags, message):
  with pytest.raises(EvalError, match=message):
    LmEval.create_from_arg_string("checkpoint=x", flags)


def test_what_is_left_out_of_the_command_line():
  assert with_defaults(["ls", "tasks"]) == ["ls", "tasks"]
  assert with_defaults(["--help"]) == ["run", "--help"]
  whole = ["run", "-M", "hf", "--batch_size=4", "--device=cpu"]
  assert with_defaults(whole) == whole
  ours = ["--model", "mm1_jax", "--device", "cpu"]
  assert with_defaults(["-C", "a.yaml"]) == ["run", "-C", "a.yaml", *ours]
  assert with_defaults(["--checkpoint=a,b", "--tasks=x"]) == [
    *("run", "--tasks=x", "--model_args", '{"checkpoint": "a,b"}'),
    *(*ours, "--batch_size", "auto"),
  ]


@pytest.mark.slow
def test_the_command_line_evaluates_a_checkpoint(workdir, folder):
  flags = [f"--checkpoint={workdir}", "--tasks=mm1_choices,mm1_answers", f"--include_path={folder}"]
  out = folder / "out"
  done = subprocess.run(
    [sys.executable, "-m", "mm1_jax.eval", "lm_eval", *flags, f"--output_path={out}"],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    **{"capture_output": True, "text": True, "check": False, "cwd": folder},
  )
  assert done.returncode == 0, done.stderr
  assert "|mm1_choices|" in done.stdout.replace(" ", "")
  (file,) = out.rglob("results_*.json")
  results = json.loads(file.read_text())
  assert results["config"]["max_length"] == 192
  assert 0 <= results["results"]["mm1_choices"]["acc,none"] <= 1
