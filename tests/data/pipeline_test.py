# SPDX-License-Identifier: Apache-2.0
"""Batches: what is in them, and that they are the same however they are made."""

import dataclasses
import io
import itertools
import json
import multiprocessing

import numpy as np
import PIL.Image
import pytest

from mm1_jax.batch import Batch
from mm1_jax.config import ConfigError, DataConfig, InputSpec, TilingConfig
from mm1_jax.data.pipeline import PipelineError, WorkerKilled, make_eval_batches, make_pipeline
from mm1_jax.data.sources import DataError
from tests.helpers import spread
from tests.helpers.records import SAMPLE, conversation, sample_source
from tests.helpers.spread import Leg

INPUTS = InputSpec(image_size=(16, 16), tokens_per_image=16, image_token_id=4)


def take(pipeline, num: int) -> list[Batch]:
  return [batch for batch, _ in itertools.islice(pipeline, num)]


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    for field in Batch._fields:
      np.testing.assert_array_equal(getattr(x, field), getattr(y, field), err_msg=field)


@pytest.fixture
def small(write):
  """Makes a config over sources that are written on the spot."""

  def make(*sources, **changes) -> DataConfig:
    values = {"seq_len": 64, "batch_size": 2, "images_per_row": 2, "window_rows": 4}
    return DataConfig(
      sources=tuple(write(f"s{i}", records) for i, records in enumerate(sources)),
      tokenizer=str(SAMPLE / "tokenizer.model"),
      **{**values, **changes},
    )

  return make


# --- what is in a batch


def test_sub_images_fill_slots_in_order(small):
  """A picture of two halves, cut: each sub-image is in its slot, at its run of placeholders."""
  dark_left = np.zeros((32, 32, 3), np.uint8)
  dark_left[:, 16:] = 255
  data = io.BytesIO()
  PIL.Image.fromarray(dark_left).save(data, "PNG")
  record = conversation("x", [data.getvalue(), "What?"], ["That."])
  tiling = TilingConfig(grid=(2, 2), overview="first")
  data = small([record], seq_len=128, images_per_row=5, tiling=tiling)
  pipeline = make_pipeline(data, InputSpec((16, 16), 2, 4))
  ((batch, stats),) = itertools.islice(pipeline, 1)
  assert stats.num_images == 5 * stats.num_examples
  shown = [int(image[8, 8, 0]) for image in batch.images[0]]
  assert shown[1:] == [0, 255, 0, 255]
  assert batch.images[0, 0, :, :7].max() < 30  # the overview: dark and bright
  assert batch.images[0, 0, :, 9:].min() > 225
  assert (batch.tokens[0] == 4).sum() == 2 * 5
  pipeline.close()


def test_a_batch_by_hand(small, tokenizer, jpeg):
  data = small([[jpeg(50), "a", jpeg(200)]], batch_size=1, window_rows=1, seq_len=11)
  pipeline = make_pipeline(data, InputSpec((2, 2), 2, 4))
  batch, stats = next(pipeline)
  (a,) = tokenizer.encode("a")
  assert batch.tokens.tolist() == [[1, 5, 4, 4, 6, a, 5, 4, 4, 6, 0]]
  assert batch.targets.tolist() == [[5, 4, 4, 6, a, 5, 4, 4, 6, 2, 0]]
  assert batch.loss_mask.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]]
  assert batch.segment_ids.tolist() == [[1] * 10 + [0]]
  assert batch.image_mask.tolist() == [[True, True]]
  np.testing.assert_allclose(batch.images[0, 0], 50, atol=2)
  np.testing.assert_allclose(batch.images[0, 1], 200, atol=2)
  assert stats.num_positions == 10
  assert stats.num_images == 2
  assert stats.padded_fraction == pytest.approx(1 / 11)
  assert stats.empty_slot_fraction == 0


