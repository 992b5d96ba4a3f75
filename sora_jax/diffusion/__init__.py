"""The mathematics of diffusion; it knows no model and takes a `denoise` function. `process` holds the theory.

process prediction posterior     noising paths; what a model predicts; one step back
times weights loss               training: noise levels, what counts, the denoising and the hybrid loss
spacing solvers guidance         sampling: grids of times, walks down them, conditions made stronger
sampling likelihood mixture      put together; the density of a clip; the truth that tests are held against
keys                             every random draw as a function of (seed, step, purpose, clip)
"""
