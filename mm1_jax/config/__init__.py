# SPDX-License-Identifier: Apache-2.0
"""Frozen configuration: every default, every range, every cross-field rule, and nothing else.

`configs/*.py` write an `ml_collections.ConfigDict`; `RunConfig.from_dict` turns its plain dict into
frozen dataclasses. No code past this point looks a key up by name or supplies a default. The type
of each number says in which range it must lie, see `ranges.py`.

  RunConfig > ModelConfig > VisionConfig, ConnectorConfig, DecoderConfig > MoEConfig, LoRAConfig
            > DataConfig > SourceConfig
            > OptimizerConfig, TrainConfig, CheckpointConfig, MeshConfig, EvalTaskConfig
"""

from mm1_jax.config.build import field_types, unknown_key
from mm1_jax.config.data import DataConfig, ReweightConfig, SourceConfig, TilingConfig
from mm1_jax.config.errors import ConfigError, UserError
from mm1_jax.config.evaluation import EvalTaskConfig
from mm1_jax.config.mesh import BATCH_AXES, FSDP_AXES, MESH_AXES, MeshConfig
from mm1_jax.config.model import (
  LORA_MATRICES,
  ConnectorConfig,
  DecoderConfig,
  LoRAConfig,
  ModelConfig,
  MoEConfig,
  RopeScaling,
  VisionConfig,
)
from mm1_jax.config.run import InputSpec, RunConfig
from mm1_jax.config.train import PARTS, CheckpointConfig, OptimizerConfig, TrainConfig

__all__ = [
  "BATCH_AXES",
  "FSDP_AXES",
  "LORA_MATRICES",
  "MESH_AXES",
  "PARTS",
  "CheckpointConfig",
  "ConfigError",
  "ConnectorConfig",
  "DataConfig",
  "DecoderConfig",
  "EvalTaskConfig",
  "InputSpec",
  "LoRAConfig",
  "MeshConfig",
  "MoEConfig",
  "ModelConfig",
  "OptimizerConfig",
  "ReweightConfig",
  "RopeScaling",
  "RunConfig",
  "SourceConfig",
  "TilingConfig",
  "TrainConfig",
  "UserError",
  "VisionConfig",
  "field_types",
  "unknown_key",
]
