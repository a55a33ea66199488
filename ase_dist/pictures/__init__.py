"""Drawing: colours of labels and predictions, legends, grids of truth and prediction, sheets."""
