"""The training loop, optimiser, schedules, metrics, parallel plans and checkpoints."""
