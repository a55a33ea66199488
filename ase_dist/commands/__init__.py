"""The commands: one module each, with ``parser()`` and ``main(argv)``; launch/ and ``python -m ase_dist`` call them."""
