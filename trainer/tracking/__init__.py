"""From rank 0 to the trackers, through a spool. Training never waits for it.

Files:
    command      python -m trainer.tracking: replays a spool; the delivery process
    delivery     spool to server
    mlflow_sink  MLflow, its only door
    provenance   commit, versions, data: the tags of a run
    sink         what delivery asks of a server
    spool        the local file that comes first
    store        where the records go
    tracker      what rank 0 calls, a no-op twin, and the delivery process that it starts
"""
