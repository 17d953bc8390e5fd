# SPDX-License-Identifier: Apache-2.0
"""MM1's pre-training from what `python -m mm1_jax.convert import` wrote: its model, its params.

python -m mm1_jax.main --config=configs/from_weights.py:runs/open --workdir=runs/mine
"""

import json
import pathlib

from ml_collections import ConfigDict

from mm1_jax.configs import common


def get_config(folder: str) -> ConfigDict:
  path = pathlib.Path(folder) / "config.json"
  if not path.exists():
    raise ValueError(f"'{folder}' has no config.json; give the --out of mm1_jax.convert import.")
  imported = json.loads(path.read_text())
  config = common.pretrain("from_weights")
  config.model = ConfigDict(imported["model"])
  config.data.tokenizer = imported["data"]["tokenizer"]
  config.train.init_from = folder
  return config
