"""What a run would hold, compute and send, worked out from shapes alone."""
