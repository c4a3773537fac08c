"""How a model is laid out over processes; the model itself knows nothing of it."""
