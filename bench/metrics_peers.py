# SPDX-License-Identifier: Apache-2.0
"""What other projects' programs make of the replies that our metrics are tested with.

  pip install numpy pycocoevalcap==1.2 anls==0.0.2
  pip download --no-deps -d WHEELS lmms-eval==0.7.3 lm-eval==0.4.13 ammico-lavis==1.0.2.3 \
    ms-vlmeval==0.0.20
  python -m bench.metrics_peers --wheels=WHEELS --data=FOLDER [--write]

Prints for each metric and set how many replies were compared and how many differ; with --write the
answers become `tests/eval/metrics/peers.json`, which the tests read. Functions are taken out of the
wheels one by one, so that what else those projects need is not installed. The PTB tokenizer is
Java's: its lines are left out where there is no `java`.

FOLDER has the named sets: eval/coco_mini_captions.jsonl, eval/math_vision.jsonl,
captions/clipart.jsonl, captions/openstax_alt.jsonl, sft/sft.jsonl. More of them is compared than
recorded.
"""

import argparse
import ast
import collections
import contextlib
import io
import json
import math
import pathlib
import random
import re
import shutil
import statistics
import string
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.eval.metrics import metric_cases
from tests.eval.metrics.metric_cases import Case

# What is recorded of the sets, whose licences ask for these words.
CREDITS = {
  "coco": "COCO captions, https://cocodataset.org, CC BY 4.0",
  "openclipart": "titles of Openclipart, https://openclipart.org, CC0",
  "openstax": "picture descriptions by OpenStax, https://openstax.org, CC BY 4.0",
  "vqa-rad": "answers of VQA-RAD, https://osf.io/89kps, CC0",
  "math-vision": "answers and choices of MATH-Vision, https://github.com/mathllm/MATH-V, MIT",
}


class Wheels:
  """Functions and classes of other projects, by file and name."""

  def __init__(self, folder: pathlib.Path):
    self._zips = [zipfile.ZipFile(path) for path in sorted(folder.glob("*.whl"))]

  def take(self, file: str, *names: str, **needs: Any) -> dict[str, Any]:
    """Runs the definitions of `names` in a file alone, and returns them.

    Args:
      file: within its wheel.
      names: of top-level functions, classes and constants, or Class.method, or outer.inner.
      needs: what they refer to besides the standard library.
    """
    source = next(z.read(file).decode() for z in self._zips if file in z.namelist())
    space: dict[str, Any] = {
      "re": re,
      "np": np,
      "math": math,
      "string": string,
      "statistics": statistics,
      "random": random,
      "defaultdict": collections.defaultdict,
      "Sequence": Sequence,
      "T": Any,
      **needs,
    }
    for name in names:
      body: list[ast.stmt] = ast.parse(source).body
      for part in name.split("."):
        node = next(n for n in body if part in _defines(n))
        body = getattr(node, "body", [])
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        node.decorator_list = []
      exec(compile(ast.Module([node], []), file, "exec"), space)
    return space


