"""Sends rank 0's records to the server, through a spool. Training never waits for it.

Files:
    command      python -m trainer.tracking: uploads a spool; the sinks by name
    mlflow_sink  MLflow, used only here
    provenance   commit, versions, data: the tags of a run
    sink         the interface to a tracking server, one file for each
    spool        the local file that is written first
    store        chooses where the records are sent
    tracker      the tracker for rank 0, a no-op version, the uploader process
    uploader     sends the spool to the server
"""
