# SPDX-License-Identifier: Apache-2.0
"""Our metrics beside answers of other projects' programs, recorded by `bench/metrics_peers.py`."""

import importlib.util
import json

import metric_cases
import numpy as np
import pytest
from metric_cases import OURS, Case

from mm1_jax.eval.metrics import captions, likelihood, statistics, yes_no

PEERS = metric_cases.recorded()
SETS = {"random": metric_cases.random_strings(), **PEERS["texts"]}
CASES = {name: metric_cases.cases(texts) for name, texts in SETS.items()}
# Texts whose tokens differ from Java's. Of captions: a letter and a full stop at the end; random
# texts join marks and words as no caption does.
TOKENS_DIFFER = {"random": 155, "openstax": 2, "math-vision": 1}


def surplus_space(text: str) -> bool:
  return text != " ".join(text.split())


def explained(metric: str, case: Case, ours, theirs) -> bool:
  """Whether a difference is one that the docstrings tell of."""
  texts = (case.reply, *case.truths)
  grows = any(
    len(changed) != len(text) for text in texts for changed in (text.lower(), text.upper())
  )
  if metric == "anls":  # more than the threshold, and lengths of upper-case text
    return grows or (ours == 0.5 and theirs == 0)
  if metric == "anls docvqa":  # lengths before spaces are squeezed, of upper-case text
    return grows or any(map(surplus_space, texts))
  if metric == "exact match lm_eval":  # numpy's arrays cut what becomes longer in lower case
    return grows
  return False


@pytest.mark.parametrize("metric", [name for name in OURS if name != "ptb tokens"])
def test_a_metric_is_what_its_own_program_says(metric):
  for name, cases in CASES.items():
    recorded = PEERS["answers"][metric][name]
    assert len(recorded) == len(cases)
    for case, theirs in zip(cases, recorded, strict=True):
      ours = OURS[metric](case)
      if not metric_cases.equal(ours, theirs):
        assert explained(metric, case, ours, theirs), (name, case, ours, theirs)


@pytest.mark.parametrize("metric", list(OURS))
def test_recorded_answers_are_of_many_kinds(metric):
  """A metric that is always 0 would agree with anything."""
  answers = [str(answer) for of_set in PEERS["answers"][metric].values() for answer in of_set]
  most = max(answers.count(answer) for answer in set(answers))
  assert len(set(answers)) > 1
  assert most < len(answers) - 20


@pytest.mark.parametrize("name", list(CASES))
def test_tokens_are_those_of_java(name):
  recorded = PEERS["answers"]["ptb tokens"][name]
  ours = [OURS["ptb tokens"](case) for case in CASES[name]]
  assert sum(a != b for a, b in zip(ours, recorded, strict=True)) == TOKENS_DIFFER.get(name, 0)


@pytest.mark.parametrize("tokenizer", list(captions.TOKENIZERS))
def test_captions_score_as_in_coco_caption(tokenizer):
  texts = PEERS["texts"]["coco"]
  answers, references = texts[::5], [texts[i + 1 : i + 5] for i in range(0, len(texts), 5)]
  theirs = PEERS["captions"][tokenizer]
  scores = captions.cider_d(answers, references, tokenizer)
  np.testing.assert_allclose(scores, theirs["cider"], atol=1e-5)
  assert np.std(scores) > 0.1
  for n in (1, 2, 3, 4):
    bleu = captions.bleu(answers, references, n, tokenizer)
    assert bleu == pytest.approx(theirs["bleu"][n - 1], abs=1e-5)
  rouge = captions.rouge_l(answers, references, tokenizer)
  np.testing.assert_allclose(rouge, theirs["rouge"], atol=1e-5)


def test_the_tokenizer_changes_cider_by_a_fifth():
  cider = {name: np.mean(scores["cider"]) for name, scores in PEERS["captions"].items()}
  assert cider["nlg_eval"] < 0.85 * cider["ptb"]


def test_pope_is_lmms_evals_but_for_misses_that_are_no_answer():
  replies, theirs = metric_cases.yes_no_replies(), PEERS["yes/no"]
  truths = [("yes", "no")[i % 2] for i in range(len(replies))]
  ours = yes_no.pope(replies, truths)
  assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=1e-5)
  assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-5)
  assert [ours["f1"], ours["precision"], ours["recall"]] == pytest.approx(theirs["kit"], abs=1e-5)
  assert ours["recall"] < theirs["lmms_recall"]
  answered = [i for i, reply in enumerate(replies) if yes_no.exactly(reply)]
  some = yes_no.pope([replies[i] for i in answered], [truths[i] for i in answered])
  assert some["recall"] == pytest.approx(theirs["lmms_recall"], abs=1e-5)


def test_mme_is_lmms_evals():
  replies = metric_cases.yes_no_replies()
  truths = [("yes", "no")[i % 2] for i in range(len(replies))]
  categories, pictures = zip(*metric_cases.mme_questions(len(replies)), strict=True)
  ours = yes_no.mme(replies, truths, categories, pictures)
  assert ours["perception"] == pytest.approx(PEERS["yes/no"]["perception"], abs=1e-4)
  assert ours["cognition"] == pytest.approx(PEERS["yes/no"]["cognition"], abs=1e-4)


def test_boxes_are_right_where_lmms_eval_has_them_right():
  ours, theirs = metric_cases.refcoco(metric_cases.box_replies()), PEERS["others"]["refcoco"]
  assert ours == theirs
  assert 100 < sum(ours) < 900


def test_perplexities_and_errors_are_lm_evals():
  texts, log_probs = metric_cases.likelihoods()
  theirs = PEERS["others"]
  assert likelihood.perplexity(log_probs) == pytest.approx(theirs["perplexity"])
  assert likelihood.word_perplexity(log_probs, texts) == pytest.approx(theirs["word perplexity"])
  assert likelihood.byte_perplexity(log_probs, texts) == pytest.approx(theirs["byte perplexity"])
  assert likelihood.bits_per_byte(log_probs, texts) == pytest.approx(theirs["bits per byte"])
  error = statistics.estimate(log_probs).standard_error
  assert error == pytest.approx(theirs["standard error"])


def test_the_recorded_file_is_small():
  assert metric_cases.RECORDED.stat().st_size < 300_000
  assert json.loads(metric_cases.RECORDED.read_text())["credits"].keys() == PEERS["texts"].keys()


@pytest.mark.skipif(not importlib.util.find_spec("pycocoevalcap"), reason="needs pycocoevalcap")
def test_captions_score_as_in_an_installed_coco_caption():
  from pycocoevalcap.bleu.bleu import Bleu
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.rouge.rouge import Rouge

  texts = [text for text in metric_cases.random_strings() if text.split()]
  answers, references = texts[::4], [texts[i + 1 : i + 4] for i in range(0, len(texts) - 3, 4)]
  answers = answers[: len(references)]
  theirs = [
    {i: [" ".join(text.split())] for i, text in enumerate(answers)},
    {i: [" ".join(text.split()) for text in of] for i, of in enumerate(references)},
  ][::-1]
  ours = captions.cider_d(answers, references, "nlg_eval")
  np.testing.assert_allclose(ours, Cider().compute_score(*theirs)[1], atol=1e-9)
  ours = captions.rouge_l(answers, references, "nlg_eval")
  np.testing.assert_allclose(ours, Rouge().compute_score(*theirs)[1], atol=1e-9)
  for n, bleu in enumerate(Bleu(4).compute_score(*theirs, verbose=0)[0]):
    assert captions.bleu(answers, references, n + 1, "nlg_eval") == pytest.approx(bleu)
