# SPDX-License-Identifier: Apache-2.0
"""Text alone, as lm-evaluation-harness 0.4.13 puts it: what a language model forgets shows here.

Contexts and continuations equal those of lm-eval's tasks on the official files. Each reader also
takes JSON lines {"id", "question", "choices", "answer_index"}, which have no other field; the rules
for these, as a task's YAML would say them, are:

  arc_easy, arc_challenge   doc_to_text: "Question: {{question}}\\nAnswer:"
  piqa                      doc_to_text: "Question: {{question}}\\nAnswer:"
  social_iqa                doc_to_text: "Q: {{question}}\\nA:"
  boolq                     doc_to_text: "Question: {{question}}\\nAnswer:"
  openbookqa                doc_to_text: "{{question}}"
  sciq                      doc_to_text: "Question: {{question}}\\nAnswer:"
  hellaswag                 doc_to_text: "{{question}}"
  winogrande                doc_to_choice: the question up to "_" with each choice;
                            doc_to_target: the question after "_", stripped (as lm-eval's own)

with doc_to_choice: choices, doc_to_target: answer_index and a space between context and choice.
Official BoolQ differs: the passage comes first, the question gets a question mark, and the choices
are no and yes.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mm1_jax.eval.metrics.likelihood import choose, perplexity
from mm1_jax.eval.metrics.statistics import Estimate, bootstrap, estimate
from mm1_jax.eval.task import Content, EvalError, Form, Item, Reply, Score, Scores, Task
from mm1_jax.eval.tasks import files, scoring

Make = Callable[[Mapping[str, Any], str], Item]
BY_LENGTH = {"acc": "sum", "acc_norm": "characters", "acc_bytes": "bytes"}  # lm-eval's names


# --- Readers ---


def read(
  names: Mapping[str, tuple[str, ...]], source: str, make: Make, folder: epath.Path, split: str
) -> list[Item]:
  """Rows of one official file; `make` turns one, with its number as default id, into an item."""
  path = files.find(folder, files.choose(names, split), source)
  trivia = make is _triviaqa and path.suffix == ".json"
  rows = files.read_list(path, "Data") if trivia else files.read_rows(path)
  labels = _labels(path, len(rows))

  def make_row(numbered: tuple[int, Mapping[str, Any]]) -> Iterator[Item]:
    number, row = numbered
    row = {**row, **({"label": labels[number]} if labels else {})}
    plain = "choices" in row and "answer_index" in row
    yield (_plain if plain else make)(row, str(row.get("id", number)))

  return files.items(path, enumerate(rows), make_row)


def _labels(path: epath.Path, n: int) -> list[str]:
  """Returns the lines of NAME-labels.lst beside a file, where PIQA and Social IQa have answers."""
  labels = path.parent / f"{path.stem}-labels.lst"
  if not labels.exists():
    return []
  lines = files.read_text(labels).split()
  if len(lines) != n:
    raise EvalError(f"'{labels}' has {len(lines)} labels for the {n} rows of '{path}'.")
  return lines


def choice_item(id: str, question: str, choices: Sequence[str], right: int, **details: Any) -> Item:
  if not 0 <= right < len(choices):
    raise EvalError(f"the right choice is number {right} of {len(choices)}")
  return Item(id, question, (), (choices[right],), tuple(choices), right, details)


def _plain(row: Mapping[str, Any], id: str) -> Item:
  return choice_item(id, row["question"], row["choices"], row["answer_index"], plain=True)


def _arc(row: Mapping[str, Any], id: str) -> Item:
  """ARC and OpenBookQA: nested as AI2 publishes them, or flat as in lm-eval's Parquet."""
  question, listed = row.get("question", row.get("question_stem")), row.get("choices")
  if isinstance(question, Mapping):
    question, listed = question["stem"], question["choices"]
  if isinstance(listed, Mapping):
    labels, texts = listed["label"], listed["text"]
  else:
    labels, texts = ([choice[name] for choice in listed] for name in ("label", "text"))  # pyright: ignore
  return choice_item(id, question, texts, labels.index(row["answerKey"].lstrip()))  # pyright: ignore


def _piqa(row: Mapping[str, Any], id: str) -> Item:
  return choice_item(id, row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))