def _defines(node: ast.stmt) -> list[str]:
  if isinstance(node, ast.Assign):
    return [target.id for target in node.targets if isinstance(target, ast.Name)]
  return [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []


def peers(wheels: Wheels) -> dict[str, tuple[str, Callable[[Case], Any]]]:
  """Returns for each metric whose program it is, and its answer to a case."""
  tasks, lmms = "lmms_eval/tasks", "lmms-eval 0.7.3"
  found = vqa_peers(wheels) | choice_peers(wheels)
  metrics = wheels.take("lmms_eval/api/metrics.py", "levenshtein_distance", "anls")
  distance, docvqa = metrics["levenshtein_distance"], metrics["anls"]
  chartqa = wheels.take(f"{tasks}/chartqa/utils.py", "relaxed_correctness")["relaxed_correctness"]
  exact = wheels.take("lm_eval/api/metrics.py", "exact_match_hf_evaluate")
  exact = exact["exact_match_hf_evaluate"]

  def exact_match(case: Case) -> float:
    return max(
      float(exact([case.reply], [t], ignore_case=True, ignore_punctuation=True)["exact_match"])
      for t in case.truths
    )

  def anls(case: Case) -> float:
    from anls import anls_score

    return anls_score(case.reply, list(case.truths[:3]))

  return found | {
    "anls": ("anls 0.0.2", anls),
    "anls docvqa": (lmms, lambda c: docvqa(list(c.truths[:3]), [c.reply])["anls"]),
    "edit distance": (lmms, lambda c: distance(c.reply, c.truths[0])),
    "exact match lm_eval": ("lm-eval 0.4.13", exact_match),
    "relaxed accuracy": (lmms, lambda c: float(chartqa(c.reply, c.truths[0]))),
    "mathvista": (lmms, math_vista(wheels, distance)),
  }


def vqa_peers(wheels: Wheels) -> dict[str, tuple[str, Callable[[Case], Any]]]:
  tasks, lmms = "lmms_eval/tasks", "lmms-eval 0.7.3"
  file = f"{tasks}/_task_utils/vqa_eval_metric.py"
  processor = wheels.take(file, "EvalAIAnswerProcessor")["EvalAIAnswerProcessor"]
  vqav2 = wheels.take(
    f"{tasks}/vqav2/utils.py", "vqav2_process_results", EvalAIAnswerProcessor=processor
  )["vqav2_process_results"]
  textvqa = wheels.take(
    f"{tasks}/textvqa/utils.py", "textvqa_process_results", EvalAIAnswerProcessor=processor
  )["textvqa_process_results"]
  evaluation = wheels.take("lavis/common/vqa_tools/vqa_eval.py", "VQAEval")["VQAEval"]
  evaluation.updateProgress = lambda self, progress: None

  class Annotations:
    """As much of VQA's reader as its evaluation calls."""

    def __init__(self, answers: dict[str, Any]):
      self.qa = {0: answers | {"question_type": "", "answer_type": ""}}

    def getQuesIds(self) -> list[int]:
      return [0]

  def numbered(case: Case) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_id": i} for i, text in enumerate(case.truths)]

  def official(case: Case) -> float:
    truth, result = Annotations({"answers": numbered(case)}), Annotations({"answer": case.reply})
    run = evaluation(truth, result, n=6)
    with contextlib.redirect_stdout(io.StringIO()):
      run.evaluate()
    return run.accuracy["overall"] / 100

  def openflamingo(case: Case) -> float:
    # Its program is the official one but for when the steps are taken: that is written here.
    run = evaluation(Annotations({}), Annotations({}))

    def line(text: str) -> str:
      return text.replace("\n", " ").replace("\t", " ").strip()

    def steps(text: str) -> str:
      return run.processDigitArticle(run.processPunctuation(text))

    truths, answer = [line(text) for text in case.truths], line(case.reply)
    if len(set(truths)) > 1:
      truths, answer = [steps(text) for text in truths], steps(answer)
    left_out = (truths[:i] + truths[i + 1 :] for i in range(len(truths)))
    return statistics.mean(min(1, others.count(answer) / 3) for others in left_out)

  def lmms_vqav2(case: Case) -> float:
    return vqav2({"answers": numbered(case), "question_id": 0}, [case.reply])["exact_match"]

  def lmms_textvqa(case: Case) -> float:
    return textvqa({"answers": list(case.truths), "question_id": 0}, [case.reply])["exact_match"]

  return {
    "vqa official": ("VQA's vqaEval.py in ammico-lavis 1.0.2.3", official),
    "vqa openflamingo": ("the same, with OpenFlamingo's condition", openflamingo),
    "vqa lmms": (lmms, lmms_vqav2),
    "vqa textvqa": (lmms, lmms_textvqa),
  }


def choice_peers(wheels: Wheels) -> dict[str, tuple[str, Callable[[Case], Any]]]:
  tasks, lmms = "lmms_eval/tasks", "lmms-eval 0.7.3"

  class Drawn:
    """Says where MMMU's program draws a letter at random."""

    @staticmethod
    def choice(letters: Sequence[str]) -> str:
      return "?"

  parse = wheels.take(
    f"{tasks}/_task_utils/mmmu_mcq_utils.py", "parse_mmmu_multi_choice_response", random=Drawn
  )["parse_mmmu_multi_choice_response"]
  names = [
    "extract_numbers",
    "check_is_number",
    "normalize_str",
    "parse_open_response",
    "eval_open",
  ]
  mmmu = wheels.take(f"{tasks}/mmmu/utils.py", *names)
  mmbench = wheels.take(
    f"{tasks}/mmbench/mmbench_evals.py",
    "MMBench_Evaluator",
    os=__import__("os"),
    eval_logger=__import__("logging").getLogger(),
  )["MMBench_Evaluator"]()
  names = ["sqa_doc_to_target", "sqa_process_results"]
  sqa = wheels.take(f"{tasks}/scienceqa/utils.py", *names)["sqa_process_results"]
  seed = wheels.take(f"{tasks}/seedbench/utils.py", "seed_process_result")["seed_process_result"]
  mme = wheels.take(f"{tasks}/mme/utils.py", "parse_pred_ans")["parse_pred_ans"]
  kit = wheels.take("vlmeval/smp/misc.py", "process_punctuation")["process_punctuation"]
  by_word = wheels.take(
    "vlmeval/dataset/utils/yorn.py", "YOrN_Extraction", process_punctuation=kit
  )["YOrN_Extraction"]
  pope = wheels.take(f"{tasks}/pope/utils.py", "pope_process_results")["pope_process_results"]

  def science_qa(case: Case) -> str:
    docs = [{"choices": "ABCDE", "answer": i} for i in range(5)]
    right = [sqa(doc, [case.reply])["exact_match"] == 1.0 for doc in docs]
    return "".join(letter for letter, is_right in zip("ABCDE", right, strict=True) if is_right)

  def exactly(case: Case) -> str | None:
    doc = {"question_id": 0, "answer": "yes"}
    said = pope(doc, [case.reply])["pope_accuracy"]["prediction"]
    return said if said in ("yes", "no") else None

  def of_other(word: str) -> str | None:
    return None if word in ("other", "Unknown") else word.lower()

  def first(case: Case) -> str | None:
    doc = {"answer": "A", "data_type": "image", "question_id": 0}
    return seed(doc, [case.reply])["seed_all"]["pred"].upper() or None

  return {
    "mmmu choice": (lmms, lambda c: parse(c.reply, list("ABCD"), metric_cases.lettered(c))),
    "mmmu open": (
      lmms,
      lambda c: float(mmmu["eval_open"](c.truths[0], mmmu["parse_open_response"](c.reply))),
    ),
    "mmbench": (lmms, lambda c: mmbench.can_infer(c.reply, metric_cases.lettered(c)) or None),
    "scienceqa": (lmms, science_qa),
    "seed": (lmms, first),
    "yes/no exactly": (lmms, exactly),
    "yes/no by prefix": (lmms, lambda c: of_other(mme(c.reply))),
    "yes/no by word": ("VLMEvalKit in ms-vlmeval 0.0.20", lambda c: of_other(by_word(c.reply))),
  }


def math_vista(wheels: Wheels, distance: Callable[[str, str], int]) -> Callable[[Case], Any]:
  names = [
    f"MathVistaEvaluator.{name}"
    for name in ("extract_answer", "get_most_similar", "normalize_extracted_answer")
  ]

  class Log:
    @staticmethod
    def info(text: str) -> None: ...

    @staticmethod
    def error(text: str) -> None: ...

  file = "lmms_eval/tasks/mathvista/mathvista_evals.py"
  methods = wheels.take(file, *names, distance=distance, eval_logger=Log, DEMO_PROMPT="")

  class Evaluator:
    get_most_similar = methods["get_most_similar"]

    def create_test_prompt(self, demonstrations: str, query: str, response: str) -> str:
      return response

    def get_chat_response(self, prompt: str, **settings: Any) -> str:
      return prompt  # where GPT-4 is asked, the reply itself is scored

  def answers(case: Case) -> str:
    found, evaluator = [], Evaluator()
    for options, answer_type in ((case.options, "text"), ((), "integer"), ((), "float")):
      kind = "multi_choice" if options else "free_form"
      problem = {"question_type": kind, "answer_type": answer_type, "query": ""}
      problem["choices"] = list(options)
      said = methods["extract_answer"](evaluator, case.reply, problem, quick_extract=True)
      normal = methods["normalize_extracted_answer"]
      found.append(normal(evaluator, said, list(options), kind, answer_type, 2))
    return metric_cases.digest(list(map(str, found)))

  return answers


def java_tokens(texts: Sequence[str]) -> list[list[str]]:
  """Returns coco-caption's tokens of each text."""
  from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

  lines = {i: [{"caption": metric_cases.one_line(text)}] for i, text in enumerate(texts)}
  return [tokens[0].split() for tokens in PTBTokenizer().tokenize(lines).values()]


def caption_scores(captions: Sequence[Sequence[str]], java: bool) -> dict[str, Any]:
  """Returns coco-caption's scores of each picture's first caption against its others."""
  from pycocoevalcap.bleu.bleu import Bleu
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.rouge.rouge import Rouge

  tokenizers = {"words": lambda text: text.lower().split(), "nlg_eval": str.split}
  if java:
    flat = [text for of_picture in captions for text in of_picture]
    tokens = dict(zip(flat, java_tokens(flat), strict=True))
    tokenizers["ptb"] = tokens.__getitem__
  scores = {}
  for name, tokenize in tokenizers.items():
    texts = [[" ".join(tokenize(text)) for text in of_picture] for of_picture in captions]
    answers = {i: of_picture[:1] for i, of_picture in enumerate(texts)}
    references = {i: of_picture[1:] for i, of_picture in enumerate(texts)}
    scores[name] = {
      "cider": rounded(Cider().compute_score(references, answers)[1].tolist()),
      "bleu": rounded(Bleu(4).compute_score(references, answers, verbose=0)[0]),
      "rouge": rounded(Rouge().compute_score(references, answers)[1].tolist()),
    }
  return scores


def yes_no_scores(wheels: Wheels, texts: Sequence[str]) -> dict[str, Any]:
  """Returns POPE's and MME's scores of replies whose truths are yes and no by turns.

  POPE's of lmms-eval leave out recall: misses that are neither yes nor no are not in it.
  """
  names = [f"pope_aggregate_{name}" for name in ("accuracy", "precision", "recall", "f1_score")]
  pope = wheels.take("lmms_eval/tasks/pope/utils.py", "pope_process_results", *names)
  kit = wheels.take("vlmeval/dataset/utils/yorn.py", "POPE_rating.cal_f1_score")
  truths = [("yes", "no")[i % 2] for i in range(len(texts))]
  results = [
    pope["pope_process_results"]({"question_id": i, "answer": truth}, [text])["pope_accuracy"]
    for i, (text, truth) in enumerate(zip(texts, truths, strict=True))
  ]
  said = np.array([int(result["prediction"] == "yes") for result in results])
  f1, precision, recall = kit["cal_f1_score"](np.array([t == "yes" for t in truths]) * 1, said)

  class Log:
    @staticmethod
    def info(text: str) -> None: ...

  names = ["eval_type_dict", "parse_pred_ans", "mme_process_results", "mme_aggregate_results"]
  mme = wheels.take("lmms_eval/tasks/mme/utils.py", *names, eval_logger=Log)
  groups: dict[str, list[Any]] = {"mme_perception_score": [], "mme_cognition_score": []}
  for i, (category, picture) in enumerate(metric_cases.mme_questions(len(texts))):
    doc = {"question_id": picture, "category": category, "answer": truths[i]}
    for name, result in mme["mme_process_results"](doc, [texts[i]]).items():
      groups[name].append(result)
  return {
    "accuracy": rounded(pope["pope_aggregate_accuracy"](results)),
    "precision": rounded(pope["pope_aggregate_precision"](results)),
    "lmms_recall": rounded(pope["pope_aggregate_recall"](results)),
    "kit": rounded([float(f1), float(precision), float(recall)]),
    "perception": rounded(mme["mme_aggregate_results"](groups["mme_perception_score"])),
    "cognition": rounded(mme["mme_aggregate_results"](groups["mme_cognition_score"])),
  }


def other_scores(wheels: Wheels) -> dict[str, Any]:
  """Returns IoU accuracies of lmms-eval, and perplexities and errors of lm-eval."""
  names = ["parse_float_sequence_within", "compute_iou", "compute_accuracy"]
  rec = wheels.take("lmms_eval/tasks/refcoco/utils_rec.py", *names)
  names = ["mean", "weighted_mean", "perplexity", "weighted_perplexity", "bits_per_byte"]
  lm = wheels.take("lm_eval/api/metrics.py", *names, "sample_stddev", "mean_stderr")
  parse = rec["parse_float_sequence_within"]
  replies = metric_cases.box_replies()
  texts, log_probs = metric_cases.likelihoods()
  words = [len(re.split(r"\s+", text)) for text in texts]
  byte_counts = [len(text.encode()) for text in texts]
  return {
    "refcoco": [float(rec["compute_accuracy"](true, parse(reply))) for reply, true in replies],
    "perplexity": lm["perplexity"](log_probs),
    "word perplexity": lm["weighted_perplexity"](list(zip(log_probs, words, strict=True))),
    "byte perplexity": lm["weighted_perplexity"](list(zip(log_probs, byte_counts, strict=True))),
    "bits per byte": lm["bits_per_byte"](list(zip(log_probs, byte_counts, strict=True))),
    "standard error": lm["mean_stderr"](log_probs),
  }


def rounded(value: Any) -> Any:
  if isinstance(value, list):
    return [rounded(item) for item in value]
  return round(float(value), 5) if isinstance(value, float | np.floating) else value


def read_sets(data: pathlib.Path) -> tuple[dict[str, list[str]], list[list[str]]]:
  """Returns the texts of each named set, and COCO's captions by picture."""

  def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / name).read_text().splitlines()]

  pictures = [row["captions"] for row in lines("eval/coco_mini_captions.jsonl")]
  math = lines("eval/math_vision.jsonl")
  return {
    "coco": [text for of_picture in pictures for text in of_picture],
    "openclipart": [t for row in lines("captions/clipart.jsonl") for t in row["captions"]],
    "openstax": [t for row in lines("captions/openstax_alt.jsonl") for t in row["captions"]],
    "vqa-rad": [str(r["answer"]) for r in lines("sft/sft.jsonl") if r["source"] == "vqa-rad"],
    "math-vision": [text for row in math for text in [row["answer"], *row["choices"]]],
  }, pictures


