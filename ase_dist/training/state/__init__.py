"""What a resumed run needs: weights, optimiser state, random states, history, in portable checkpoints."""