def test_invariants_on_the_sample(sample_data):
  for batch in take(make_pipeline(sample_data(), INPUTS), 6):
    assert batch.images.shape == (8, 5, 16, 16, 3)
    padding = batch.segment_ids == 0
    assert not batch.loss_mask[padding].any()
    assert not batch.tokens[padding].any()
    assert not batch.loss_mask[np.isin(batch.targets, [4, 5, 6])].any()
    # In a segment the next input is the target: across segments nothing is predicted.
    same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    inside = same & ~padding[:, 1:]
    np.testing.assert_array_equal(batch.tokens[:, 1:][inside], batch.targets[:, :-1][inside])
    np.testing.assert_array_equal(
      batch.positions[:, 1:], np.where(inside, batch.positions[:, :-1] + 1, 0)
    )
    # As many runs of placeholders as pictures, and pictures before empty slots.
    np.testing.assert_array_equal((batch.tokens == 4).sum(1), 16 * batch.image_mask.sum(1))
    assert (np.diff(batch.image_mask.astype(int)) <= 0).all()
    assert not batch.images[~batch.image_mask].any()


def test_rows_are_full_and_shares_hold(sample_data):
  """At the sample with rows of 512 positions; the numbers are printed with `pytest -s`."""
  positions, stats = np.zeros(3), []
  inputs = dataclasses.replace(INPUTS, image_size=(8, 8))
  pipeline = make_pipeline(sample_data(batch_size=32), inputs)
  for batch, batch_stats in itertools.islice(pipeline, 20):
    positions += np.bincount(batch.source_ids[batch.segment_ids > 0], minlength=3)
    stats.append(batch_stats)
  padded = np.mean([s.padded_fraction for s in stats])
  empty = np.mean([s.empty_slot_fraction for s in stats])
  share = positions / positions.sum()
  print(f"padded {padded:.3f}, empty slots {empty:.3f}, shares {share.round(3)}")
  assert padded < 0.03
  assert empty < 0.3
  np.testing.assert_allclose(share, [0.45, 0.45, 0.10], atol=0.01)


def test_text_only(small):
  batch, stats = next(make_pipeline(small([["a b c"]] * 9, images_per_row=0), INPUTS))
  assert batch.images.shape == (2, 0, 16, 16, 3)
  assert batch.image_mask.shape == (2, 0)
  assert stats.empty_slot_fraction == 0
  assert stats.num_positions == batch.loss_mask.sum() > 0


def test_conversations(small, tokenizer, jpeg):
  records = [conversation(f"c{i}", [jpeg(9), "Is it?"], ["No", " never"]) for i in range(9)]
  batch, _ = next(make_pipeline(small(records, seq_len=128), INPUTS))
  first = batch.segment_ids[0] == 1
  targets, mask = batch.targets[0][first], batch.loss_mask[0][first] == 1
  assert tokenizer.decode(targets[mask]) == " No never"
  assert targets[mask][-1] == 2
  assert tokenizer.decode([*targets]) == "USER:Is it?\nASSISTANT: No never"


# --- the same, however it is made


def test_processes_have_slices_of_the_global_batch(sample_data):
  data = sample_data()
  whole = take(make_pipeline(data, INPUTS), 5)
  assert len({batch.tokens.tobytes() for batch in whole}) == 5  # of a window's four, each its own
  halves = [take(make_pipeline(data, INPUTS, process_index=i, process_count=2), 5) for i in (0, 1)]
  joined = [
    Batch(*(np.concatenate(fields) for fields in zip(*pair, strict=True)))
    for pair in zip(*halves, strict=True)
  ]
  assert_equal(joined, whole)


def test_workers_change_nothing(sample_data):
  data = sample_data()
  inside = make_pipeline(data, INPUTS)
  outside = make_pipeline(dataclasses.replace(data, num_workers=2), INPUTS)
  assert_equal(take(outside, 6), take(inside, 6))
  assert outside.state() == inside.state()
  outside.close()


@pytest.mark.parametrize("stop", [0, 1, 4, 7])
@pytest.mark.parametrize("batch_size", [8, 48])  # four batches a window, and one
def test_resume_anywhere(sample_data, stop, batch_size):
  data = sample_data(batch_size=batch_size)
  whole = take(make_pipeline(data, INPUTS), 10)
  first = make_pipeline(data, INPUTS, process_index=1, process_count=2)
  take(first, stop)
  state = json.loads(json.dumps(first.state()))
  again = make_pipeline(data, INPUTS, state=state)
  assert_equal(take(again, 3), whole[stop : stop + 3])


def test_state_does_not_depend_on_processes(sample_data):
  data = sample_data()
  pipelines = [
    make_pipeline(data, INPUTS, process_index=i, process_count=n)
    for i, n in [(0, 1), (1, 2), (3, 4)]
  ]
  for pipeline in pipelines:
    take(pipeline, 5)
  states = [pipeline.state() for pipeline in pipelines]
  assert states[0] == states[1] == states[2]


