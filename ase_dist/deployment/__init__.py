"""Trained models after training: export, programs, prediction of any picture, evaluation."""
