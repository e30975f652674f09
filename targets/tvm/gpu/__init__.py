"""NVIDIA GPUs: the same lowered graph as for a CPU, with kernels of their own."""
