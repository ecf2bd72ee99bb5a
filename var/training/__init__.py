"""Training of both networks, with checkpoints, curves and progress."""
