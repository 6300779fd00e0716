"""What the kernels cost beside what a PyTorch user would do instead: ``python -m benchmarks --help``."""
