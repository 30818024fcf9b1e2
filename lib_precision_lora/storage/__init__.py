"""Stored weight -> values, by row block; the stored bytes are only ever read.

    weight = stored_weight(module.weight, module)
    block = weight.rows(0, 128)          # fp32, [128, in], on the device of the bytes

`encode` goes the other way, for files. See `StoredWeight` for what every format offers and `recognise.py`
for the formats.
"""

from .dense import DenseWeight
from .encode import encode, unlabelled
from .encoded import Encoded
from .gguf import gguf_weight
from .gguf_parameter import GGUFParameter
from .recognise import stored_weight
from .weight import StorageError, StoredWeight
from .widened import WidenedWeight, widened

__all__ = [
    "DenseWeight",
    "Encoded",
    "GGUFParameter",
    "StorageError",
    "StoredWeight",
    "WidenedWeight",
    "encode",
    "gguf_weight",
    "stored_weight",
    "unlabelled",
    "widened",
]
