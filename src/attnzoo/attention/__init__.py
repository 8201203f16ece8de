"""The zoo: the contract (`base`), two frames (`score`, `recurrent`), their `stages`, and variants in family folders."""
