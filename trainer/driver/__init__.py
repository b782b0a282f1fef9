"""The process that starts the ranks.

Files:
    ray_output   which lines of Ray's processes a user sees
    ray_train    Ray Train, signals, communication between workers and driver
    scale_up     decides when a run that lost ranks adds new ones
    start        checks and settings before Ray or a GPU is touched
    state_actor  state shared by driver and workers; failures and restarts
"""