def _social_iqa(row: Mapping[str, Any], id: str) -> Item:
  texts = tuple(row[f"answer{letter}"] for letter in "ABC")
  question = f"{row['context']} {row['question']}"
  return choice_item(id, question, texts, int(row["label"]) - 1)


def _hellaswag(row: Mapping[str, Any], id: str) -> Item:
  question = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
  endings = tuple(without_markup(ending) for ending in row["endings"])
  return choice_item(id, without_markup(question), endings, int(row["label"]))


def without_markup(text: str) -> str:
  """Returns a text of WikiHow without its marks, by lm-eval's rules."""
  text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
  return text.replace("  ", " ")


def _winogrande(row: Mapping[str, Any], id: str) -> Item:
  options = row["option1"], row["option2"]
  return choice_item(str(row.get("qID", id)), row["sentence"], options, int(row["answer"]) - 1)


def _boolq(row: Mapping[str, Any], id: str) -> Item:
  """Google's JSON lines (`answer` is true or false), or SuperGLUE's (`label`)."""
  label = row["answer"] if "answer" in row else row["label"]
  id = str(row.get("idx", id))
  return choice_item(id, row["question"], ("no", "yes"), int(label), passage=row["passage"])


def _sciq(row: Mapping[str, Any], id: str) -> Item:
  texts = tuple(
    row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")
  )
  return choice_item(id, row["question"], texts, 3, support=row["support"])


def _lambada(row: Mapping[str, Any], id: str) -> Item:
  context, _, word = row["text"].rpartition(" ")
  return Item(id, context, (), (word,))


def _triviaqa(row: Mapping[str, Any], id: str) -> Item:
  """The official JSON, or the Parquet of lm-eval, which has some questions twice: ids get numbers.

  Answers are all aliases.
  """
  known = {name.lower().replace("_", ""): value for name, value in row.items()}
  answer = {name.lower(): value for name, value in known["answer"].items()}
  return Item(f"{known['questionid']}/{id}", known["question"], (), tuple(answer["aliases"]))


