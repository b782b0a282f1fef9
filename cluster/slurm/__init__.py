"""Slurm: one job, one Ray node for each of its nodes."""
