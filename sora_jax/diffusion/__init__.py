"""The mathematics of diffusion. It imports no model and takes a `denoise` function; `process` holds the theory.

process prediction posterior     noising paths; types of prediction; the posterior of one step
times weights loss               training: noise levels, their weights, the denoising and the hybrid loss
spacing solvers guidance         sampling: grids of times, solvers, classifier-free guidance
sampling likelihood              all of it put together; the likelihood of a clip
keys                             random keys as functions of (seed, step, purpose, clip)
"""
