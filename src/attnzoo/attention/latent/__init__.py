"""Keys and values from a low-rank latent."""
