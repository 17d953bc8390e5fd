# SPDX-License-Identifier: Apache-2.0
"""Each format: the shipped sample is written in it, built, read back, and is the same."""

import gzip
import hashlib
import json
import pathlib
from typing import Any

import pytest

from mm1_jax.config import DataConfig, InputSpec, SourceConfig
from mm1_jax.data.build import raw_sample
from mm1_jax.data.build.__main__ import main
from mm1_jax.data.pipeline import make_pipeline
from mm1_jax.data.sources import Record, Source


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("raw")
  raw_sample.write_all(folder)
  return folder


@pytest.fixture(scope="module")
def flags(raw):
  """The command line of each format."""
  return {
    "webdataset": [f"--input={raw}/webdataset/*.tar"],
    "coco": [f"--input={raw}/coco/captions.json", f"--images={raw}/coco/images"],
    "llava": [f"--input={raw}/llava/llava.json", f"--images={raw}/llava/images"],
    "obelics": [f"--input={raw}/obelics/*.parquet", f"--images={raw}/obelics/store/*.tar"],
    "mmc4": [f"--input={raw}/mmc4/docs.jsonl", f"--images={raw}/mmc4/images"],
    "text": [f"--input={raw}/text/*"],
    "tfds": [
      *("--input=pictures", f"--data_dir={raw}/tfds"),
      *("--image_feature=image", "--text_feature=captions.text"),
    ],
  }


def expected(format: str) -> list[Record]:
  if format in ("webdataset", "coco", "tfds"):
    return raw_sample.read("captions")
  if format == "llava":
    return raw_sample.read_conversations()
  if format == "text":
    return raw_sample.read("text")
  return raw_sample.read("interleaved")


def read_back(prefix: pathlib.Path) -> list[Record]:
  source = Source(SourceConfig("built", f"{prefix}-*.arrayrecord"))
  return [source[i] for i in range(len(source))]


def said(record: Record) -> bytes:
  """What a record says, whatever its header, and whatever spaces are at the edges of its texts."""
  said = trimmed(record.get("content") or record.get("turns"))
  return json.dumps(said, default=bytes.hex).encode()


def trimmed(value: Any) -> Any:
  """Items or turns whose texts have no spaces at their edges."""
  if isinstance(value, list):
    return [trimmed(inner) for inner in value]
  if isinstance(value, dict):
    return {key: trimmed(inner) for key, inner in value.items()}
  return value.strip() if isinstance(value, str) else value


@pytest.mark.parametrize(
  "format", ["webdataset", "coco", "llava", "obelics", "mmc4", "text", "tfds"]
)
def test_round_trip(flags, tmp_path, format, capsys):
  prefix = tmp_path / "out" / format
  main([format, *flags[format], f"--output={prefix}", "--source=mine", "--license=CC0"])
  records = read_back(prefix)
  if format in ("tfds", "text"):  # TFDS shuffles; the texts are spread over files
    assert sorted(map(said, records)) == sorted(map(said, expected(format)))
  else:
    assert list(map(said, records)) == list(map(said, expected(format)))
  manifest = json.loads(pathlib.Path(f"{prefix}-manifest.json").read_text())
  assert manifest["records"] == manifest["rows"] == len(records) == 40
  assert manifest["bad"] == manifest["filtered"] == manifest["lost_images"] == {}
  assert f"kept {40:>23,}" in capsys.readouterr().out
  assert not pathlib.Path(f"{prefix}-dead.jsonl.gz").exists()


def test_headers(flags, tmp_path):
  """Rows that tell their licence and source keep them; the flags are for those that do not."""
  for format in ("webdataset", "coco", "text", "obelics"):
    main([format, *flags[format], f"--output={tmp_path}/{format}", "--source=me", "--license=CC0"])
  captions = raw_sample.read("captions")
  webdataset, coco = read_back(tmp_path / "webdataset"), read_back(tmp_path / "coco")
  assert [r["license"] for r in webdataset] == [r["license"] for r in captions]
  assert [r["license"] for r in coco] == [r["license"] for r in captions]
  assert webdataset[0]["credit"] == f"https://example.org/{captions[0]['id']}"
  assert webdataset[30]["id"] == "00001.tar/000010005"
  assert {r["source"] for r in webdataset} == {"me"}
  assert coco[7]["id"] == "1007"
  texts = {r["id"]: r for r in read_back(tmp_path / "text")}
  for record in raw_sample.read("text")[:-1]:  # the last is a .txt, which has no header
    assert {**texts[record["id"]], "credit": ""} == trimmed({**record, "credit": ""})
  assert texts["book.txt"]["license"] == "CC0"
  pages = read_back(tmp_path / "obelics")
  assert pages[3]["credit"] == f"https://example.org/{raw_sample.read('interleaved')[3]['id']}"


