"""Studies: rows and settings compared on one data set, over seeds, each question of the paper a command."""
