"""Runs on a cluster: the ranks that torchrun or srun starts, and jobs of SLURM."""
