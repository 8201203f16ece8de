"""How a model that is not trained by the next token is trained and sampled."""

from __future__ import annotations

from dataclasses import dataclass

# key of `Context.shared`: the documents of each row come twice, all noised copies before all clean ones
COPIES = "[x_t ; x_0]"


@dataclass(frozen=True)
class BlockDiffusion:
    """Tokens of a block are masked and predicted at their own place, blocks follow one another (arXiv
    2512.14067).

    Args:
        block_size: B, tokens of a block, counted inside the document.
        mask_token_id: what stands for a masked token; None = an embedding beside the vocabulary's.
        clean_context: earlier blocks are read as they are, else as noised as the own one.
        half_life: eta; later places of a block are masked the more, with weights that double over eta B
            places as t goes to 0; None = all alike, with one t per sequence.
        mask_count: how t B becomes a number of tokens, "ceil" or "round".
    """

    block_size: int
    mask_token_id: int | None = None
    clean_context: bool = True
    half_life: float | None = 0.25
    mask_count: str = "ceil"

    def __str__(self) -> str:
        return "block diffusion ({})".format(", ".join(f"{k}={v}" for k, v in vars(self).items()))

    def mask_id(self, vocab_size: int) -> int:
        """The id of a masked token."""
        return vocab_size if self.mask_token_id is None else self.mask_token_id
