"""Kernels of Graft's own, in C++, built once on the machine that runs them."""
