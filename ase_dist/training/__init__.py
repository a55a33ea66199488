"""Training: the loop, the state that a resumed run needs, the process, and the record that a run leaves."""
