"""Kernels: one op a file, each with its meaning in plain torch in `reference`."""
