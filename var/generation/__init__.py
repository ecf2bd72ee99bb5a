"""Generation of images from labels: requests, noise, prepared networks, the loop over the scales, editing, memory."""
