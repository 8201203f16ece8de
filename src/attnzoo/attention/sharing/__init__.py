"""Which keys and values exist, and who shares them."""
