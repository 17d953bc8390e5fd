# SPDX-License-Identifier: Apache-2.0
"""Rows hold what fits, every part once, and are laid out as written here by hand."""

import numpy as np
import pytest

from mm1_jax.data.examples import Example, Span
from mm1_jax.data.packing import Item, Packing, Part, Segment, assemble, furthest_cut, pack

IMAGE = 4  # positions of a picture


def whole(num_positions: int, num_images: int = 0) -> Item:
  return Item(num_positions, [IMAGE * i for i in range(num_images)], False)


def document(num_positions: int, *image_starts: int) -> Item:
  return Item(num_positions, list(image_starts), True)


def do_pack(items, num_rows, seq_len, images_per_row, num_first=0) -> Packing:
  return pack(
    items,
    num_rows=num_rows,
    seq_len=seq_len,
    images_per_row=images_per_row,
    image_positions=IMAGE,
    num_first=num_first,
  )


def check(packing: Packing, items, seq_len, images_per_row) -> None:
  """Checks that parts are in order and complete, fit their rows, and cut no picture."""
  reached = [0] * len(items)
  for row in packing.rows:
    assert sum(p.stop - p.start for p in row) <= seq_len
    images = 0
    for part in row:
      assert part.start == reached[part.item] < part.stop
      reached[part.item] = part.stop
      item = items[part.item]
      for start in item.image_starts:
        overlap = min(part.stop, start + IMAGE) - max(part.start, start)
        assert overlap <= 0 or overlap == IMAGE
        images += overlap == IMAGE
      assert item.splittable or part == (part.item, 0, item.num_positions)
    assert images <= images_per_row
  left = dict(packing.left)
  assert [left.get(i, item.num_positions) for i, item in enumerate(items)] == reached


@pytest.mark.parametrize(
  ("start", "max_positions", "max_images", "stop"),
  [
    (0, 100, 9, 30),  # all of it
    (0, 7, 9, 7),  # in the text before the pictures
    (0, 10, 9, 10),  # just before the first picture
    (0, 12, 9, 10),  # not through it
    (0, 14, 9, 14),  # between the two
    (0, 17, 9, 14),  # not through the second
    (0, 18, 9, 18),
    (0, 100, 1, 14),  # one picture only
    (0, 100, 0, 10),
    (10, 100, 0, 10),  # nowhere to go
    (10, 3, 9, 10),
    (14, 100, 1, 30),
    (18, 5, 0, 23),
  ],
)
def test_furthest_cut(start, max_positions, max_images, stop):
  item = document(30, 10, 14)
  assert furthest_cut(item, start, max_positions, max_images, IMAGE) == stop


def test_whole_items_go_where_they_leave_least_room():
  items = [whole(3), whole(6), whole(5), whole(4), whole(2)]
  packing = do_pack(items, num_rows=2, seq_len=10, images_per_row=0)
  check(packing, items, 10, 0)
  assert packing == Packing(
    [[Part(1, 0, 6), Part(3, 0, 4)], [Part(2, 0, 5), Part(0, 0, 3), Part(4, 0, 2)]], []
  )


def test_image_slots_bound_a_row_too():
  items = [whole(5, 1)] * 5
  packing = do_pack(items, num_rows=2, seq_len=100, images_per_row=2)
  check(packing, items, 100, 2)
  assert [len(row) for row in packing.rows] == [2, 2]
  assert packing.left == [(4, 0)]


def test_what_waited_goes_first():
  items = [whole(1), whole(10), whole(10)]
  packing = do_pack(items, num_rows=1, seq_len=10, images_per_row=0, num_first=1)
  assert packing == Packing([[Part(0, 0, 1)]], [(1, 0), (2, 0)])


def test_documents_fill_what_captions_leave():
  captions = [whole(20, 1)] * 8
  items = [*captions, document(240)]
  packing = do_pack(items, num_rows=4, seq_len=100, images_per_row=2)
  check(packing, items, 100, 2)
  for row in packing.rows:  # two captions and 60 positions of the document in each
    assert sum(p.stop - p.start for p in row) == 100
    assert sum(p.item < 8 for p in row) == 2
  assert packing.left == []


def test_a_document_stops_at_a_picture_without_slot():
  items = [document(100, 50, 54)]
  packing = do_pack(items, num_rows=2, seq_len=100, images_per_row=1)
  check(packing, items, 100, 1)
  assert packing.rows == [[Part(0, 0, 54)], [Part(0, 54, 100)]]


@pytest.mark.parametrize("seed", range(20))
def test_random_pools(seed):
  rng = np.random.default_rng(seed)
  seq_len, slots, num_rows = 64, int(rng.integers(1, 5)), 16
  items = []
  for _ in range(60):
    if rng.random() < 0.5:
      items.append(whole(int(rng.integers(IMAGE * slots, 40)), int(rng.integers(0, slots + 1))))
    else:
      starts = np.cumsum(rng.integers(IMAGE, 40, rng.integers(0, 6))) - IMAGE
      end = int(starts[-1]) + IMAGE if len(starts) else 0
      items.append(document(end + int(rng.integers(1, 80)), *starts.tolist()))
  packing = do_pack(items, num_rows, seq_len, slots, num_first=5)
  check(packing, items, seq_len, slots)
  assert packing == do_pack(items, num_rows, seq_len, slots, num_first=5)


def test_assemble():
  caption = Example(
    tokens=np.array([1, 5, 4, 4, 6, 20], np.int32),
    targets=np.array([5, 4, 4, 6, 20, 2], np.int32),
    loss_mask=np.array([0, 0, 0, 0, 1, 1], np.float32),
    images=(b"",),
    spans=(Span(1, 5),),
  )
  text = Example(
    tokens=np.array([1, 30], np.int32),
    targets=np.array([30, 2], np.int32),
    loss_mask=np.array([1, 1], np.float32),
    images=(),
    spans=(),
  )
  picture = np.full((2, 3, 3), 7, np.uint8)
  rows = [[Segment(1, text, []), Segment(2, caption, [picture])], []]
  batch = assemble(rows, seq_len=10, images_per_row=2, image_size=(2, 3), pad_id=0)
  empty = [0] * 10
  assert batch.tokens.tolist() == [[1, 30, 1, 5, 4, 4, 6, 20, 0, 0], empty]
  assert batch.targets.tolist() == [[30, 2, 5, 4, 4, 6, 20, 2, 0, 0], empty]
  assert batch.loss_mask.tolist() == [[1, 1, 0, 0, 0, 0, 1, 1, 0, 0], empty]
  assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5, 0, 0], empty]
  assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 2, 2, 2, 0, 0], empty]
  assert batch.source_ids.tolist() == [[1, 1, 2, 2, 2, 2, 2, 2, 0, 0], empty]
  assert batch.image_mask.tolist() == [[True, False], [False, False]]
  assert batch.images.shape == (2, 2, 2, 3, 3)
  np.testing.assert_array_equal(batch.images[0, 0], picture)
  assert not batch.images[0, 1].any()
  assert not batch.images[1].any()
  dtypes = ["int32", "int32", "float32", "int32", "int32", "int32", "uint8", "bool"]
  assert [str(x.dtype) for x in batch] == dtypes
