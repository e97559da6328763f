"""Architectures in which the doctor's faults are put: each has every part that a fault needs.

Each file has `ports()`, a right port with its reference and config, and `FAULTS`.
"""
