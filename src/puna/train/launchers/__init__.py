"""Files that start a training on many nodes: Slurm, Kubernetes, ssh; imports no torch."""
