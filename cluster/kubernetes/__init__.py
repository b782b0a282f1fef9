"""Training as a RayJob. Independent of cluster/slurm and cluster/ray.

Files:
    Dockerfile               the image
    Dockerfile.dockerignore  what is not sent to its build
    drain                    makes the driver save before its pod is deleted
    rayjob.yaml              the RayJob
    submit                   submits and controls it with kubectl
"""
