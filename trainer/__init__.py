"""The training program: command, worker, step, engines, checkpoints, tracking. May import models and data."""
