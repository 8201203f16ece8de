"""One run on several ranks: batches, sequences, heads and weights that they share."""
