# SPDX-License-Identifier: Apache-2.0
"""The shipped sample; records and sources that are made on the spot."""

import pathlib

import mm1_jax.data
from mm1_jax.config import SourceConfig
from mm1_jax.data.sources import Record

SAMPLE = pathlib.Path(mm1_jax.data.__file__).parent / "sample"
TOKENIZER = SAMPLE / "tokenizer.model"


def sample_source(part: str, side: str = "train", weight: float = 1.0) -> SourceConfig:
  return SourceConfig(name=part, path=str(SAMPLE / f"{part}-{side}-*.arrayrecord"), weight=weight)


def items(*content: str | bytes) -> list[dict]:
  return [{"text": c} if isinstance(c, str) else {"image": c} for c in content]


def document(id: str, *content: str | bytes) -> Record:
  return {"id": id, "source": "test", "license": "none", "credit": "", "content": items(*content)}


def conversation(id: str, *turns: list[str | bytes]) -> Record:
  """Turns by the user and the assistant alternately."""
  roles = [("user", "assistant")[i % 2] for i in range(len(turns))]
  return {
    "id": id,
    "source": "test",
    "license": "none",
    "credit": "",
    "turns": [
      {"role": role, "content": items(*turn)} for role, turn in zip(roles, turns, strict=True)
    ],
  }
