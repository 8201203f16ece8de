"""The zoo: the contract (`base`), two skeletons (`score`, `recurrent`), `stages`, variants by family."""