@pytest.mark.slow
def test_real_processes_stops_and_restarts_change_nothing(sample_data):
  """`bench.data.batch_order` prints more of these."""
  data = sample_data(seq_len=256, images_per_row=3, window_rows=64)
  alone = spread.run(data, INPUTS, [Leg(12)])
  assert len({"".join(rows) for rows in alone}) == 12  # no two batches are the same
  assert spread.run(data, INPUTS, [Leg(3, 4), Leg(9, 2), Leg(12)]) == alone
  assert spread.run(data, INPUTS, [Leg(12, 2, workers=4)]) == alone


@pytest.mark.parametrize(
  ("texts", "pictures", "some", "all_rows"),
  [(9, 0, False, False), (0, 9, True, True), (9, 1, True, False)],
)
def test_batches_of_one_kind(small, jpeg, texts, pictures, some, all_rows):
  """Only text, only pictures, and rows without pictures beside rows with some."""
  sources = [["a b c " * 30]] * texts, [[jpeg(9)]] * pictures
  data = small(*filter(None, sources), seq_len=40, batch_size=4, images_per_row=1)
  batches = take(make_pipeline(data, INPUTS), 6)
  with_pictures = np.concatenate([batch.image_mask.any(axis=1) for batch in batches])
  assert (with_pictures.any(), with_pictures.all()) == (some, all_rows)


def test_the_end_of_the_data_is_an_error_with_its_step(small):
  """Also from workers; and a source that is used up is told once."""
  data = small([["a b c d e f"]] * 40, seq_len=16, images_per_row=0, window_rows=2)
  data = dataclasses.replace(
    data, sources=tuple(dataclasses.replace(s, epochs=1.0) for s in data.sources)
  )
  for num_workers in (0, 1):
    pipeline = make_pipeline(dataclasses.replace(data, num_workers=num_workers), INPUTS)
    with pytest.raises(DataError, match=r"the data ends at step \d+: all epochs"):
      take(pipeline, 100)
    pipeline.close()


def test_the_log_says_how_many_slots_suit(small, jpeg, caplog):
  """A row of 64 positions holds 3 captions of 20."""
  data = small([[jpeg(9), "a"]] * 9, images_per_row=2)
  with caplog.at_level("INFO"):
    make_pipeline(data, INPUTS).close()
  assert "3.2 images come with a full row; data.images_per_row 2: too few" in caplog.text


# --- evaluation


@pytest.mark.parametrize("part", ["captions", "interleaved", "text", "sft"])
def test_eval_has_each_held_out_example_once(sample_data, part):
  """Every target of every example that fits is there once."""
  from mm1_jax.data.examples import Encoder
  from mm1_jax.data.index import load_index
  from mm1_jax.data.sources import Source
  from mm1_jax.data.tokenizer import Tokenizer

  data, config = sample_data(), sample_source(part, "heldout")
  batches = list(make_eval_batches(config, data, INPUTS))
  source, encoder = Source(config), Encoder(Tokenizer(data.tokenizer), 16)
  index = load_index(source, encoder, seq_len=512, max_images=5, max_drop_fraction=0)
  examples = [encoder.encode_record(source[int(r)]) for r in index.records]
  expected = np.concatenate([e.targets for e in examples])
  found = np.concatenate([b.targets[b.segment_ids > 0] for b in batches])
  np.testing.assert_array_equal(np.sort(found), np.sort(expected))
  assert sum(b.loss_mask.sum() for b in batches) == sum(e.loss_mask.sum() for e in examples)
  assert sum(b.image_mask.sum() for b in batches) == sum(len(e.images) for e in examples)
  assert all(b.tokens.shape == (8, 512) for b in batches)


def test_eval_is_the_same_on_two_processes(sample_data):
  config, data = sample_source("captions", "heldout"), sample_data()
  whole = list(make_eval_batches(config, data, INPUTS))
  halves = [
    list(make_eval_batches(config, data, INPUTS, process_index=i, process_count=2)) for i in (0, 1)
  ]
  joined = [
    Batch(*(np.concatenate(fields) for fields in zip(*pair, strict=True)))
    for pair in zip(*halves, strict=True)
  ]
  assert_equal(joined, whole)
  assert_equal(list(make_eval_batches(config, data, INPUTS, limit=2)), whole[:2])


