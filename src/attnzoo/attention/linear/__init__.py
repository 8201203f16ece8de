"""Linear-time mixers: a recurrent state instead of scores."""
