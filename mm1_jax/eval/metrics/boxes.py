# SPDX-License-Identifier: Apache-2.0
"""Boxes in answers, and how far they cover the true ones: RefCOCO, Flickr30k grounding.

A box is (left, top, right, bottom) in shares of the picture's width and height.
"""

import re
from collections.abc import Sequence

import numpy as np

from mm1_jax.eval.metrics.limits import cut

_N = r"\s*(-?\d{1,9}(?:\.\d{0,9})?)\s*"
_FORMS = re.compile(
  rf"<{_N},{_N},{_N},{_N}>"  # thousandths: this project's, MM1.5's
  rf"|\({_N},{_N}\)\s*,\s*\({_N},{_N}\)"  # thousandths: Qwen-VL's
  rf"|[\[(]{_N},{_N},{_N},{_N}[\])]"  # shares; thousandths if a number is above 1
  r"|<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>",  # PaliGemma's: y, x, y, x of 1024
  re.ASCII,
)


def parse_boxes(answer: str) -> np.ndarray:
  """Returns the boxes of an answer in order, float64[boxes, 4].

  Forms: `<x1,y1,x2,y2>` and `(x1,y1),(x2,y2)` in thousandths, `[x1, y1, x2, y2]` in shares or in
  thousandths, `<locY1><locX1><locY2><locX2>` in 1024ths. Digits are ASCII's. Numbers beyond a
  thousand are pixels, which need the picture's size: such boxes are left out, as are those of
  negative numbers. Only the first `limits.LONGEST` characters are read.
  """
  found = []
  for match in _FORMS.finditer(cut(answer)):
    groups = match.groups()
    form = next(i for i in range(4) if groups[4 * i] is not None)
    numbers = np.array([float(number) for number in groups[4 * form : 4 * form + 4]])
    if form == 3:
      numbers = numbers[[1, 0, 3, 2]] / 1024
    elif form != 2 or np.max(numbers) > 1:
      numbers = numbers / 1000
    if np.all((numbers >= 0) & (numbers <= 1)):
      found.append(numbers)
  return np.array(found).reshape(-1, 4)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns intersection over union of boxes, [..., 4] and [..., 4] to [...]; 0 without area."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
  common = np.prod(np.maximum(high - low, 0), axis=-1)
  areas = [np.prod(np.maximum(box[..., 2:] - box[..., :2], 0), axis=-1) for box in (a, b)]
  union = areas[0] + areas[1] - common
  return np.divide(common, union, out=np.zeros_like(union), where=union > 0)


def refcoco(answer: str, truth: np.ndarray, threshold: float = 0.5) -> float:
  """Returns 1.0 if the answer's first box has this IoU with the true one, or more; else 0.0."""
  boxes = parse_boxes(answer)
  return float(len(boxes) > 0 and iou(boxes[0], truth) >= threshold)


def grounding(
  answer: str, truths: Sequence[np.ndarray] | np.ndarray, protocol: str = "any", k: int = 1
) -> float:
  """Returns 1.0 if one of the answer's first k boxes has IoU 0.5 with the phrase's box; else 0.0.

  The mean over phrases is Flickr30k Entities' recall at k.

  Args:
    answer: for one phrase.
    truths: the phrase's boxes, [boxes, 4].
    protocol: "any", one of them is enough; "merged", the box around all of them is the true one.
    k: how many boxes of the answer count.

  Raises:
    ValueError: the phrase has no boxes (such phrases are not scored), or an unknown protocol.
  """
  true = np.asarray(truths, np.float64).reshape(-1, 4)
  if not len(true):
    raise ValueError("a phrase without boxes is not scored")
  if protocol == "merged":
    true = np.concatenate([np.min(true[:, :2], axis=0), np.max(true[:, 2:], axis=0)])[None]
  elif protocol != "any":
    raise ValueError(f"protocol is {protocol!r}, not any or merged")
  boxes = parse_boxes(answer)[:k]
  return float(np.any(iou(boxes[:, None], true[None]) >= 0.5))
