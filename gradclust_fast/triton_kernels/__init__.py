"""Triton kernels, one file an op: the same op as in ``reference``, for NVIDIA GPUs of compute capability 8.0 or newer.

This file and ``_support`` import no Triton, so that ``import gradclust_fast`` does not either; the kernel files do, and
are imported by the first call that needs them. ``TRITON_INTERPRET=1``, set before Triton is first imported, runs every
kernel on CPU tensors in Triton's interpreter: slow, and the way all of them are tested without a GPU.
"""
