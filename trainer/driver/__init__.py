"""The process that starts the ranks. Knows neither networks nor losses.

Files:
    children      child processes that outlive the terminal but not the driver
    connection    the Ray that runs take place on: a cluster, or one started here; what of its output is shown
    controller    what Ray Train's own process is given: how ranks meet
    forked_ranks  a group of ranks without Ray, forked from a loaded process
    gauges        which curves Ray shows to Prometheus
    notifier      tells a web address what becomes of a run
    preemption    notices that a node is taken back
    ray_train     Ray Train, signals, communication between workers and driver
    room          room for the ranks on the nodes; says what a run waits for
    scale_up      decides when a run that lost ranks adds new ones
    start         checks before Ray or a GPU is touched
    state_actor   state shared by driver and workers; failures and restarts
    sweeper       ends what a killed driver left of its Ray
"""
