"""Training as a RayJob.

Files:
    drain        has the driver save before a pod goes
    rayjob.yaml  the RayJob
    submit       kubectl
"""
