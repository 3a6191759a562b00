"""Models: config.json → spec → decoder with weights. Importing this package imports no torch."""
