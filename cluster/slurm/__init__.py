"""Training as a Slurm job. Independent of cluster/ray and cluster/kubernetes.

Files:
    job.sbatch  the Slurm job
    node        the program of each of its tasks
    ports       ports that no other job on the machine is given
    ray_node    a Ray node that can share a machine with others
    submit      submits and controls it with sbatch, squeue, scancel
"""
