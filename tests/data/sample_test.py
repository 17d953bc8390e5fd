# SPDX-License-Identifier: Apache-2.0
"""The shipped sample: small, credited, and with nothing held out that is trained on."""

import collections
import hashlib
import itertools
import json

import pytest

from mm1_jax.data.build.sample import RESTRICTED
from mm1_jax.data.build.world import ASKS
from mm1_jax.data.image import decode_image
from mm1_jax.data.sources import Source
from tests.helpers.records import SAMPLE, sample_source

PARTS = ("captions", "interleaved", "text", "sft", "questions")
TRAINED_ONLY = ("captions_world", "interleaved_world")
LICENSES = {"CC-BY-4.0", "CC0/Public-Domain", "Public domain", "Public domain (USA)"}
WORLD_LICENSES = {"CC-BY-SA-3.0", "Apache-2.0", "CC-BY-4.0", "MIT"}
MIN_HELDOUT = {"captions": 400, "interleaved": 20, "text": 30, "sft": 150, "questions": 1000}


@pytest.fixture(scope="module")
def records():
  """All records by (part, side)."""
  found = {}
  both = itertools.product(PARTS, ("train", "heldout"))
  for part, side in (*both, *((part, "train") for part in TRAINED_ONLY)):
    source = Source(sample_source(part, side))
    found[part, side] = [source[i] for i in range(len(source))]
  return found


def items(record):
  contents = [t["content"] for t in record["turns"]] if "turns" in record else [record["content"]]
  return [item for content in contents for item in content]


def side(records, name):
  return [record for (_, s), group in records.items() for record in group if s == name]


def test_is_below_25_mb():
  assert sum(f.stat().st_size for f in SAMPLE.iterdir()) < 25e6


def test_manifest_counts(records):
  parts = json.loads((SAMPLE / "manifest.json").read_text())["parts"]
  assert {tuple(k.split("-")): v["records"] for k, v in parts.items()} == {
    key: len(group) for key, group in records.items()
  }
  for part, least in MIN_HELDOUT.items():
    assert len(records[part, "heldout"]) >= least
  assert {"openstax", "openclipart"} == set(parts["captions-heldout"]["by_source"])


def test_ids_differ(records):
  ids = collections.Counter(r["id"] for group in records.values() for r in group)
  assert [i for i, n in ids.items() if n > 1] == []


def test_no_image_is_on_both_sides(records):
  train, heldout = (
    {
      hashlib.sha256(i["image"]).digest()
      for r in side(records, s)
      for i in items(r)
      if "image" in i
    }
    for s in ("train", "heldout")
  )
  assert len(heldout) > 500
  assert not train & heldout


def test_no_long_text_is_on_both_sides(records):
  """Except NLVR's statements, which say something else about another picture."""
  train, heldout = (
    {
      i["text"]
      for r in side(records, s)
      if r["source"] != "nlvr"
      for i in items(r)
      if len(i.get("text", "")) > 80
    }
    for s in ("train", "heldout")
  )
  assert not train & heldout


def test_no_module_is_on_both_sides(records):
  """openstax/BOOK/MODULE is in the ids of interleaved, text and exercises."""

  def modules(name):
    ids = (r["id"].split("/") for r in side(records, name) if r["id"].startswith("openstax/"))
    return {module for _, _, module, *_ in ids}

  assert len(modules("heldout")) > 80
  assert not modules("train") & modules("heldout")


def test_licenses_and_credits(records):
  everything = [r for group in records.values() for r in group]
  assert {r["license"] for r in everything if r["source"] != "world"} == LICENSES
  drawn = [r for r in everything if r["source"] == "world"]
  assert {term for r in drawn for term in r["license"].split(" + ")} == WORLD_LICENSES
  for record in everything:
    if record["source"].startswith("openstax"):
      assert "Access for free at openstax.org" in record["credit"]
    lines = [part for part in record["credit"].split(" | ") if part.startswith("(")]
    assert not RESTRICTED.search(" ".join(lines)), record["id"]
  text = (SAMPLE / "CREDITS.md").read_text()
  assert all(r["source"] in text for r in everything)
  assert all(f"| {name.split('/')[0]} |" in text for r in drawn for name in r["pictures"])


def test_every_image_decodes(records):
  for record in (r for group in records.values() for r in group):
    for item in items(record):
      if "image" in item:
        assert decode_image(item["image"], (8, 8)).shape == (8, 8, 3)


def test_no_look_and_no_handwriting_of_the_world_is_on_both_sides(records):
  train, heldout = (
    {name for r in side(records, s) for name in r.get("pictures", ())} for s in ("train", "heldout")
  )
  assert len(heldout) > 600
  assert not train & heldout


def test_300_questions_of_each_kind_are_held_out(records):
  counts = collections.Counter(a for r in records["questions", "heldout"] for a in r["asks"])
  assert min(counts[asks] for asks in ASKS) >= 300
