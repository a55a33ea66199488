"""What a run would hold, compute and send, computed from shapes alone."""
