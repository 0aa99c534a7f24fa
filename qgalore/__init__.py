"""Memory-efficient optimizers for large models: quantization, projection, low-rank updates. Needs torch alone.

    optimizer = qgalore.LowRankOptimizer(qgalore.make_groups(model, rank=128), lr=0.01)

trains any nn.Module as torch.optim would. `create_optimizer` builds every optimizer of the table OPTIMIZERS by its
name; `create_updates` drives it inside backward or after it.
"""

from qgalore.factory import OPTIMIZERS, create_optimizer, create_updates, set_lr
from qgalore.memory import kept_bytes
from qgalore.optimizer import LowRankOptimizer
from qgalore.options import Settings
from qgalore.param_groups import ParameterGroup, make_groups, split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage.convert import dequantize_linear_layers, quantize_linear_layers
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.sync import GradSync
from qgalore.whole_model import WholeModelUpdates

__version__ = "0.2.0"

Int8Weight = QuantizedWeight  # the name that it had before there were 4 bits

__all__ = [
    "OPTIMIZERS",
    "GradSync",
    "Int8Weight",
    "LowRankOptimizer",
    "ParameterGroup",
    "PerLayerUpdates",
    "QuantizedWeight",
    "Settings",
    "WholeModelUpdates",
    "create_optimizer",
    "create_updates",
    "dequantize_linear_layers",
    "kept_bytes",
    "make_groups",
    "quantize_linear_layers",
    "set_lr",
    "split_parameters",
]
