"""Training as a job of a Ray cluster. Does not import Ray: it runs the program `ray`.

Files:
    cluster.yaml      a cluster for Ray's cluster launcher
    grafana.json      a dashboard of the gauges of runs
    runtime_env.yaml  files and environment of a job
    submit            submits and controls it with ray job
"""
