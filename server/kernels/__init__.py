"""Fast paths per device for the few loops that decide speed. Each has a plain torch twin beside it.

Kernels know arrays and nothing else: no model, no tenant, no slot policy. On a machine without Linux,
numba or OpenMP the twins run instead; results agree to rounding.
"""
