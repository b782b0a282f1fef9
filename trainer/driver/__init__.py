"""The process that starts the ranks.

Files:
    ray_train    Ray Train, signals, the line between worker and driver
    scale_up     when a run that lost ranks takes new ones
    start        what is checked and set before Ray or a GPU is touched
    state_actor  the state that driver and workers share; what failures lead to
"""
