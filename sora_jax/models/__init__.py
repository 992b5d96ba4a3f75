"""Define what is trained: autoencoders, text encoder, denoisers."""
