"""The doctor: a port against the model that is right, and which fault it most likely has."""
