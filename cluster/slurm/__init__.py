"""Training as a Slurm job.

Files:
    job.sbatch  the Slurm job
    node        what each of its tasks does
    ray_node    a Ray node beside others on a machine
    submit      sbatch, squeue, scancel
"""
