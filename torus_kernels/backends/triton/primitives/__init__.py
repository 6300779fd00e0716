"""What the kernels share: the lattice, tiles of rows in memory, and the softmax in base 2."""
