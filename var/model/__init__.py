"""The networks: configuration, VQ-VAE, transformer, and their files. It imports nothing of the other folders here."""
