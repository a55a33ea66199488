"""Studies: baselines and settings compared on one data set over seeds, one command for each question of the paper."""
