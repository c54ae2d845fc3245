"""Triton kernels, one file each, beside the PyTorch version that defines the result.

Import this package as ``bdlib.kernels``. Importing it, or any launcher, does not import triton, so it
works on machines for which triton has no wheel.

================== ============================================================================
file               holds
================== ============================================================================
chunk_scores.py    mean key of each chunk times a query: what chunk policies choose by
sparse_decode.py   few queries over the selected chunks of the full cache, read in place
verify.py          few queries over the whole cache, sequences with their own lengths
multi_view.py      training attention of views that share a prefix, forward and backward
acceptance_loss.py acceptance-aware losses over a large vocabulary, forward and backward
native.py          a decoding step on CPU: attention_cpu.c and layer_cpu.c, compiled at first use
split.py           what attention over a cache shares: one block, splitting, the merge
launching.py       checks of arguments, choice of a backend, what can be launched
lazy.py            ``@kernel`` and ``@device``: triton.jit at first use
interpreter.py     repairs for bfloat16 in triton's interpreter, and a counter of bytes read
compiling.py       every kernel compiled for sm_80, sm_90, sm_100 and gfx942, without a GPU
================== ============================================================================
"""
