"""The networks: configuration, VQ-VAE, transformer, and their files. This folder imports no other folder of `var`."""
