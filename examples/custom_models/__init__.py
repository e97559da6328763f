"""Custom models, one file per family and architecture."""