def _webqs(row: Mapping[str, Any], id: str) -> Item:
  """The official JSON, with answers as (list (description "A") ...), or the Parquet of lm-eval."""
  if "targetValue" in row:
    answers = re.findall(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()"\s]+))\)', row["targetValue"])
    texts = [re.sub(r"\\(.)", r"\1", quoted) or plain for quoted, plain in answers]
    return Item(id, row["utterance"], (), tuple(texts))
  return Item(id, row["question"], (), tuple(row["answers"]))


# --- Forms ---


def options(context: Callable[[Item], str]) -> Form:
  """Returns the form that compares the likelihoods of choices after a context."""

  def prompt(item: Item) -> Content:
    return [context(item)]

  def pairs(item: Item) -> list[tuple[Content, str]]:
    return [(prompt(item), f" {choice}") for choice in item.choices]

  return Form(prompt, pairs)


def _asked(item: Item) -> str:
  return f"Question: {item.question}\nAnswer:"


def _boolq_context(item: Item) -> str:
  if item.details.get("plain"):
    return _asked(item)
  return f"{item.details['passage']}\nQuestion: {item.question}?\nAnswer:"


def _sciq_context(item: Item) -> str:
  if item.details.get("plain"):
    return _asked(item)
  return f"{item.details['support'].lstrip()}\n{_asked(item)}"


def _winogrande_options(item: Item) -> list[tuple[Content, str]]:
  """The choices are in the contexts; what follows is the same."""
  before, blank, after = item.question.partition("_")
  if not blank:
    raise EvalError(f"item '{item.id}' has no '_' for its choices.")
  return [([before + choice], f" {after.strip()}") for choice in item.choices]


def _webqs_options(item: Item) -> list[tuple[Content, str]]:
  """Accepted answers, without those that begin with another one."""
  return [([_asked(item)], f" {answer}") for answer in shortest(item.answers)]


def shortest(answers: Sequence[str]) -> list[str]:
  """Returns answers, sorted, without those that begin with one before."""
  kept: list[str] = []
  for answer in sorted(answers):
    if not kept or not answer.startswith(kept[-1]):
      kept.append(answer)
  return kept


FORMS = {
  "asked": options(_asked),
  "social_iqa": options(lambda item: f"Q: {item.question}\nA:"),
  "question": options(lambda item: item.question),
  "boolq": options(_boolq_context),
  "sciq": options(_sciq_context),
  "winogrande": Form(lambda item: [item.question], _winogrande_options),
  "lambada": Form(lambda i: [i.question], lambda i: [([i.question], f" {i.answers[0]}")]),
  "webqs": Form(lambda item: [_asked(item)], _webqs_options),
  "triviaqa": Form(
    lambda item: [f"Question: {item.question}?\nAnswer:"],
    max_new_tokens=32,
    stop=("\n", ".", ","),
  ),
}


# --- Scores ---


def choice_score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns the share of items whose right choice is the likeliest, by sum, character and byte."""
  options = scoring.likelihoods(items, replies)
  right: dict[str, np.ndarray] = {}
  for name, by in BY_LENGTH.items():
    chosen = [
      choose([one.log_prob for one in of], item.choices, by)
      for item, of in zip(items, options, strict=True)
    ]
    right[name] = np.array([c == item.right for c, item in zip(chosen, items, strict=True)])
  values = {name: estimate(column.astype(float)) for name, column in right.items()}
  return Scores(values, right["acc"].astype(float), right["acc"])


def winogrande_score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Continuations are the same, so that lengths do not matter: `acc` alone."""
  scores = choice_score(items, replies)
  return scores._replace(values={"acc": scores.values["acc"]})


def lambada_score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns the share of items whose last word is the likeliest, and the words' perplexity."""
  words = [of[0] for of in scoring.likelihoods(items, replies)]
  log_probs = np.array([word.log_prob for word in words])
  right, n = np.array([word.greedy for word in words]), len(words)
  error = bootstrap(lambda at: perplexity(log_probs[at]), n, 0)
  values = {
    "acc": estimate(right.astype(float)),
    "perplexity": Estimate(perplexity(log_probs), error, n),
  }
  return Scores(values, right.astype(float), right)


def webqs_score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns the share of items of which an accepted answer is what greedy decoding would begin."""
  options = scoring.likelihoods(items, replies)
  right = np.array([any(one.greedy for one in of) for of in options])
  return Scores({"exact_match": estimate(right.astype(float))}, right.astype(float), right)


# --- Tasks ---

AI2 = "https://allenai.org/data"
HUB = "https://huggingface.co/datasets"


def _parquet(part: str, split: str) -> tuple[str, ...]:
  """Names of lm-eval's Parquet files: in a folder by part, or in data/."""
  return tuple(f"{place}{split}-*.parquet" for place in (f"{part}/" if part else "data/", ""))


def _task(
  name: str,
  title: str,
  make: Make,
  splits: Mapping[str, tuple[str, ...]],
  source: str,
  form: str,
  score: Score = choice_score,
  metric: str = "likeliest choice; acc_norm divides by characters, acc_bytes by bytes",
) -> Task:
  split = next(iter(splits))
  return Task(
    name=name,
    title=title,
    read=functools.partial(read, splits, source, make),
    splits=tuple(splits),
    split=split,
    forms={"text": FORMS[form]},
    score=score,
    metric=metric,
    source=source,
    files=splits[split][:1],
  )


def _arc_splits(part: str) -> dict[str, tuple[str, ...]]:
  plain = f"{part.lower()}.jsonl"
  return {
    split: (f"{part}/{part}-{old}.jsonl", f"{part}-{old}.jsonl", *_parquet(part, new), *extra)
    for split, old, new, extra in (
      ("test", "Test", "test", (plain,)),
      ("validation", "Dev", "validation", ()),
      ("train", "Train", "train", ()),
    )
  }


ANY = "any accepted answer, or its beginning, is what greedy decoding gives"
TASKS = (
  _task("arc_easy", "ARC (easy)", _arc, _arc_splits("ARC-Easy"), f"{AI2}/arc", "asked"),
  _task(
    "arc_challenge", "ARC (challenge)", _arc, _arc_splits("ARC-Challenge"), f"{AI2}/arc", "asked"
  ),
  _task(
    "piqa",
    "PIQA",
    _piqa,
    {
      "validation": ("valid.jsonl", "dev.jsonl", *_parquet("", "validation"), "piqa.jsonl"),
      "train": ("train.jsonl", *_parquet("", "train")),
    },
    "https://yonatanbisk.com/piqa/data/ (with valid-labels.lst)",
    "asked",
  ),
  _task(
    "social_iqa",
    "Social IQa",
    _social_iqa,
    {
      "validation": ("dev.jsonl", *_parquet("", "validation"), "social_i_qa.jsonl"),
      "train": ("train.jsonl", *_parquet("", "train")),
    },
    f"{AI2}/socialiqa (with dev-labels.lst)",
    "social_iqa",
  ),
  _task(
    "hellaswag",
    "HellaSwag",
    _hellaswag,
    {
      "validation": ("hellaswag_val.jsonl", *_parquet("", "validation"), "hellaswag.jsonl"),
      "train": ("hellaswag_train.jsonl", *_parquet("", "train")),
    },
    "https://github.com/rowanz/hellaswag (data)",
    "question",
  ),
  _task(
    "winogrande",
    "WinoGrande",
    _winogrande,
    {
      "validation": (
        "dev.jsonl",
        "winogrande_1.1/dev.jsonl",
        *_parquet("winogrande_xl", "validation"),
        "winogrande.jsonl",
      ),
      "train": ("train_xl.jsonl", "winogrande_1.1/train_xl.jsonl"),
    },
    "https://winogrande.allenai.org (winogrande_1.1.zip)",
    "winogrande",
    winogrande_score,
    "likeliest rest of the sentence",
  ),
  _task(
    "boolq",
    "BoolQ",
    _boolq,
    {
      "validation": ("dev.jsonl", "val.jsonl", *_parquet("boolq", "validation"), "boolq.jsonl"),
      "train": ("train.jsonl", *_parquet("boolq", "train")),
    },
    "https://github.com/google-research-datasets/boolean-questions",
    "boolq",
  ),
  _task(
    "lambada",
    "LAMBADA (OpenAI)",
    _lambada,
    {"test": ("lambada_test.jsonl", "lambada_test_en.jsonl", "data/lambada_test_en.jsonl")},
    f"{HUB}/EleutherAI/lambada_openai",
    "lambada",
    lambada_score,
    "last word greedy; perplexity of last words",
  ),
  _task(
    "sciq",
    "SciQ",
    _sciq,
    {
      "test": ("test.json", *_parquet("", "test"), "sciq.jsonl"),
      "validation": ("valid.json", *_parquet("", "validation")),
      "train": ("train.json", *_parquet("", "train")),
    },
    f"{AI2}/sciq",
    "sciq",
  ),
  _task(
    "openbookqa",
    "OpenBookQA",
    _arc,
    {
      "test": ("test.jsonl", "Data/Main/test.jsonl", *_parquet("main", "test"), "openbookqa.jsonl"),
      "validation": ("dev.jsonl", "Data/Main/dev.jsonl", *_parquet("main", "validation")),
      "train": ("train.jsonl", "Data/Main/train.jsonl", *_parquet("main", "train")),
    },
    f"{AI2}/open-book-qa",
    "question",
  ),
  _task(
    "triviaqa",
    "TriviaQA",
    _triviaqa,
    {
      "validation": ("qa/web-dev.json", "web-dev.json", *_parquet("rc.nocontext", "validation")),
      "train": ("qa/web-train.json", "web-train.json", *_parquet("rc.nocontext", "train")),
    },
    "https://nlp.cs.washington.edu/triviaqa/ (triviaqa-rc)",
    "triviaqa",
    scoring.mean_score({"exact_match": scoring.is_accepted}),
    "exact match of an alias, case and punctuation ignored",
  ),
  _task(
    "webqs",
    "WebQuestions",
    _webqs,
    {
      "test": ("webquestions.examples.test.json", *_parquet("", "test")),
      "train": ("webquestions.examples.train.json", *_parquet("", "train")),
    },
    "https://nlp.stanford.edu/software/sempre/",
    "webqs",
    webqs_score,
    ANY,
  ),
)
