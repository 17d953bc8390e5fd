# SPDX-License-Identifier: Apache-2.0
"""CIDEr-D, BLEU and ROUGE-L of captions, as coco-caption computes them.

The tokenizer changes the score by a fifth and belongs beside it: "ptb" is coco-caption's, "words"
is lower case and space, "nlg_eval" is space alone, as nlg-eval has it.
"""

import collections
import math
from collections.abc import Callable, Sequence

import numpy as np

from mm1_jax.eval.metrics.limits import LONGEST_PAIRED, cut
from mm1_jax.eval.metrics.ptb import ptb_tokenize

_Ngram = tuple[str, ...]
_SIGMA = 6.0  # bigrams of difference in length, at which CIDEr-D falls by a factor of e^-0.5


def _words(text: str) -> list[str]:
  return cut(text).lower().split()


def _nlg_eval(text: str) -> list[str]:
  return cut(text).split()


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
  "ptb": ptb_tokenize,
  "words": _words,
  "nlg_eval": _nlg_eval,
}


def cider_d(
  answers: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "ptb"
) -> np.ndarray:
  """Returns CIDEr-D of each picture, float64[pictures], 0 to 10.

  Papers report 100 x the mean (human captions of COCO: about 100). How much an n-gram counts
  depends on how many of these pictures' references have it: score all pictures of a split in one
  call, and take error bars of the result (that is: with those counts fixed). Of one picture alone
  the score is 0. Source: https://arxiv.org/abs/1411.5726, with coco-caption's length, which it
  counts in bigrams.

  Raises:
    ValueError: no pictures, a picture without references, lengths that differ, or an unknown
      tokenizer.
  """
  tokens, reference_tokens = _tokenized(answers, references, tokenizer)
  counts = [[_ngrams(words, 4) for words in of_picture] for of_picture in reference_tokens]
  pictures_with = collections.Counter(
    ngram for of_picture in counts for ngram in set().union(*of_picture)
  )

  def weights(ngrams: collections.Counter[_Ngram]) -> list[dict[_Ngram, float]]:
    """tf-idf of the n-grams of each length."""
    of_length: list[dict[_Ngram, float]] = [{}, {}, {}, {}]
    for ngram, count in ngrams.items():
      idf = math.log(len(answers)) - math.log(max(pictures_with[ngram], 1))
      of_length[len(ngram) - 1][ngram] = count * idf
    return of_length

  scores = []
  for words, of_picture in zip(tokens, counts, strict=True):
    ngrams = _ngrams(words, 4)
    answer, bigrams = weights(ngrams), _bigrams(ngrams)
    similar = [
      _similarity(answer, weights(reference), bigrams - _bigrams(reference))
      for reference in of_picture
    ]
    scores.append(10 * float(np.mean(similar)))
  return np.array(scores)


def bleu(
  answers: Sequence[str],
  references: Sequence[Sequence[str]],
  n: int = 4,
  tokenizer: str = "ptb",
) -> float:
  """Returns BLEU of all pictures together, 0 to 1: n-grams up to n, the nearest reference's length.

  coco-caption's: without smoothing, but 0 of 0 is no error.

  Raises:
    ValueError: as `cider_d`.
  """
  tokens, reference_tokens = _tokenized(answers, references, tokenizer)
  correct, guessed = np.zeros(n), np.zeros(n)
  length = nearest = 0
  for words, of_picture in zip(tokens, reference_tokens, strict=True):
    most: collections.Counter[_Ngram] = collections.Counter()
    for reference in of_picture:
      most |= _ngrams(reference, n)
    for ngram, count in _ngrams(words, n).items():
      correct[len(ngram) - 1] += min(count, most[ngram])
    guessed += [max(0, len(words) - k) for k in range(n)]
    length += len(words)
    nearest += min((abs(len(reference) - len(words)), len(reference)) for reference in of_picture)[
      1
    ]
  precision = float(np.prod((correct + 1e-15) / (guessed + 1e-9))) ** (1 / n)
  ratio = (length + 1e-15) / (nearest + 1e-9)
  return precision if ratio >= 1 else precision * math.exp(1 - 1 / ratio)


def rouge_l(
  answers: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "ptb"
) -> np.ndarray:
  """Returns ROUGE-L of each picture, float64[pictures], 0 to 1; papers report 100 x the mean.

  The longest common subsequence as a share of the answer and of the reference, the best of each,
  combined with beta 1.2. Only the first `limits.LONGEST_PAIRED` characters of a text are read.

  Raises:
    ValueError: as `cider_d`.
  """
  answers = [cut(answer, LONGEST_PAIRED) for answer in answers]
  references = [[cut(text, LONGEST_PAIRED) for text in of_picture] for of_picture in references]
  tokens, reference_tokens = _tokenized(answers, references, tokenizer)
  scores = []
  for words, of_picture in zip(tokens, reference_tokens, strict=True):
    words = words or [""]  # coco-caption splits an empty text into one empty token
    lengths = [
      (_common(words, reference or [""]), len(reference or [""])) for reference in of_picture
    ]
    precision = max(common / len(words) for common, _ in lengths)
    recall = max(common / length for common, length in lengths)
    both = recall + 1.2**2 * precision
    scores.append((1 + 1.2**2) * precision * recall / both if both else 0.0)
  return np.array(scores)


def _tokenized(
  answers: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
) -> tuple[list[list[str]], list[list[list[str]]]]:
  if tokenizer not in TOKENIZERS:
    raise ValueError(f"tokenizer is {tokenizer!r}, not one of {sorted(TOKENIZERS)}")
  if len(answers) != len(references) or not len(answers):
    raise ValueError(f"{len(answers)} captions for the references of {len(references)} pictures")
  if not all(len(of_picture) for of_picture in references):
    raise ValueError("a picture without references cannot be scored")
  tokenize = TOKENIZERS[tokenizer]
  return [tokenize(answer) for answer in answers], [
    [tokenize(text) for text in of_picture] for of_picture in references
  ]


def _ngrams(words: list[str], longest: int) -> collections.Counter[_Ngram]:
  return collections.Counter(
    tuple(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)
  )


def _bigrams(ngrams: collections.Counter[_Ngram]) -> int:
  return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)


def _similarity(
  answer: list[dict[_Ngram, float]], reference: list[dict[_Ngram, float]], difference: int
) -> float:
  """The mean over lengths of the clipped cosine, less for lengths that differ."""
  cosines = []
  for a, b in zip(answer, reference, strict=True):
    common = sum(min(a[ngram], b[ngram]) * b[ngram] for ngram in a.keys() & b.keys())
    norms = _norm(a) * _norm(b)
    cosines.append(common / norms if norms else common)
  return float(np.mean(cosines)) * math.exp(-(difference**2) / (2 * _SIGMA**2))


def _norm(weights: dict[_Ngram, float]) -> float:
  return math.sqrt(sum(weight**2 for weight in weights.values()))


def _common(a: list[str], b: list[str]) -> int:
  """Returns the length of the longest common subsequence."""
  ids = {word: i for i, word in enumerate(dict.fromkeys(b))}
  b_ids = np.array([ids[word] for word in b])
  row = np.zeros(len(b) + 1, np.int32)  # of a's first words with each beginning of b
  for word in a:
    if word in ids:
      row[1:] = np.maximum(row[1:], (row[:-1] + 1) * (b_ids == ids[word]))
      row = np.maximum.accumulate(row)
  return int(row[-1])
