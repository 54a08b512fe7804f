"""The implementation in plain PyTorch: used on a CPU, and the one that the Triton kernels are compared with."""
