# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from mm1_jax.data.build.official_rows import box
from mm1_jax.eval.metrics import boxes


@pytest.mark.parametrize(
  ("answer", "found"),
  [
    ("<100,200,300,400>", [[0.1, 0.2, 0.3, 0.4]]),
    ("a dog <0,0,1,1> and <1,2,3,999>", [[0, 0, 0.001, 0.001], [0.001, 0.002, 0.003, 0.999]]),
    ("It is at [0.1, 0.20, 0.3,0.4].", [[0.1, 0.2, 0.3, 0.4]]),
    ("[0, 0, 1, 1]", [[0, 0, 1, 1]]),
    ("[100, 200, 300, 1000]", [[0.1, 0.2, 0.3, 1]]),
    ("(100,200),(300,400)", [[0.1, 0.2, 0.3, 0.4]]),
    ("<loc0512><loc0256><loc1023><loc0768> cat", [[0.25, 0.5, 0.75, 1023 / 1024]]),
    ("[10, 20, 1300, 40] <-5,0,1,2> <1,2,3> [1,2,3,4,5]", []),
    ("", []),
  ],
)
def test_boxes_of_every_form(answer, found):
  assert boxes.parse_boxes(answer).tolist() == found
  assert boxes.parse_boxes(answer).shape == (len(found), 4)


def test_our_own_boxes_come_back():
  text = box(64, 48, 320, 240, 640, 480)
  np.testing.assert_allclose(boxes.parse_boxes(text), [[0.1, 0.1, 0.5, 0.5]], atol=1e-3)


def test_iou():
  unit = np.array([0, 0, 1, 1])
  others = np.array([[0, 0, 1, 1], [0.5, 0, 1.5, 1], [2, 2, 3, 3], [0, 0, 0, 0], [1, 1, 0, 0]])
  np.testing.assert_allclose(boxes.iou(unit, others), [1, 1 / 3, 0, 0, 0])


def test_refcoco_takes_the_first_box_at_one_half():
  truth = np.array([0, 0, 0.5, 1])
  assert boxes.refcoco("<0,0,1000,1000>", truth) == 1  # exactly 0.5
  assert boxes.refcoco("<0,0,1000,999> <0,0,500,1000>", np.array([0, 0, 0.4, 1])) == 0
  assert boxes.refcoco("left", truth) == 0


def test_grounding_by_either_protocol():
  men = np.array([[0, 0, 0.2, 1], [0.8, 0, 1, 1]])
  assert boxes.grounding("<0,0,200,1000>", men) == 1
  assert boxes.grounding("<0,0,200,1000>", men, "merged") == 0
  assert boxes.grounding("<0,0,1000,1000>", men) == 0
  assert boxes.grounding("<0,0,1000,1000>", men, "merged") == 1
  assert boxes.grounding("<500,0,600,1000> <0,0,200,1000>", men) == 0
  assert boxes.grounding("<500,0,600,1000> <0,0,200,1000>", men, k=2) == 1
  with pytest.raises(ValueError, match="without boxes"):
    boxes.grounding("", np.zeros((0, 4)))
  with pytest.raises(ValueError, match="'all'"):
    boxes.grounding("", men, "all")
