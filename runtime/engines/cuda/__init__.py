"""CUDA kernels of the sampling loop, and how they are compiled for the GPU that is there."""
