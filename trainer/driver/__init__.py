"""The process that starts the ranks.

Files:
    board       where driver and workers meet; what failures lead to
    growth      when a run that lost ranks takes new ones
    ray_train   Ray Train, signals, the line between worker and driver
    ray_output  which lines of Ray's processes a user sees
    start       what is checked and set before Ray or a GPU is touched
"""
