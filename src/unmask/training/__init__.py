"""Training of tokenizers and transformers, and distillation of the word vectors."""
