"""Sends rank 0's records to the server, through a spool. Training never waits for it.

Files:
    command      python -m trainer.tracking: uploads a spool; the sinks by name
    database     MLflow's SQLite file: made once, artifacts next to it
    identity     which run on the server a directory reports to
    mlflow_sink  MLflow, used only here
    provenance   commit, versions, data: the tags of a run
    sink         the interface to a tracking server, one file for each
    spool        the local file that is written first
    store        chooses where the records are sent
    tracker      the tracker for rank 0, a no-op version, the uploader process
    uploader     sends the spool to the server
"""
