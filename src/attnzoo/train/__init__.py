"""Training: Lightning module, optimisers, schedules, checkpoints, run folder. Importing it is light."""
