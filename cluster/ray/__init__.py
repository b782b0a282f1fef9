"""Training as a job of a Ray cluster.

Files:
    cluster.yaml      a cluster for Ray's autoscaler
    runtime_env.yaml  what travels with a job
    submit            ray job
"""
