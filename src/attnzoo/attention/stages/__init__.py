"""The steps that mixers are made of."""
