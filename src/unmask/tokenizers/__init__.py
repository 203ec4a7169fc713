"""VQ tokenizers: a picture to a grid of tokens and back."""
