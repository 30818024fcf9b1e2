"""The algebra of effective weights, its execution beside a module, and the session that attaches it."""

from lib_precision_lora.branch.algebra.effective import EffectiveWeight
from lib_precision_lora.branch.arithmetic.product import Compute
from lib_precision_lora.branch.session.patch import Applied, Patch, PatchError, PatchMemoryError
from lib_precision_lora.branch.session.planning.policy import DensePolicy
from lib_precision_lora.branch.session.session import PatchSession

__all__ = [
    "Applied",
    "Compute",
    "DensePolicy",
    "EffectiveWeight",
    "Patch",
    "PatchError",
    "PatchMemoryError",
    "PatchSession",
]