# --- what goes wrong


def test_unreadable_image_is_dropped_and_counted(small, jpeg):
  good = [[jpeg(9), f"picture {i}"] for i in range(19)]
  data = small([*good, [b"no jpeg", "lost"]], seq_len=128, batch_size=4)
  pipeline = make_pipeline(data, INPUTS)
  found = list(itertools.islice(pipeline, 12))
  assert sum(stats.drops.get("s0: unreadable image", 0) for _, stats in found) > 0
  assert pipeline.drops["s0: unreadable image"] > 0
  for batch, _ in found:
    assert (batch.tokens == 4).sum() == 16 * batch.image_mask.sum()
    assert ((batch.segment_ids > 0) == (batch.tokens != 0)).all()


def test_too_many_unreadable_images_stop_the_run(small, jpeg):
  data = small([[jpeg(9), "good"]] * 9 + [[b"bad", "bad"]], seq_len=64, batch_size=8)
  pipeline = make_pipeline(data, INPUTS)
  message = r"of \d+ examples were dropped \({'s0: unreadable image': \d+}\), more than"
  with pytest.raises(DataError, match=message):
    take(pipeline, 50)
  with pytest.raises(DataError, match=message):  # and stays so
    next(pipeline)


def test_image_slots_are_needed_for_images(small, jpeg):
  with pytest.raises(ConfigError, match=r"data\.images_per_row is 0"):
    make_pipeline(small([[jpeg(9)]], images_per_row=0), INPUTS)


def test_settings_that_do_not_fit(small):
  data = small([["a"]])
  with pytest.raises(ConfigError, match=r"model\.image_token_id is 9.*<image> at 4"):
    make_pipeline(data, dataclasses.replace(INPUTS, image_token_id=9))
  with pytest.raises(ConfigError, match="batch_size 2 does not divide over 3 processes"):
    make_pipeline(data, INPUTS, process_count=3)
  with pytest.raises(ConfigError, match=r"data\.sources is empty"):
    make_pipeline(dataclasses.replace(data, sources=()), INPUTS)
  with pytest.raises(ConfigError, match="64 cannot hold one image of 102"):
    make_pipeline(data, dataclasses.replace(INPUTS, tokens_per_image=100))
  with pytest.raises(DataError, match=r"data\.tokenizer 'none' cannot be read"):
    make_pipeline(dataclasses.replace(data, tokenizer="none"), INPUTS)


def test_other_pictures_under_the_same_captions_are_refused(write, jpeg, sample_data):
  """All counts, sizes of rows and file names are equal; the message names the shard."""
  pictures = [jpeg(10 * level) for level in range(8)]
  records = [[picture, f"caption {i}"] for i, picture in enumerate(pictures)]
  source = write("captions", records, num_shards=2)
  data = sample_data(sources=(source,), images_per_row=2, batch_size=2, window_rows=2)
  state = make_pipeline(data, INPUTS).state()
  make_pipeline(data, INPUTS, state=state)
  swapped = [[picture, r[1]] for picture, r in zip(reversed(pictures), records, strict=True)]
  write("captions", swapped, num_shards=2)
  with pytest.raises(ConfigError, match=r"captions-00000-of-00002\.arrayrecord and 1 more shards"):
    make_pipeline(data, INPUTS, state=state)


def test_state_of_other_data(small):
  data = small([["a"]])
  state = make_pipeline(data, INPUTS).state()
  with pytest.raises(ConfigError, match="seed: 0 then, 1 now"):
    make_pipeline(dataclasses.replace(data, seed=1), INPUTS, state=state)


def test_closed(small):
  pipeline = make_pipeline(small([["a"]]), INPUTS)
  next(pipeline)
  pipeline.close()
  with pytest.raises(PipelineError, match="closed"):
    next(pipeline)


def test_killed_worker_is_told(small):
  pipeline = make_pipeline(small([["a"]] * 9, num_workers=1), INPUTS)
  next(pipeline)
  for child in multiprocessing.active_children():
    child.kill()
  with pytest.raises(WorkerKilled, match=r"killed while batch \d+ was made .*exit code -9\)"):
    take(pipeline, 100)
  pipeline.close()
