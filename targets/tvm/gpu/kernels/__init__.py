"""Kernels in TIR for NVIDIA GPUs.

A module stands for the one of the same name in `onnxcomp.targets.tvm.kernels`, and its functions make kernels with the
same arguments: a converter takes either. A kernel may be several launches one after another.
"""
