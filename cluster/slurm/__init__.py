"""Training as a Slurm job.

Files:
    job.sbatch  the Slurm job
    node        the program of each of its tasks
    ray_node    a Ray node that can share a machine with others
    submit      submits and controls it with sbatch, squeue, scancel
"""
