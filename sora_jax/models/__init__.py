"""What is learnt: autoencoder, text encoder, transformer."""