MOST_CASES = {"openstax": 200}
# How many texts of each set are recorded, so that the file stays small.
RECORDED = {"coco": 255, "openclipart": 300, "openstax": 60, "vqa-rad": 300, "math-vision": 300}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--wheels", type=pathlib.Path, required=True, help="folder of the wheels")
  parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the named sets")
  parser.add_argument("--write", action="store_true", help="write tests/eval/metrics/peers.json")
  args = parser.parse_args()
  wheels, java = Wheels(args.wheels), shutil.which("java") is not None
  sets, pictures = read_sets(args.data)
  sets = {"random": metric_cases.random_strings()} | sets
  programs = peers(wheels)
  figures: dict[str, dict[str, list[int]]] = {}
  for name, texts in sets.items():
    # Edit distances in plain Python take seconds for one pair of long texts.
    cases = metric_cases.cases(texts[: MOST_CASES.get(name)])
    compared = {
      metric: (cases, list(map(answer, cases))) for metric, (_, answer) in programs.items()
    }
    if java:
      alone = [Case(text, (), ()) for text in texts]
      compared["ptb tokens"] = alone, [metric_cases.digest(t) for t in java_tokens(texts)]
    for metric, (cases, theirs) in compared.items():
      ours = list(map(metric_cases.OURS[metric], cases))
      pairs = list(zip(cases, ours, theirs, strict=True))
      wrong = [pair for pair in pairs if not metric_cases.equal(pair[1], pair[2])]
      print(f"{metric:20} {name:12} {len(pairs):6} compared, {len(wrong)} differ", flush=True)
      for case, our, their in wrong[:2]:
        print(f"  {our!r}, theirs {their!r}: {case}"[:300])
      figures.setdefault(metric, {})[name] = [len(pairs), len(wrong)]
  # What is recorded has cases of its own: truths and options are drawn among the recorded texts.
  if args.write:
    write(wheels, programs, sets, pictures, figures, java)


