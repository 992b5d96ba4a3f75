"""Learn a world of Phyworld in pixels and measure its physics, on two CPU cores.

sora-jax bench phyworld --scenario=uniform --workdir=runs/phyworld/uniform
"""

from sora_jax.benchmarks.phyworld import PhyworldBench
from sora_jax.config import choose, to_config_dict

VARIANTS = ("", "uniform", "parabola", "collision", "tiny", "latent")


def get_config(variant: str = ""):
    choose("variant of configs/phyworld.py", variant, dict.fromkeys(VARIANTS))
    config = to_config_dict(PhyworldBench())
    if variant in ("parabola", "collision"):
        config.world.scenario = variant
    denoiser(config.run)
    if variant == "tiny":
        tiny(config)
    return config


def denoiser(run):
    run.batch = 32

    model = run.model
    model.depth = 6
    model.width = 256
    model.heads = 8
    model.latent_channels = 3
    model.patch = (1, 16, 16)
    model.text = None
    model.sincos_positions = True
    model.position_theta = 10.0
    model.remat = "none"
    model.unroll = 1

    diffusion = run.diffusion
    diffusion.prediction = "x0"
    diffusion.times.distribution = "uniform"
    diffusion.times.base_tokens = 0
    diffusion.caption_dropout = 0.0
    diffusion.given.first = 1.0
    diffusion.given.first_frames = 3
    diffusion.given.noise = 0.0

    optim = run.optim
    optim.learning_rate = 1e-3
    optim.schedule = "cosine"
    optim.warmup_steps = 100
    optim.b2 = 0.95
    optim.ema = (0.995,)

    run.sampling.steps = "4"
    run.sampling.guidance.scale = 1.0
    run.held_out.every = 0
    steps(run, 1000)


def steps(run, count):
    run.loop.steps = count
    run.loop.log_every = max(count // 50, 1)
    run.loop.save_every = -(-count // 8)
    run.loop.keep = 8


def tiny(config):
    config.clips = 64
    config.count = 4
    config.curve = 2
    config.show = 1
    config.world.frames = 8
    config.world.size = 16
    config.run.batch = 2
    config.run.model.depth = 2
    config.run.model.width = 32
    config.run.model.heads = 2
    config.run.model.unroll = 1
    steps(config.run, 4)
