"""Sends rank 0's records to the run's trackers, through a spool. Training never waits for one.

Files:
    command           python -m trainer.tracking: uploads a spool; the sinks by name
    database          MLflow's SQLite file: made once, artifacts next to it
    identity          which run at the trackers a directory reports to
    mlflow_sink       MLflow, used only here
    provenance        commit, versions, data: the tags of a run
    sink              the interface to a tracker, one file for each
    spool             the local file that is written first
    store             chooses where the records are sent
    system            curves of the machines: CPU, memory, disk, GPUs
    tensorboard_sink  TensorBoard's event files
    tracker           the tracker for rank 0, a no-op version, the uploader processes
    uploader          sends the spool to one tracker
    wandb_sink        Weights & Biases, used only here
"""
