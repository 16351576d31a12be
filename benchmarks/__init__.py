"""Benchmarks of fusedclip: `python -m benchmarks` is the main job, `python -m benchmarks --help` lists the rest.

Every number is made the same way: a workload (a named list of shapes) is filled with gradients, every contender has
to pass an oracle in fp64, then the contenders take turns, and everything ends up in one JSON file from which tables
and plots are made.
"""
