"""Run `sora-jax bench phyworld`: learn a world of Phyworld from nothing, and measure the physics of what is predicted.

Three frames of a clip are given and the other 29 predicted, by the sampler's mask. The error is that of the velocities,
on held-out clips within the ranges of training and outside (`worlds.oracle.phyworld`). Stages: train, predict and
measure, put the result among the published ones. Each leaves its result in the work folder and is not repeated.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax import console
from sora_jax.benchmarks.phyworld_table import PUBLISHED_FLOPS, draw_plot, published_rows, table
from sora_jax.config import check, from_dict, load, to_dict
from sora_jax.config_files import package_config
from sora_jax.data.packing.packs import EmptyItem, grid_of, pack_batch
from sora_jax.data.storing.drawn import DrawnConfig
from sora_jax.data.viewing.sheets import contact_sheet
from sora_jax.data.viewing.write import save_png
from sora_jax.files import read_text, write_json
from sora_jax.generate.run import Run, load_run
from sora_jax.generate.tasks import Tasks
from sora_jax.kinds.run import train
from sora_jax.models.denoiser import train_flops
from sora_jax.models.first_stage import latent_grid
from sora_jax.parallel.settings import prepare_jax
from sora_jax.train.denoiser import DenoiserRun, denoiser_parts
from sora_jax.nn.params import count
from sora_jax.worlds import HELD_OUT
from sora_jax.worlds.oracle.phyworld import Summary, VelocityError, measure, summarise
from sora_jax.worlds.phyworld import GIVEN_FRAMES, ONE_BALL, RANGES, PhyworldConfig, draw, truth
