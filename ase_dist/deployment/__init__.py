"""Trained models at work on images without labels: reading any picture, predicting, drawing, writing."""
