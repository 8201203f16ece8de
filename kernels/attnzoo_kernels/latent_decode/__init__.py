"""One token's attention over cached latents that are keys and values at once: `latent_decode`."""

from attnzoo_kernels.latent_decode.api import latent_decode

__all__ = ["latent_decode"]
