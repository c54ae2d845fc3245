"""Triton kernels, one file each, beside the PyTorch version that defines the result.

Import this package as ``bdlib.kernels``. Importing it does not import triton, so
it works on machines for which triton has no wheel.
"""
