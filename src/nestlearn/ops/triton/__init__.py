"""Linear and MLP memories on a GPU: Triton kernels, forward and backward (``NESTLEARN_OPS=triton``).

They agree with the chunk form and the oracle in Triton's interpreter on a CPU. They have never run on a GPU: nothing
chooses them but that variable. This module itself imports no Triton.
"""

from nestlearn.ops.triton.support import unsupported

__all__ = ["unsupported"]
