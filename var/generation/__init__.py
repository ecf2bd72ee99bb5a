"""From labels to images: requests, noise, prepared networks, the loop over the scales, editing, memory."""
