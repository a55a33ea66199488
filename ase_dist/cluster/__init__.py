"""Cluster jobs: hostfiles, what nodes differ in, the environment they share, ssh between containers, waiting."""
