"""Finds the fastest settings of a config for this machine: `python -m trainer.tune`.

Measures with bench/; knows no networks.

Files:
    candidates  what is tried, in which order
    command     python -m trainer.tune
    search      one setting after the other, keeping the best so far
"""
