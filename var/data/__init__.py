"""Images in and out: data sets by class, and pictures for people."""
