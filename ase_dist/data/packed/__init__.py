"""A data set decoded once: a few large files that training maps into memory instead of tens of thousands of small ones.

The samples are those of the folder that was packed, bit for bit.
"""
