# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from mm1_jax.eval.metrics.captions import bleu, cider_d, ptb_tokenize, rouge_l

REFERENCES = [
  ["A man rides a wave.", "A surfer on a big wave."],
  ["Two dogs play in the snow.", "Dogs in snow."],
  ["A red bus on a street.", "The bus is red."],
]


@pytest.mark.parametrize(
  ("text", "tokens"),
  [
    ("A man's dog can't jump.", "a man 's dog ca n't jump"),
    ("(Left) \u201cquoted\u201d - text...", "-lrb- left -rrb- quoted text"),
    ("Mr. Smith, U.S. Army", "mr. smith u.s. army"),
    ("It costs $5.50 or 1,000 cannot", "it costs $ 5.50 or 1,000 can not"),
    ("a well-known 3-D T-shirt", "a well-known 3-d t-shirt"),
    ("Point A. The line", "point a the line"),
    ("John F. Kennedy", "john f. kennedy"),
    ("see x@y.com or http://a.b/c?d, I'd've", "see x@y.com or http://a.b/c?d i 'd 've"),
    ("5.6cm of 5cm, No. 5, no.", "5.6 cm of 5cm no. 5 no"),
    ("", ""),
    ("?!", "?!"),
    ("\x00\ud800\U0001f600 ok", "ok"),
  ],
)
def test_tokens(text, tokens):
  assert " ".join(ptb_tokenize(text)) == tokens


def test_cider_is_10_for_the_only_reference_and_0_for_other_words():
  references = [of_picture[:1] for of_picture in REFERENCES]
  right = cider_d([of_picture[0] for of_picture in references], references)
  np.testing.assert_allclose(right, 10)
  np.testing.assert_allclose(cider_d(["x y z"] * 3, references), 0)
  assert cider_d(["Two dogs play in the rain.", "", ""], REFERENCES)[0] < 0.1
  assert 3 < cider_d(["", "Two dogs play in the snow", ""], REFERENCES)[1] < 10


def test_a_caption_that_repeats_itself_earns_less():
  once, often = "A man rides a wave", "A man rides a wave " * 4
  both = [cider_d([caption, "", ""], REFERENCES)[0] for caption in (once, often)]
  assert both[1] < 0.3 * both[0]


def test_bleu_and_rouge_of_equal_and_empty_captions():
  references = [of_picture[:1] for of_picture in REFERENCES]
  same = [of_picture[0] for of_picture in references]
  assert bleu(same, references) == pytest.approx(1)
  np.testing.assert_allclose(rouge_l(same, references), 1)
  assert bleu([""] * 3, references) == 0
  np.testing.assert_allclose(rouge_l([""] * 3, references), 0)


def test_rouge_is_the_longest_common_subsequence():
  # "a man wave" of 3 and of 5 words: precision 1, recall 3/5
  expected = (1 + 1.44) * 1 * 0.6 / (0.6 + 1.44 * 1)
  assert rouge_l(["a man wave"], [["a man rides a wave"]])[0] == pytest.approx(expected)


@pytest.mark.parametrize("metric", [cider_d, bleu, rouge_l])
def test_bad_input_is_named(metric):
  with pytest.raises(ValueError, match="1 captions for the references of 2"):
    metric(["a"], [["a"], ["b"]])
  with pytest.raises(ValueError, match="without references"):
    metric(["a"], [[]])
  with pytest.raises(ValueError, match="0 captions"):
    metric([], [])
  with pytest.raises(ValueError, match="'moses', not one of"):
    metric(["a"], [["a"]], tokenizer="moses")
