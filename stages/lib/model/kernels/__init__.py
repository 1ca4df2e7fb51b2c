"""Triton kernels: what the compiler's own would read twice, or keep a copy of, passes the chip once."""
