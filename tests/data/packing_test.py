# SPDX-License-Identifier: Apache-2.0
"""Rows hold what fits, every part once, and are laid out as written here by hand."""

import numpy as np
import pytest

from mm1_jax.data.examples import Example, Span
from mm1_jax.data.packing import (
  Item,
  ItemSpan,
  Packing,
  RowShape,
  Segment,
  assemble,
  furthest_cut,
  next_cut,
  pack,
  stack,
)

IMAGE = 4  # positions of a picture


def whole(num_positions: int, num_images: int = 0) -> Item:
  """A caption, or a conversation."""
  return Item(num_positions, [IMAGE * i for i in range(num_images)], [])


def text(num_positions: int) -> Item:
  return Item(num_positions, [], None)


def document(num_positions: int, *image_starts: int) -> Item:
  """May be cut in front of pictures; of some in a row, in front of the first."""
  ends = [0, *(start + IMAGE for start in image_starts)]
  cuts = [start for start, end in zip(image_starts, ends, strict=False) if start != end]
  return Item(num_positions, list(image_starts), cuts)


def check(packing: Packing, items, shape: RowShape) -> None:
  """Checks that parts are complete, fit their rows, and end where they may."""
  parts = [[] for _ in items]
  for row in packing.rows:
    assert sum(p.stop - p.start for p in row) <= shape.seq_len
    images = 0
    for part in row:
      assert part.start < part.stop
      parts[part.item].append((part.start, part.stop))
      for start in items[part.item].image_starts:
        overlap = min(part.stop, start + IMAGE) - max(part.start, start)
        assert overlap <= 0 or overlap == IMAGE
        images += overlap == IMAGE
    assert images <= shape.images_per_row
  left = dict(packing.left)
  for i, (item, of_item) in enumerate(zip(items, parts, strict=True)):
    of_item.sort()
    end = left.get(i, item.num_positions)
    assert [a for a, _ in of_item] + [end] == [0] + [b for _, b in of_item]
    if item.cuts is None:
      continue
    allowed = [0, *item.cuts, item.num_positions]
    for _, stop in of_item:
      if stop not in allowed:  # then no row could hold the positions between the cuts around it
        before = max(cut for cut in allowed if cut < stop)
        after = next_cut(item, stop)
        images = sum(before <= start < after for start in item.image_starts)
        assert after - before > shape.seq_len or images > shape.images_per_row


@pytest.mark.parametrize(
  ("start", "max_positions", "max_images", "stop"),
  [
    (0, 100, 9, 60),  # all of it
    (0, 59, 9, 30),  # in front of the third picture
    (0, 29, 9, 10),  # of the first two, in front of the first
    (0, 10, 9, 10),
    (0, 9, 9, 0),  # not in its first text, which another row could hold
    (0, 100, 2, 30),  # two pictures only
    (0, 100, 1, 10),  # one picture only: its text would be in another row
    (0, 100, 0, 10),
    (10, 100, 1, 10),  # nothing fits
    (10, 19, 9, 10),
    (10, 20, 9, 30),
    (30, 100, 1, 60),
    (34, 100, 0, 60),
    (34, 20, 9, 34),
  ],
)
def test_furthest_cut(start, max_positions, max_images, stop):
  item, shape = document(60, 10, 14, 30), RowShape(40, 5, IMAGE)
  assert furthest_cut(item, start, max_positions, max_images, shape) == stop


@pytest.mark.parametrize(
  ("start", "max_positions", "max_images", "stop"),
  [
    (0, 12, 9, 12),  # no row holds the first text: cut there
    (0, 29, 9, 29),
    (30, 100, 2, 38),  # nor four pictures: cut between them
    (30, 11, 2, 38),
    (30, 6, 2, 34),  # not through one
    (30, 3, 2, 30),
    (46, 100, 9, 60),
  ],
)
def test_what_no_row_holds_is_cut_where_it_must(start, max_positions, max_images, stop):
  item, shape = document(60, 30, 34, 38, 42), RowShape(20, 2, IMAGE)
  assert furthest_cut(item, start, max_positions, max_images, shape) == stop


def test_a_text_is_cut_anywhere():
  assert furthest_cut(text(60), 13, 20, 0, RowShape(40, 0, IMAGE)) == 33


def test_conversations_are_put_where_they_leave_least_room():
  items, shape = [whole(n) for n in (3, 6, 5, 4, 3)], RowShape(10, 0, IMAGE)
  packing = pack(items, 2, shape)
  check(packing, items, shape)
  assert packing == Packing(
    [[ItemSpan(1, 0, 6), ItemSpan(3, 0, 4)], [ItemSpan(2, 0, 5), ItemSpan(0, 0, 3)]], [(4, 0)]
  )


def test_a_row_is_finished_by_what_fits_best():
  items, shape = [whole(n, 1) for n in (20, 24, 22, 21, 23)], RowShape(90, 4, IMAGE)
  packing = pack(items, 1, shape)
  check(packing, items, shape)
  assert sum(p.stop for p in packing.rows[0]) == 90  # 24 + 23 + 22 + 21
  assert packing.left == [(0, 0)]