def test_manifest_adds_up(flags, tmp_path):
  prefix = tmp_path / "sft"
  tokenizer = f"--tokenizer={raw_sample.SAMPLE}/tokenizer.model"
  main(["llava", *flags["llava"], f"--output={prefix}", tokenizer, "--rows_per_shard=15"])
  manifest = json.loads((tmp_path / "sft-manifest.json").read_text())
  records = read_back(prefix)
  items = [item for r in records for turn in r["turns"] for item in turn["content"]]
  texts = [item["text"] for item in items if "text" in item]
  assert manifest["schema_version"] == 1
  assert manifest["conversations"] == 40
  assert manifest["images"] == len(items) - len(texts)
  assert manifest["image_bytes"] == sum(len(item.get("image", b"")) for item in items)
  assert manifest["characters"]["total"] == sum(map(len, texts))
  assert manifest["images_per_record"]["2"] >= 3  # several pictures in one question
  assert manifest["images_per_record"]["0"] == 20
  assert [shard["records"] for shard in manifest["shards"]] == [15, 15, 10]
  for shard in manifest["shards"]:
    data = (tmp_path / shard["file"]).read_bytes()
    assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
  lengths = sorted(
    sum(len(i.get("text", "")) for t in r["turns"] for i in t["content"]) for r in records
  )
  assert manifest["characters"]["p50"] == pytest.approx(lengths[19], rel=0.011)
  assert manifest["characters"]["p99"] == pytest.approx(lengths[39], rel=0.011)
  assert manifest["tokens"]["total"] == pytest.approx(
    manifest["characters"]["total"] / 2.5, rel=0.3
  )


def test_built_shards_train(flags, tmp_path, tokenizer):
  """All formats in one mixture, through the pipeline that training reads."""
  for format, args in flags.items():
    main([format, *args, f"--output={tmp_path}/{format}"])
  sources = [SourceConfig(f, f"{tmp_path}/{f}-*.arrayrecord") for f in flags]
  data = DataConfig(
    sources=tuple(sources),
    tokenizer=tokenizer.path,
    seq_len=512,
    batch_size=4,
    images_per_row=5,
    window_rows=32,
  )
  pipeline = make_pipeline(data, InputSpec((28, 28), 4, tokenizer.image_id))
  seen = set()
  for _ in range(16):
    batch, _ = next(pipeline)
    seen |= set(batch.source_ids.ravel().tolist())
  assert not pipeline.drops
  assert set(range(len(flags))) <= seen
  assert batch.image_mask.any()


def test_mmc4_places(tmp_path):
  """Two pictures in front of the third sentence, in their order; one sentence after it."""
  pictures = [r["content"][0]["image"] for r in raw_sample.read("captions", 2)]
  for i, data in enumerate(pictures):
    (tmp_path / f"{i}.jpg").write_bytes(data)
  infos = [{"image_name": f"{i}.jpg", "matched_text_index": 2} for i in (1, 0)]
  row = {"text_list": ["One.", "Two.", "Three.", "Four."], "image_info": infos}
  (tmp_path / "a.jsonl").write_text(json.dumps(row))
  main(["mmc4", f"--input={tmp_path}/a.jsonl", f"--images={tmp_path}", f"--output={tmp_path}/out"])
  (record,) = read_back(tmp_path / "out")
  first, second = {"image": pictures[1]}, {"image": pictures[0]}
  assert record["content"] == [{"text": "One. Two."}, first, second, {"text": "Three. Four."}]


def test_system_turn(tmp_path):
  turns = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Yes")]
  talk = {"conversations": [{"from": who, "value": text} for who, text in turns]}
  (tmp_path / "a.jsonl").write_text(json.dumps(talk))
  main(["llava", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/out"])
  (record,) = read_back(tmp_path / "out")
  said = [(turn["role"], turn["content"][0]["text"]) for turn in record["turns"]]
  assert said == [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes")]


def test_short_answers_are_asked_for(tmp_path, jpeg):
  turns = [("human", "How many?"), ("gpt", "2"), ("human", "Of what? <image>"), ("gpt", "Cats")]
  talk = {"conversations": [{"from": who, "value": text} for who, text in turns]}
  (tmp_path / "a.jpg").write_bytes(jpeg(9))
  (tmp_path / "a.jsonl").write_text(json.dumps({**talk, "image": "a.jpg"}))
  flags = [f"--input={tmp_path}/a.jsonl", f"--images={tmp_path}", f"--output={tmp_path}/out"]
  main(["llava", *flags, "--answer_prompt=One word."])
  (record,) = read_back(tmp_path / "out")
  first, two, second, cats = (turn["content"] for turn in record["turns"])
  assert [first, two, cats] == [
    [{"text": "How many?\nOne word."}],
    [{"text": "2"}],
    [{"text": "Cats"}],
  ]
  assert second == [{"text": "Of what?"}, {"image": jpeg(9)}, {"text": "One word."}]


def test_limit(flags, tmp_path):
  main(["webdataset", *flags["webdataset"], f"--output={tmp_path}/few", "--limit=5"])
  assert len(read_back(tmp_path / "few")) == 5
  assert len(list(tmp_path.glob("few-*-of-00002.arrayrecord"))) == 2  # from both tars


def test_text_split(tmp_path):
  """Documents of one .txt file, with a mark that crosses the reader's chunks."""
  texts = [f"{i} " + "x" * (i * 977 % 5000) for i in range(1000)]
  texts = [text.strip() for text in texts]
  with gzip.open(tmp_path / "all.txt.gz", "wt") as file:
    file.write("<|end|>".join(texts))
  flags = [f"--input={tmp_path}/all.txt.gz", "--txt_split=<|end|>", f"--output={tmp_path}/out"]
  main(["text", *flags])
  assert [r["content"][0]["text"] for r in read_back(tmp_path / "out")] == texts
