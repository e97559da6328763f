"""Examples of models and programs."""