def test_image_slots_bound_a_row_too():
  items, shape = [whole(5, 1)] * 5, RowShape(100, 2, IMAGE)
  packing = pack(items, 2, shape)
  check(packing, items, shape)
  assert [len(row) for row in packing.rows] == [2, 2]
  assert packing.left == [(4, 0)]


def test_documents_fill_what_captions_leave():
  items, shape = [*[whole(20, 1)] * 8, text(240)], RowShape(100, 2, IMAGE)
  packing = pack(items, 4, shape)
  check(packing, items, shape)
  for row in packing.rows:  # two captions and 60 positions of the text in each
    assert sum(p.stop - p.start for p in row) == 100
    assert sum(p.item < 8 for p in row) == 2
  assert packing.left == []


def test_short_captions_are_put_where_positions_are_scarce():
  """The longer document leaves its row few positions for as many slots."""
  captions = [whole(n, 1) for n in np.random.default_rng(0).integers(10, 110, 60).tolist()]
  items, shape = [whole(1450, 1), whole(1150, 1), *captions], RowShape(2000, 12, IMAGE)
  packing = pack(items, 2, shape)
  check(packing, items, shape)
  mean = {}
  for row in packing.rows:
    assert sum(p.stop - p.start for p in row) > 0.98 * 2000
    mean[row[0].item] = np.mean([p.stop for p in row[1:]])
  assert mean[0] < 0.9 * mean[1]


def test_a_document_continues_in_another_row():
  items, shape = [document(100, 50, 54)], RowShape(60, 2, IMAGE)
  packing = pack(items, 2, shape)
  check(packing, items, shape)
  assert packing.rows == [[ItemSpan(0, 0, 50)], [ItemSpan(0, 50, 100)]]


@pytest.mark.parametrize("seed", range(40))
def test_random_pools(seed):
  rng = np.random.default_rng(seed)
  shape = RowShape(64, int(rng.integers(1, 5)), IMAGE)
  items = []
  for _ in range(60):
    kind = rng.integers(3)
    if kind == 0:
      num_images = int(rng.integers(0, shape.images_per_row + 1))
      items.append(whole(int(rng.integers(IMAGE * shape.images_per_row, 40)), num_images))
    elif kind == 1:
      items.append(text(int(rng.integers(1, 150))))
    else:
      starts = np.cumsum(rng.integers(IMAGE, 40, rng.integers(0, 6))) - IMAGE
      end = int(starts[-1]) + IMAGE if len(starts) else 0
      items.append(document(end + int(rng.integers(1, 80)), *starts.tolist()))
  packing = pack(items, 16, shape)
  check(packing, items, shape)
  assert packing == pack(items, 16, shape)
  assert packing.left  # there was more than room
  more = pack(items, 200, shape)
  check(more, items, shape)
  assert more.left == []  # there is room for all


def test_assemble_and_stack():
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
  pictures = np.array([7, 9], np.uint8)[None, :, None, None, None] * np.ones((2, 3, 3), np.uint8)
  shape = {"seq_len": 10, "images_per_row": 2, "pad_id": 0}
  full = assemble([Segment(1, text), Segment(2, caption)], pictures, **shape)
  assert full.images is pictures
  batch = stack([full, assemble([], pictures[:, :0], **shape)])
  empty = [0] * 10
  assert batch.tokens.tolist() == [[1, 30, 1, 5, 4, 4, 6, 20, 0, 0], empty]
  assert batch.targets.tolist() == [[30, 2, 5, 4, 4, 6, 20, 2, 0, 0], empty]
  assert batch.loss_mask.tolist() == [[1, 1, 0, 0, 0, 0, 1, 1, 0, 0], empty]
  assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5, 0, 0], empty]
  assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 2, 2, 2, 0, 0], empty]
  assert batch.source_ids.tolist() == [[1, 1, 2, 2, 2, 2, 2, 2, 0, 0], empty]
  assert batch.image_mask.tolist() == [[True, False], [False, False]]
  assert batch.images.shape == (2, 2, 2, 3, 3)
  assert (batch.images[0, 0] == 7).all()
  assert not batch.images[0, 1].any()  # `pictures` has one more than the examples
  assert not batch.images[1].any()
  dtypes = ["int32", "int32", "float32", "int32", "int32", "int32", "uint8", "bool"]
  assert [str(x.dtype) for x in batch] == dtypes


def test_rows_of_one_array_are_stacked_without_a_copy():
  shape = {"seq_len": 4, "images_per_row": 2, "pad_id": 0}
  whole = np.zeros((2, 2, 1, 1, 3), np.uint8)
  rows = [assemble([], whole[i : i + 1], **shape) for i in range(2)]
  assert stack(rows).images is whole
  whole[1] = 7
  turned = stack(rows[::-1]).images  # in memory they are in another order
  assert turned is not whole
  assert not turned.any()  # no slot of them is used
