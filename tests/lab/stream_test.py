# SPDX-License-Identifier: Apache-2.0
"""Batches of the lab: functions of seed and step, shares kept, what is given is not learned."""

import numpy as np
import pytest

from lab import base
from lab.documents import (
  AskedStrings,
  Bound,
  Facts,
  Given,
  Loose,
  Named,
  Pairs,
  Prose,
  Repeats,
  Strings,
  Themed,
)
from lab.pictures import sprites
from lab.stream import Batches
from mm1_jax.data.tokenizer import Tokenizer

ALL = (
  *(Named(), Named(noise=0.5, long=0.3), Strings(), AskedStrings(), Loose(noise=0.4, long=0.3)),
  *(Themed(), Bound(), Prose(), Pairs(), Pairs(repeat=True), Repeats(), Facts()),
)


@pytest.mark.parametrize("stream", ALL, ids=repr)
def test_a_batch_is_a_function_of_seed_and_step(stream):
  cfg = base.config(1)
  one, again = (Batches(cfg, ((1.0, stream),), seed=3)[5] for _ in range(2))
  other = Batches(cfg, ((1.0, stream),), seed=4)[5]
  for a, b in zip(one, again, strict=True):
    np.testing.assert_array_equal(a, b)
  assert not np.array_equal(one.tokens, other.tokens)
  assert one.loss_mask.sum() > 0
  pictures = (one.tokens == cfg.model.image_token_id).sum(axis=1)
  np.testing.assert_array_equal(
    pictures, one.image_mask.sum(axis=1) * cfg.model.connector.num_tokens
  )


def test_streams_get_their_shares_of_positions():
  cfg = base.config(1)
  batches = Batches(cfg, ((0.7, Strings()), (0.3, Prose())), seed=0)
  of_strings = total = 0
  for step in range(20):
    batch = batches[step]
    shown = batch.tokens == cfg.model.image_token_id
    used = batch.segment_ids > 0
    total += used.sum()
    for row in range(len(batch.tokens)):
      for segment in range(1, batch.segment_ids[row].max() + 1):
        inside = batch.segment_ids[row] == segment
        of_strings += inside.sum() if (inside & shown[row]).any() else 0
  assert of_strings / total == pytest.approx(0.7, abs=0.05)


def test_given_text_is_read_and_not_learned():
  cfg = base.config(1)
  batch = Batches(cfg, ((1.0, Facts()),), seed=0)[0]
  tokenizer = Tokenizer(cfg.data.tokenizer)
  row, segment = batch.targets[0], batch.segment_ids[0] == 1
  learned = tokenizer.decode(row[segment & (batch.loss_mask[0] > 0)])
  given = tokenizer.decode(row[segment & (batch.loss_mask[0] == 0)])
  assert ":" in given
  assert ":" not in learned
  assert learned.strip()


def test_shuffling_moves_pictures_and_nothing_else():
  cfg = base.config(1)
  true, shuffled = (
    Batches(cfg, ((1.0, Named()),), seed=0, shuffled=shuffled)[0] for shuffled in (False, True)
  )
  np.testing.assert_array_equal(true.tokens, shuffled.tokens)
  stays = (true.images == shuffled.images).all(axis=(2, 3, 4))[true.image_mask]
  assert stays.mean() < 0.2
  assert sorted(x.tobytes() for x in true.images[true.image_mask]) == sorted(
    x.tobytes() for x in shuffled.images[true.image_mask]
  )


def test_nothing_held_out_is_in_training():
  train, held_out = sprites("train"), sprites("heldout")
  assert {d.ink.tobytes() for d in train.digits}.isdisjoint(
    d.ink.tobytes() for d in held_out.digits
  )
  looks = {t.pixels.tobytes() for t in (*train.things, *train.novel)}
  assert looks.isdisjoint(t.pixels.tobytes() for t in (*held_out.things, *held_out.novel))
  named = {t.concept for t in train.things}
  assert named.isdisjoint(t.concept for t in train.novel)
  assert min(len(train.digits), len(train.things), len(held_out.digits)) > 100


def test_the_last_shot_of_equal_ones_is_any_class():
  rng = np.random.default_rng(0)
  seen = {True: 0, False: 0}
  for _ in range(200):
    *context, last = Pairs(ways=2, shots=4, equal=True).draw(rng, 8, "train")
    assert len({p for p in context if isinstance(p, Given)}) == 2
    seen[last == context[1]] += 1
  assert min(seen.values()) > 60
