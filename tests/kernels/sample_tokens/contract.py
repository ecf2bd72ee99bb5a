"""Options of sampling that every backend is held to."""

OPTIONS = [(0, 0.0), (1, 0.0), (7, 0.0), (0, 0.3), (0, 0.96), (50, 0.9), (0, 1.0), (0, 1e-9), (900, 0.96), (5000, 0.5)]
