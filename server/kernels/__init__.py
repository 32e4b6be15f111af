"""Kernels for the few loops that decide speed, by device. Each has a reference implementation in torch beside
it.

Kernels know arrays and nothing else: no model, no tenant, no slot policy. Without Linux, numba or OpenMP the
reference implementations run instead; results agree to rounding.
"""
