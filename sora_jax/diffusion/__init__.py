"""The mathematics of diffusion; it knows no model and takes a `denoise` function."""
