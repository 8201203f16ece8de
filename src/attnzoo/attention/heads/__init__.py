"""How heads talk to each other, and which of them run."""
