# SPDX-License-Identifier: Apache-2.0
"""Shares, completeness and repeatability of the plan, on lengths alone."""

import collections
import json

import numpy as np
import pytest

from mm1_jax.config import ConfigError, DataConfig, SourceConfig
from mm1_jax.data.index import Index
from mm1_jax.data.plan import Plan, WindowState, check_fingerprint, fingerprint, plan_once

IMAGE = 18  # positions of a picture
WEIGHTS = {"captions": 45.0, "interleaved": 45.0, "text": 10.0}


def make_index(lengths, images, splittable=True) -> Index:
  """Pictures stand one after another behind the first position."""
  starts = [[1 + IMAGE * i for i in range(n)] for n in images]
  return Index(
    records=np.arange(len(lengths)),
    num_positions=np.array(lengths, np.int32),
    splittable=np.full(len(lengths), splittable),
    image_starts=np.array([s for image in starts for s in image], np.int32),
    image_offsets=np.cumsum([0, *images]),
    drops=collections.Counter(),
  )


@pytest.fixture
def indexes():
  rng = np.random.default_rng(0)
  captions = rng.integers(30, 110, 900)
  interleaved = rng.integers(200, 3000, 150)
  text = rng.integers(300, 8000, 60)
  return [
    make_index(captions, [1] * len(captions)),
    make_index(interleaved, rng.integers(0, 6, len(interleaved)).tolist()),
    make_index(text, [0] * len(text)),
  ]


def make_data(**changes) -> DataConfig:
  values = {
    "sources": tuple(SourceConfig(name=n, path="", weight=w) for n, w in WEIGHTS.items()),
    "seq_len": 512,
    "batch_size": 16,
    "images_per_row": 5,
    "window_rows": 64,
  }
  return DataConfig(**{**values, **changes})


def windows(plan: Plan, num: int, state: WindowState | None = None):
  """Returns the rows of `num` windows, one after another, and the state behind them."""
  state = state or plan.first_state
  rows = []
  for _ in range(num):
    more, state = plan.window(state)
    rows += more
  return rows, state


def test_shares_are_shares_of_positions(indexes):
  rows, _ = windows(Plan(make_data(), indexes, IMAGE), 10)
  positions = np.zeros(3)
  for piece in (piece for row in rows for piece in row):
    positions[piece.source] += piece.stop - piece.start
  np.testing.assert_allclose(positions / positions.sum(), [0.45, 0.45, 0.10], atol=0.01)
  assert positions.sum() / (len(rows) * 512) > 0.98


def test_nothing_is_lost_or_doubled(indexes):
  """Each example drawn is, from its first position on, in rows or waiting."""
  plan = Plan(make_data(images_per_row=4), indexes, IMAGE)
  rows, state = windows(plan, 12)
  placed = collections.Counter()
  for source, example, start, stop in (piece for row in rows for piece in row):
    placed[source, example] += stop - start
  for source, example, start in state.carried:
    placed[source, example] += indexes[source].num_positions[example] - start
  for source, index in enumerate(indexes):
    epochs, rest = divmod(state.cursors[source], len(index))
    times = [placed[source, e] / index.num_positions[e] for e in range(len(index))]
    assert collections.Counter(times) == {epochs + 1: rest, epochs: len(index) - rest} or not rest
  assert sum(placed.values()) == sum(state.drawn)


def test_what_waits_stays_little(indexes):
  plan = Plan(make_data(images_per_row=4), indexes, IMAGE)
  state, most = plan.first_state, 0
  for _ in range(30):
    _, state = plan.window(state)
    waiting = sum(indexes[s].num_positions[e] - start for s, e, start in state.carried)
    most = max(most, waiting / (64 * 512))
  assert most < 0.6  # the surplus, a document, and what the slots hold up


def test_starting_at_a_window_is_the_same(indexes):
  plan = Plan(make_data(), indexes, IMAGE)
  all_rows, _ = windows(plan, 5)
  first, state = windows(plan, 2)
  state = WindowState.from_dict(json.loads(json.dumps(state.to_dict())))
  rest, _ = windows(Plan(make_data(), indexes, IMAGE), 3, state)
  assert first + rest == all_rows


def test_epochs_differ_and_so_do_seeds(indexes):
  def order(seed):
    data = make_data(sources=make_data().sources[:1], seed=seed, images_per_row=10)
    rows, _ = windows(Plan(data, indexes[:1], IMAGE), 6)
    return [piece.example for row in rows for piece in row]

  assert order(0) == order(0)
  assert order(0) != order(1)
  seen = order(0)
  assert seen[:800] != seen[900:1700]


def test_a_source_keeps_its_order_in_another_mixture(indexes):
  alone = Plan(make_data(sources=make_data().sources[2:]), indexes[2:], IMAGE)
  mixed = Plan(make_data(), indexes, IMAGE)
  assert [alone._orders[0][i] for i in range(99)] == [mixed._orders[2][i] for i in range(99)]


@pytest.mark.parametrize(("batch_size", "per_window"), [(64, 1), (48, 2), (100, 1), (1, 64)])
def test_a_window_is_whole_batches(indexes, batch_size, per_window):
  plan = Plan(make_data(batch_size=batch_size), indexes, IMAGE)
  rows, _ = plan.window(plan.first_state)
  assert plan.batches_per_window == per_window
  assert len(rows) == per_window * batch_size


def test_plan_once_covers_all_in_order(indexes):
  for index in indexes:
    rows = plan_once(index, make_data(window_rows=8), IMAGE)
    reached = collections.Counter()
    for _, example, start, stop in (piece for row in rows for piece in row):
      assert reached[example] == start
      reached[example] = stop
    assert [reached[e] for e in range(len(index))] == index.num_positions.tolist()
    assert rows[0][0].example < 50


def test_changed_data_is_told(indexes):
  then = fingerprint(make_data(), IMAGE, indexes)
  check_fingerprint(json.loads(json.dumps(then)), then)
  now = fingerprint(make_data(seq_len=256), IMAGE, indexes)
  with pytest.raises(ConfigError, match=r"other data .seq_len: 512 then, 256 now"):
    check_fingerprint(then, now)
