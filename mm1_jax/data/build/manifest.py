# SPDX-License-Identifier: Apache-2.0
"""What was built: `PREFIX-manifest.json`, `PREFIX-dead.jsonl.gz`, and a summary for a person."""

import json
import re
import shutil
from collections import Counter
from typing import Any

from apache_beam.io.filesystems import FileSystems

from mm1_jax.data.build import files
from mm1_jax.data.build.options import FORMATS, BuildOptions
from mm1_jax.data.build.shards import Job, dead_path, shard_path
from mm1_jax.data.build.stats import Stats
from mm1_jax.data.sources import DataError

SCHEMA_VERSION = 1  # of the records and of this manifest
_SHOWN = 12  # reasons in the summary; the manifest has all


def finish(options: BuildOptions, built: list[tuple[Job, dict[str, Any]]]) -> tuple[Stats, str]:
  """Writes the manifest and the dead letters; returns the counts and the summary."""
  total = Stats()
  for _, sidecar in built:
    total.merge(Stats.from_dict(sidecar["stats"]))
  with files.create(manifest_path(options)) as file:
    file.write(json.dumps(_manifest(options, built, total), indent=2).encode() + b"\n")
  if total.bad:
    # Concatenated gzip files are one gzip file.
    with files.create(dead_letters_path(options)) as file:
      for job, _ in built:
        with files.open_raw(dead_path(options, job.name)) as part:
          shutil.copyfileobj(part, file)
  elif FileSystems.exists(dead_letters_path(options)):
    FileSystems.delete([dead_letters_path(options)])
  return total, _summary(options, built, total)


def judge(options: BuildOptions, total: Stats) -> None:
  """Raises a DataError if nothing is left, or too many rows could not be used."""
  if not total.records:
    raise DataError(
      f"none of {total.rows} rows is left: bad {dict(total.bad)}, filtered {dict(total.filtered)}."
      f"{_first(total)}"
    )
  num_bad = total.bad.total()
  if num_bad > options.max_bad_fraction * total.rows:
    raise DataError(
      f"{num_bad} of {total.rows} rows cannot be used, more than --max-bad-fraction="
      f"{options.max_bad_fraction} allows: {dict(total.bad.most_common(3))}."
      f"{_first(total)} The others are built; "
      f"look at {dead_letters_path(options)}, repair the input, or raise it."
    )


def _first(total: Stats) -> str:
  """Returns where the first row of the most frequent reason is, and what it has instead."""
  reason = next(iter(total.bad.most_common(1)), ("", 0))[0]
  first = total.first_bad.get(reason)
  return f" The first with {reason}: {first}." if first else ""


def manifest_path(options: BuildOptions) -> str:
  return f"{options.output}-manifest.json"


def dead_letters_path(options: BuildOptions) -> str:
  return f"{options.output}-dead.jsonl.gz"


def _manifest(
  options: BuildOptions, built: list[tuple[Job, dict[str, Any]]], total: Stats
) -> dict[str, Any]:
  manifest = {
    "schema_version": SCHEMA_VERSION,
    "format": options.format,
    "input": options.input,
    "options": {k: v for k, v in json.loads(options.shard_key()).items() if v},
    "rows": total.rows,
    "records": total.records,
    "documents": total.documents,
    "conversations": total.conversations,
    "images": total.images,
    "image_bytes": total.image_bytes,
    "bytes": sum(sidecar["shard"]["bytes"] for _, sidecar in built),
    "characters": total.characters.summary(),
    "images_per_record": _sorted(total.images_per_record, by=int),
    "sources": _sorted(total.sources),
    "licenses": _sorted(total.licenses),
    "bad": _sorted(total.bad),
    "filtered": _sorted(total.filtered),
    "lost_images": _sorted(total.lost_images),
    "skipped": _sorted(total.skipped),
    "repeated_ids": total.repeated_ids,
    "damaged_files": total.damaged_files,
    "shards": [
      {
        "file": shard_path(options, job.name).rsplit("/", 1)[-1],
        "records": sidecar["stats"]["documents"] + sidecar["stats"]["conversations"],
        **sidecar["shard"],
      }
      for job, sidecar in built
    ],
  }
  if options.tokenizer:
    manifest["tokens"] = total.tokens.summary()
  return manifest


def _sorted(counter: Counter, by: Any = str) -> dict[str, int]:
  return {key: counter[key] for key in sorted(counter, key=by)}


def _summary(options: BuildOptions, built: list[tuple[Job, dict[str, Any]]], total: Stats) -> str:
  size = sum(sidecar["shard"]["bytes"] for _, sidecar in built)
  lines = [
    _line("rows read", total.rows),
    _line("kept", total.records, f"{total.images:,} images, {total.characters.total:,} characters"),
    *_reasons("bad", total.bad),
    *_reasons("filtered", total.filtered),
    *_reasons("lost images", total.lost_images),
    *_reasons("left out", total.skipped),
  ]
  if total.repeated_ids:
    lines.append(_line("ids seen before", total.repeated_ids, "of other records; kept"))
  if options.tokenizer:
    lines.append(_line("tokens", total.tokens.total))
  lines += [f"damaged file      {path}" for path in total.damaged_files[:_SHOWN]]
  lines.append(_line("shards", len(built), f"{size / 1e6:.1f} MB, {manifest_path(options)}"))
  if total.bad:
    lines.append(f"bad rows are in   {dead_letters_path(options)}")
  path = shard_path(options, re.sub(r"\d", "?", built[0][0].name))  # not PREFIX-more's
  lines.append(f"train on it with  --config.data.sources.{_role(options.format)}.path='{path}'")
  return "\n".join(lines)


def _reasons(name: str, counter: Counter) -> list[str]:
  shown = counter.most_common(_SHOWN)
  lines = [_line(name, count, reason) for reason, count in shown]
  if len(counter) > _SHOWN:
    rest = counter.total() - sum(count for _, count in shown)
    lines.append(_line(name, rest, f"for {len(counter) - _SHOWN} other reasons"))
  return lines


def _line(name: str, count: int, rest: str = "") -> str:
  return f"{name:<16}{count:>12,}  {rest}".rstrip()


def _role(format: str) -> str:
  """Returns the source of `configs/common.py` that a format replaces."""
  if FORMATS[format].interleaved:
    return "interleaved"
  return {"text": "text", "llava": "sft"}.get(format, "captions")
