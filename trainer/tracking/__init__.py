"""From rank 0 to the trackers, through a spool. Training never waits for it.

Files:
    command      python -m trainer.tracking: uploads a spool; the sinks by name
    mlflow_sink  MLflow, its only door
    provenance   commit, versions, data: the tags of a run
    sink         the interface of a tracking server, one file for each
    spool        the local file that comes first
    store        where the records go
    tracker      what rank 0 calls, a no-op twin, and the uploader process that it starts
    uploader     spool to server
"""
