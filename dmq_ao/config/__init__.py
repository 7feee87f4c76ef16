"""What a user can ask for: frozen, validated values, and the errors that say what was wrong.

A ``Recipe`` names everything that decides a quantized model.
"""

from dmq_ao.config.errors import InvalidFile as InvalidFile
from dmq_ao.config.errors import MissingStatistics as MissingStatistics
from dmq_ao.config.errors import UnsupportedByBackend as UnsupportedByBackend
from dmq_ao.config.learning import ChannelScaling as ChannelScaling
from dmq_ao.config.learning import Distillation as Distillation
from dmq_ao.config.learning import Init as Init
from dmq_ao.config.learning import Protection as Protection
from dmq_ao.config.learning import Rounding as Rounding
from dmq_ao.config.learning import RoundingMethod as RoundingMethod
from dmq_ao.config.recipe import Recipe as Recipe
from dmq_ao.config.stages import AttentionConfig as AttentionConfig
from dmq_ao.config.stages import BitAllocation as BitAllocation
from dmq_ao.config.stages import BlockReconstruction as BlockReconstruction
from dmq_ao.config.stages import LeftOut as LeftOut
from dmq_ao.config.stages import Reduce as Reduce
from dmq_ao.config.stages import Relation as Relation
from dmq_ao.config.stages import Scope as Scope
from dmq_ao.config.stages import Scorer as Scorer
from dmq_ao.config.stages import Selection as Selection
from dmq_ao.config.stages import SelectMethod as SelectMethod
from dmq_ao.config.stages import StepWeights as StepWeights
from dmq_ao.config.stages import Weighting as Weighting
from dmq_ao.config.tensors import FLOAT_BITS as FLOAT_BITS
from dmq_ao.config.tensors import MAX_BITS as MAX_BITS
from dmq_ao.config.tensors import MAX_INPUT_BITS as MAX_INPUT_BITS
from dmq_ao.config.tensors import Granularity as Granularity
from dmq_ao.config.tensors import Override as Override
from dmq_ao.config.tensors import PowerOfTwo as PowerOfTwo
from dmq_ao.config.tensors import QuantConfig as QuantConfig
from dmq_ao.config.tensors import Ranges as Ranges
from dmq_ao.config.tensors import TensorConfig as TensorConfig
from dmq_ao.config.tensors import Ties as Ties
