"""Every setting of a run, as frozen dataclasses.

One class per concern. Defaults are the paper's (ST-MoE, arXiv 2202.08906) or,
where the paper is silent, T5.1.1's. Building one checks the type and the range
of every field; nothing here knows of gin, JAX or TensorFlow.
"""

from st_moe.config.evaluation import EvaluationConfig
from st_moe.config.health import HealthConfig
from st_moe.config.model import Activation, ModelConfig
from st_moe.config.router import ROUTER_PRESETS, ChoicePolicy, RouterConfig
from st_moe.config.run import (
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  RunConfig,
  to_dict,
)

__all__ = [
  'Activation',
  'ChoicePolicy',
  'DataConfig',
  'EvaluationConfig',
  'HealthConfig',
  'MeshConfig',
  'ModelConfig',
  'OptimizerConfig',
  'ROUTER_PRESETS',
  'RouterConfig',
  'RunConfig',
  'to_dict',
]
