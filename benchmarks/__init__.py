"""Latency, memory and energy, always beside the PyTorch baseline of the same run."""
