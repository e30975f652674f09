"""Kernels in TIR: each function makes one for a machine and fixed sizes."""
