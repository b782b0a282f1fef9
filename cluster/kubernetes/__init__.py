"""Training as a RayJob.

Files:
    drain        makes the driver save before its pod is deleted
    rayjob.yaml  the RayJob
    submit       submits and controls it with kubectl
"""
