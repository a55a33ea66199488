"""Short programs to copy from: the layer in loops and models of your own, and additions to what is trained here.

Each runs by itself, ``python -m ase_dist.examples.plain_loop``, within seconds on a CPU.
"""