def write(
  wheels: Wheels,
  programs: dict[str, tuple[str, Callable[[Case], Any]]],
  sets: dict[str, list[str]],
  pictures: Sequence[Sequence[str]],
  figures: dict[str, dict[str, list[int]]],
  java: bool,
) -> None:
  if not java:
    raise SystemExit("the recorded file needs the PTB tokenizer's answers: install java")
  kept = {name: sets[name][:n] for name, n in RECORDED.items()}
  cases = {
    name: metric_cases.cases(texts)
    for name, texts in {"random": metric_cases.random_strings(), **kept}.items()
  }
  answers: dict[str, Any] = {
    metric: {name: [rounded(theirs(case)) for case in of_set] for name, of_set in cases.items()}
    for metric, (_, theirs) in programs.items()
  }
  answers["ptb tokens"] = {
    name: [metric_cases.digest(tokens) for tokens in java_tokens([case.reply for case in of_set])]
    for name, of_set in cases.items()
  }
  page = {
    "about": "Answers of other projects' programs, by `python -m bench.metrics_peers --write`.",
    "programs": {metric: program for metric, (program, _) in programs.items()}
    | {"ptb tokens": "Stanford CoreNLP 3.4.1 in pycocoevalcap 1.2"},
    "credits": CREDITS,
    "compared, differ": figures,
    "texts": kept,
    "answers": answers,
    "captions": caption_scores(pictures, java),
    "yes/no": yes_no_scores(wheels, metric_cases.yes_no_replies()),
    "others": other_scores(wheels),
  }
  text = json.dumps(page, separators=(",", ":"), ensure_ascii=True)
  metric_cases.RECORDED.write_text(text.replace('"texts":', '\n"texts":') + "\n")
  print(f"{metric_cases.RECORDED}: {len(text)} bytes")


if __name__ == "__main__":
  main()
