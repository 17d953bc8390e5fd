# SPDX-License-Identifier: Apache-2.0
"""Shares, completeness and repeatability of what is mixed, on lengths alone."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from mm1_jax.config import ConfigError, DataConfig, ReweightConfig, SourceConfig
from mm1_jax.data import mixing
from mm1_jax.data.index import Index
from mm1_jax.data.mixing import Mixer, Order, WindowState, check_fingerprint, fingerprint, plan_once
from mm1_jax.data.planned import PlannedBatches
from mm1_jax.data.sources import DataError

IMAGE = 18  # positions of a picture
WEIGHTS = {"captions": 45.0, "interleaved": 45.0, "text": 10.0}


PATHS = {"captions": ["c-0", "c-1", "c-2"], "interleaved": ["i-0"], "text": ["t-0"]}
HASHES = [3 * "a1b2c3d4e5f6", "0123456789ab", "ba9876543210"]


def make_index(lengths, images, splittable=True) -> Index:
  """Pictures are one after another, after the first position."""
  starts = [[1 + IMAGE * i for i in range(n)] for n in images]
  return Index(
    records=np.arange(len(lengths)),
    num_positions=np.array(lengths, np.int32),
    splittable=np.full(len(lengths), splittable),
    breaks=np.array([s for image in starts for s in image], np.int32),
    is_image=np.ones(sum(images), bool),
    break_offsets=np.cumsum([0, *images]),
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
    "sources": tuple(SourceConfig(n, "x", w) for n, w in WEIGHTS.items()),
    "seq_len": 512,
    "batch_size": 16,
    "images_per_row": 5,
    "window_rows": 64,
  }
  return DataConfig(**{**values, **changes})


def windows(mixer: Mixer, num: int, state: WindowState | None = None):
  """Returns the rows of `num` windows, one after another, and the state after them."""
  state = state or mixer.first_state
  rows = []
  for _ in range(num):
    more, state = mixer.window(state)
    rows += more
  return rows, state


def test_shares_are_shares_of_positions(indexes):
  rows, _ = windows(Mixer(make_data(), indexes, IMAGE), 10)
  positions = np.zeros(3)
  for piece in (piece for row in rows for piece in row):
    positions[piece.source] += piece.stop - piece.start
  np.testing.assert_allclose(positions / positions.sum(), [0.45, 0.45, 0.10], atol=0.01)
  assert positions.sum() / (len(rows) * 512) > 0.98


def test_nothing_is_lost_or_doubled(indexes):
  """Each example drawn is, from its first position on, in rows or waiting."""
  mixer = Mixer(make_data(images_per_row=4), indexes, IMAGE)
  rows, state = windows(mixer, 12)
  placed = collections.Counter()
  for source, example, start, stop in (piece for row in rows for piece in row):
    placed[source, example] += stop - start
  for source, example, start in state.carried:
    placed[source, example] += indexes[source].num_positions[example] - start
  for source, index in enumerate(indexes):
    epochs, rest = divmod(state.cursors[source], len(index))
    times = [placed[source, e] / index.num_positions[e] for e in range(len(index))]
    assert collections.Counter(times) == {epochs + 1: rest, epochs: len(index) - rest} or not rest


def test_what_waits_stays_little(indexes):
  mixer = Mixer(make_data(images_per_row=4), indexes, IMAGE)
  state, most = mixer.first_state, 0
  for _ in range(30):
    _, state = mixer.window(state)
    waiting = sum(indexes[s].num_positions[e] - start for s, e, start in state.carried)
    most = max(most, waiting / (64 * 512))
  assert most < 0.6  # the surplus, a document, and what the slots hold up


def test_starting_at_a_window_is_the_same(indexes):
  mixer = Mixer(make_data(), indexes, IMAGE)
  all_rows, _ = windows(mixer, 5)
  first, state = windows(mixer, 2)
  state = WindowState.from_dict(json.loads(json.dumps(state.to_dict())))
  rest, _ = windows(Mixer(make_data(), indexes, IMAGE), 3, state)
  assert first + rest == all_rows


def test_epochs_differ_and_so_do_seeds(indexes):
  def order(seed):
    data = make_data(sources=make_data().sources[:1], seed=seed, images_per_row=10)
    rows, _ = windows(Mixer(data, indexes[:1], IMAGE), 6)
    return [piece.example for row in rows for piece in row]

  assert order(0) == order(0)
  assert order(0) != order(1)
  seen = order(0)
  assert seen[:800] != seen[900:1700]


def test_a_source_keeps_its_order_in_another_mixture(indexes):
  alone = Mixer(make_data(sources=make_data().sources[2:]), indexes[2:], IMAGE)
  mixed = Mixer(make_data(), indexes, IMAGE)
  assert [alone.orders[0][i] for i in range(99)] == [mixed.orders[2][i] for i in range(99)]


@pytest.mark.parametrize(("batch_size", "per_window"), [(64, 1), (48, 2), (100, 1), (1, 64)])
def test_a_window_is_whole_batches(indexes, batch_size, per_window):
  mixer = Mixer(make_data(batch_size=batch_size), indexes, IMAGE)
  rows, _ = mixer.window(mixer.first_state)
  assert len(rows) == per_window * batch_size


def test_plan_once_covers_all_about_in_order(indexes):
  for index in indexes:
    rows = plan_once(index, make_data(window_rows=8), IMAGE)
    parts = [[] for _ in range(len(index))]
    for _, example, start, stop in (piece for row in rows for piece in row):
      parts[example].append((start, stop))
    for of_example, end in zip(parts, index.num_positions.tolist(), strict=True):
      of_example.sort()
      assert [0, *(b for _, b in of_example)] == [*(a for a, _ in of_example), end]
    assert rows[0][0].example < 50


def test_changed_data_is_told(indexes):
  then = fingerprint(make_data(), IMAGE, indexes, HASHES)
  check_fingerprint(json.loads(json.dumps(then)), then, 0, PATHS)
  now = fingerprint(make_data(seq_len=256), IMAGE, indexes, HASHES)
  with pytest.raises(ConfigError, match=r"other data .seq_len: 512 then, 256 now"):
    check_fingerprint(then, now, 0, PATHS)


def test_replaced_shards_are_named(indexes):
  """All counts are equal: only the content of the second of three shards is another."""
  then = json.loads(json.dumps(fingerprint(make_data(), IMAGE, indexes, HASHES)))
  first, *others = HASHES
  now = fingerprint(make_data(), IMAGE, indexes, [first[:12] + 12 * "f" + first[24:], *others])
  with pytest.raises(ConfigError, match=r"source 'captions': c-1 had other content then\)"):
    check_fingerprint(then, now, 0, PATHS)
  now = fingerprint(make_data(), IMAGE, indexes, [12 * "e" + 24 * "f", *others])
  with pytest.raises(ConfigError, match="captions': c-0 and 2 more shards had other content then"):
    check_fingerprint(then, now, 0, PATHS)
  now = fingerprint(make_data(), IMAGE, indexes, [first[:24], *others])
  with pytest.raises(ConfigError, match="source 'captions' had 3 shards then, and has 2 now"):
    check_fingerprint(then, now, 0, PATHS)


def test_weights_of_later_steps_may_still_change(indexes):
  """Windows of 64 rows are 4 batches: the one that begins at 8 depends on no step after 11."""
  then, now = (
    fingerprint(make_data(reweight=(change(step, text=0.5),)), IMAGE, indexes, HASHES)
    for step in (12, 20)
  )
  check_fingerprint(json.loads(json.dumps(then)), now, 8, PATHS)
  with pytest.raises(ConfigError, match=r"reweight: \[\[12, \['text', 0.5\]\]\] then, \[\] now"):
    check_fingerprint(then, now, 9, PATHS)


# --- weights that change, groups, epochs and limits


def change(step: int, **weights: float) -> ReweightConfig:
  return ReweightConfig(step, tuple(weights.items()))


def positions_by_source(rows, num_sources: int = 3) -> np.ndarray:
  positions = np.zeros(num_sources)
  for piece in (piece for row in rows for piece in row):
    positions[piece.source] += piece.stop - piece.start
  return positions


def test_weights_change_at_their_step(indexes):
  """At step 10, which is in the middle of a window of 4 batches: that one ends there."""
  data = make_data(reweight=(change(10, captions=20, text=35), change(25, interleaved=0)))
  mixer = Mixer(data, indexes, IMAGE)
  batches, state, begins = [], mixer.first_state, []
  while state.batch < 45:
    begins.append(state.batch)
    rows, state = mixer.window(state)
    batches += [rows[i : i + 16] for i in range(0, len(rows), 16)]
  assert begins[:8] == [0, 4, 8, 10, 14, 18, 22, 25]

  def shares(steps: range) -> np.ndarray:
    positions = positions_by_source(row for step in steps for row in batches[step])
    return positions / positions.sum()

  np.testing.assert_allclose(shares(range(10)), [0.45, 0.45, 0.10], atol=0.05)
  np.testing.assert_allclose(shares(range(10, 14)), [0.20, 0.45, 0.35], atol=0.05)
  np.testing.assert_allclose(shares(range(10, 25)), [0.20, 0.45, 0.35], atol=0.02)
  assert shares(range(25, 45))[1] == 0  # not even what was drawn before
  np.testing.assert_allclose(shares(range(25, 45)), [20 / 55, 0, 35 / 55], atol=0.02)


def test_what_waits_at_weight_0_is_drawn_later(indexes):
  data = make_data(reweight=(change(4, interleaved=0), change(8, interleaved=45)))
  _, state = windows(Mixer(data, indexes, IMAGE), 1)
  waited = [rest for rest in state.carried if rest.source == 1]
  assert waited
  more, state = windows(Mixer(data, indexes, IMAGE), 1, state)
  assert [rest for rest in state.carried if rest.source == 1] == waited
  last, _ = windows(Mixer(data, indexes, IMAGE), 1, state)
  assert {rest.example for rest in waited} <= {p.example for row in last for p in row}
  assert positions_by_source(more)[1] == 0


def test_shares_of_groups(indexes):
  """Captions are 45%, of which a tenth are of the second kind."""
  kinds = SourceConfig("web", "x", 9), SourceConfig("synthetic", "x", 1)
  sources = SourceConfig("captions", weight=0.45, sources=kinds), SourceConfig("text", "x", 0.55)
  data = make_data(sources=sources)
  assert [source.name for source in data.leaves] == ["captions/web", "captions/synthetic", "text"]
  rows, _ = windows(Mixer(data, [indexes[0], indexes[0], indexes[2]], IMAGE), 10)
  positions = positions_by_source(rows)
  np.testing.assert_allclose(positions / positions.sum(), [0.405, 0.045, 0.55], atol=0.01)


def test_a_source_that_is_used_up_leaves_the_others_their_proportions(indexes):
  captions, *others = make_data().sources
  sources = dataclasses.replace(captions, epochs=1.5), *others
  mixer = Mixer(make_data(sources=sources), indexes, IMAGE)
  rows, state = windows(mixer, 15)
  seen = collections.Counter(p.example for row in rows for p in row if p.source == 0)
  seen.update(rest.example for rest in state.carried if rest.source == 0)
  assert collections.Counter(seen.values()) == {2: 450, 1: 450}  # 1.5 epochs of 900
  assert state.cursors[0] == 1350
  more = positions_by_source(windows(mixer, 8, state)[0])
  assert more[0] < 0.01 * more.sum()  # what was left over
  np.testing.assert_allclose(more / more.sum(), [0, 45 / 55, 10 / 55], atol=0.02)


def test_the_end_of_all_data_is_told_with_its_step(indexes):
  """Batches are given as long as they can be filled."""
  sources = tuple(dataclasses.replace(s, epochs=1) for s in make_data().sources[:1])
  mixer = Mixer(make_data(sources=sources, images_per_row=28), indexes[:1], IMAGE)
  rows, state = windows(mixer, 3)  # of 4 batches, but there is less
  assert state.batch < 12
  assert len(rows) == 16 * state.batch
  left = indexes[0].num_positions.sum() - positions_by_source(rows, 1).sum()
  assert left < 16 * 512
  with pytest.raises(DataError, match=f"data ends at step {state.batch}: .*train.num_steps to"):
    mixer.window(state)


def test_a_limit_picks_examples_at_random_and_keeps_them(indexes):
  def picked(epoch: int, **changes) -> list[int]:
    source = SourceConfig("text", "x", limit=20, **changes)
    order = Order(source, num_examples=1000, seed=0)
    return [order[epoch * 20 + i] for i in range(20)]

  assert len(set(picked(0))) == 20
  assert max(picked(0)) > 500
  assert set(picked(0)) == set(picked(1))
  assert picked(0) != picked(1)
  assert set(picked(0)) != set(picked(0, seed=1))


def test_an_order_is_of_each_example_once_an_epoch():
  order = Order(SourceConfig("text", "x"), num_examples=100, seed=0)
  first, second = ([order[e * 100 + i] for i in range(100)] for e in (0, 1))
  assert sorted(first) == sorted(second) == list(range(100))
  assert first != second
  assert (
    Order(SourceConfig("text", "x", limit=500), 100, 0)[7] == first[7]
  )  # no more than there are


def test_huge_sources_cost_no_more():
  order = Order(SourceConfig("web", "x"), num_examples=4_000_000_000, seed=0)
  assert 0 <= order[10_000_000_000] < 4_000_000_000


# --- weights of examples


def examples_by_source(rows, indexes) -> np.ndarray:
  """Returns how many examples of each source are in rows; of one that is cut, its share."""
  examples = np.zeros(len(indexes))
  for source, example, start, stop in (piece for row in rows for piece in row):
    examples[source] += (stop - start) / indexes[source].num_positions[example]
  return examples


def example_shares(rows, indexes) -> np.ndarray:
  examples = examples_by_source(rows, indexes)
  return examples / examples.sum()


def conversations(mean: int, num: int = 2000, seed: int = 0) -> Index:
  """Lengths vary threefold around their mean; each has a picture."""
  lengths = np.random.default_rng(seed).integers(mean // 2, mean * 3 // 2, num)
  return make_index(lengths, [1] * num, splittable=False)


@pytest.mark.parametrize("packing", ["joint", "per_source"])
def test_weights_may_be_shares_of_examples(packing):
  """Where lengths differ tenfold, shares of positions are quite others."""
  indexes = [conversations(n, seed=n) for n in (40, 120, 400)]
  weights = {"short": 2.0, "middle": 5.0, "long": 3.0}
  sources = tuple(SourceConfig(n, "x", w) for n, w in weights.items())
  data = make_data(sources=sources, packing=packing, images_per_row=12, weight_by="examples")
  mixer = Mixer(data, indexes, IMAGE)
  rows, _ = windows(mixer, 20)
  np.testing.assert_allclose(example_shares(rows, indexes), [0.2, 0.5, 0.3], atol=0.01)
  positions = positions_by_source(rows)
  expected = np.array([0.2 * 40, 0.5 * 120, 0.3 * 400])
  np.testing.assert_allclose(positions / positions.sum(), expected / expected.sum(), atol=0.01)
  assert mixer.example_shares(0) == data.shares(0) == (0.2, 0.5, 0.3)


def test_documents_that_are_cut_are_one_example_each(indexes):
  rows, _ = windows(Mixer(make_data(weight_by="examples"), indexes, IMAGE), 120)
  np.testing.assert_allclose(example_shares(rows, indexes), [0.45, 0.45, 0.10], atol=0.005)


def test_shares_of_positions_and_of_examples_are_told_in_either_mode(indexes):
  means = np.array([index.num_positions.mean() for index in indexes])
  mixer = Mixer(make_data(), indexes, IMAGE)
  assert mixer.shares(0) == make_data().shares(0)
  expected = np.array([0.45, 0.45, 0.10]) / means
  assert mixer.example_shares(0) == pytest.approx(expected / expected.sum())
  by_examples = dict(zip(WEIGHTS, mixer.example_shares(0), strict=True))
  sources = tuple(SourceConfig(n, "x", w) for n, w in by_examples.items())
  other = Mixer(make_data(sources=sources, weight_by="examples"), indexes, IMAGE)
  assert other.shares(0) == pytest.approx(mixer.shares(0))
  assert other.expected_images(0) == pytest.approx(mixer.expected_images(0))


def test_a_groups_weight_is_shared_by_examples_too():
  kinds = SourceConfig("qa", "x", 9), SourceConfig("captions", "x", 1)
  sources = SourceConfig("single", weight=0.6, sources=kinds), SourceConfig("text", "x", 0.4)
  indexes = [conversations(n, seed=n) for n in (40, 120, 400)]
  data = make_data(sources=sources, images_per_row=12, weight_by="examples")
  rows, _ = windows(Mixer(data, indexes, IMAGE), 20)
  np.testing.assert_allclose(example_shares(rows, indexes), [0.54, 0.06, 0.4], atol=0.01)


def test_the_mean_length_is_of_the_examples_that_a_limit_picks():
  """Of 1000 a fiftieth are long; which of them are among the 20 picked decides."""
  lengths = np.where(np.arange(1000) % 50, 30, 500)
  indexes = [make_index(lengths, [1] * 1000, splittable=False), conversations(100)]
  sources = SourceConfig("few", "x", limit=20), SourceConfig("all", "x")
  data = make_data(sources=sources, images_per_row=12, weight_by="examples")
  mixer = Mixer(data, indexes, IMAGE)
  picked = [mixer.orders[0][i] for i in range(20)]
  assert mixer.mean_lengths[0] == lengths[picked].mean() != lengths.mean()
  rows, _ = windows(mixer, 6)
  np.testing.assert_allclose(example_shares(rows, indexes), [0.5, 0.5], atol=0.01)


def test_the_mean_length_of_a_large_limit_is_estimated(monkeypatch):
  monkeypatch.setattr(mixing, "MAX_MEASURED", 500)
  lengths = np.random.default_rng(0).integers(50, 150, 2000)
  order = Order(SourceConfig("a", "x", limit=1500), num_examples=2000, seed=0)
  assert order.measure(lengths) == pytest.approx(100, rel=0.03)
  assert order.measure(lengths) == lengths[[order[i] for i in range(500)]].mean()


def test_weights_of_examples_change_at_their_step_and_when_a_source_is_used_up():
  indexes = [conversations(n, seed=n) for n in (40, 120, 400)]
  sources = tuple(SourceConfig(n, "x", 1.0) for n in ("short", "middle", "long"))
  sources = (dataclasses.replace(sources[0], epochs=1), *sources[1:])
  changes = (change(20, middle=2.0),)
  data = make_data(sources=sources, reweight=changes, images_per_row=12, weight_by="examples")
  mixer = Mixer(data, indexes, IMAGE)
  parts, state = [], mixer.first_state
  while state.batch < 240:
    begin = state.batch
    rows, state = mixer.window(state)
    parts.append((begin, rows, state.cursors[0] >= 2000))
  first = [row for begin, rows, _ in parts for row in rows if begin < 20]
  then = [row for begin, rows, used in parts for row in rows if begin >= 20 and not used]
  last = [row for begin, rows, used in parts[-15:] for row in rows if used]
  np.testing.assert_allclose(example_shares(first, indexes), [1 / 3] * 3, atol=0.03)
  np.testing.assert_allclose(example_shares(then, indexes), [0.25, 0.5, 0.25], atol=0.02)
  np.testing.assert_allclose(example_shares(last, indexes), [0, 2 / 3, 1 / 3], atol=0.02)


def test_going_on_with_weights_of_examples_is_exact(indexes):
  def mixer() -> Mixer:
    return Mixer(make_data(weight_by="examples"), indexes, IMAGE)

  all_rows, _ = windows(mixer(), 5)
  first, state = windows(mixer(), 2)
  state = WindowState.from_dict(json.loads(json.dumps(state.to_dict())))
  rest, _ = windows(mixer(), 3, state)
  assert first + rest == all_rows
  assert all_rows != windows(Mixer(make_data(), indexes, IMAGE), 5)[0]


def test_what_weights_are_shares_of_is_told_when_it_changes(indexes):
  positions, examples = (
    fingerprint(make_data(weight_by=kind), IMAGE, indexes, HASHES)
    for kind in ("positions", "examples")
  )
  for then, now in ((positions, examples), (examples, positions)):
    with pytest.raises(ConfigError, match=r"weight_by: \w+ then, \w+ now"):
      check_fingerprint(json.loads(json.dumps(then)), now, 0, PATHS)
  unsaid = ("weight_by", "shards")
  silent = {key: value for key, value in positions.items() if key not in unsaid}
  check_fingerprint(silent, positions, 0, PATHS)  # a state from before there was a choice
  with pytest.raises(ConfigError, match="weight_by: positions then, examples now"):
    check_fingerprint(silent, examples, 0, PATHS)


# --- one source a row


def test_per_source_rows_have_one_source_each(indexes):
  data = make_data(packing="per_source", images_per_row=8)
  rows, _ = windows(Mixer(data, indexes, IMAGE), 12)
  assert all(len({piece.source for piece in row}) == 1 for row in rows)
  positions = positions_by_source(rows)
  np.testing.assert_allclose(positions / positions.sum(), [0.45, 0.45, 0.10], atol=0.01)


# --- resuming


def test_going_on_does_no_work_for_the_steps_before(indexes):
  """However far a run has come, one window is planned, from a state of about the same size."""
  drawn = collections.Counter()

  class Counting(Mixer):
    def window(self, state):
      drawn["windows"] += 1
      return super().window(state)

    def _next(self, source, cursor):
      drawn["examples"] += 1
      return super()._next(source, cursor)

  def first_batch_after(state: WindowState) -> tuple[int, int]:
    drawn.clear()
    batches = PlannedBatches(Counting(make_data(), indexes, IMAGE), state, state.batch, range(16))
    batches[0]
    return drawn["windows"], drawn["examples"]

  _, near = windows(Mixer(make_data(), indexes, IMAGE), 3)
  far = dataclasses.replace(
    near,
    batch=near.batch + 1_000_000,
    cursors=tuple(c + 900_000_000 for c in near.cursors),
    placed=tuple(n + share * 10**11 for n, share in zip(near.placed, (45, 45, 10), strict=True)),
  )
  windows_near, examples_near = first_batch_after(near)
  windows_far, examples_far = first_batch_after(far)
  assert windows_near == windows_far == 1
  assert examples_far == pytest.approx(examples_near, rel=0.1)
