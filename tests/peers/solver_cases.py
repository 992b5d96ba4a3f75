"""What is compared with the schedulers of diffusers: the cases, a small model in NumPy, and the committed numbers.

The model is a random two-layer network of a token and the time; its weights, the starting noise and the draws lie
in the golden file with every state at which the peer evaluated it, and the end.
"""

import dataclasses
from pathlib import Path

import numpy as np

from sora_jax.diffusion.solvers import SolverConfig
from sora_jax.diffusion.times import TimesConfig

GOLDENS = Path(__file__).parents[1] / "goldens" / "solvers.npz"
TOKENS, VALUES, HIDDEN, LONGEST = 6, 4, 16, 20
FREQUENCIES = np.arange(1, 5, dtype=np.float32)

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"rescale_betas_zero_snr": True}
SPACED = {"timestep_spacing": "trailing"}
FIXED = {"clip_sample": False, "timestep_spacing": "leading"}
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A scheduler of the peer with its arguments, and what it is called here.

    `shift` is the peer's factor on sigma / (1 - sigma) in flow matching; where `tokens` is not 0 the factor is the one
    that the peer takes for so many.
    """

    scheduler: str
    arguments: dict
    solver: SolverConfig
    process: str
    prediction_type: str = "eps"
    steps: int = 10
    spacing: str = "trailing"
    variance: str = "lower"
    shift: float = 1.0
    tokens: int = 0
    times: TimesConfig | None = None  # ours, where neither `shift` nor FLUX's rule for `tokens` says it
    last_time: float = 0.0
    clip_x0: float = 0.0

    @property
    def peer_arguments(self) -> dict:
        known = (
            {}
            if self.scheduler.startswith("FlowMatch")
            else {"prediction_type": PREDICTION_TYPES[self.prediction_type]}
        )
        return {**self.arguments, **known}


def _dpm(order: int, steps: int, prediction_type: str = "eps") -> Case:
    # The peer gives the second derivative half its weight at order 3 (test_halved_curvature_costs_an_order).
    solver = SolverConfig(f"dpm{order}", halved_curvature=order == 3)
    arguments = {**SCALED, **SPACED, "solver_order": order, "algorithm_type": "dpmsolver++"}
    return Case("DPMSolverMultistepScheduler", arguments, solver, "vp_scaled_linear", prediction_type, steps)


def _unipc(order: int, prediction_type: str) -> Case:
    arguments = {**SCALED, **SPACED, "solver_order": order, "solver_type": "bh2"}
    solver = SolverConfig("unipc" if order == 2 else "unipc3")
    return Case("UniPCMultistepScheduler", arguments, solver, "vp_scaled_linear", prediction_type)


def _ddpm(schedule: dict, process: str, prediction_type: str, peer_variance: str, variance: str) -> Case:
    # Leading steps end at the peer's step 0, the only one at which it draws nothing for every type of variance.
    arguments = {**schedule, **FIXED, "variance_type": peer_variance}
    return Case("DDPMScheduler", arguments, SolverConfig("ddpm"), process, prediction_type, 10, "leading", variance)


def _dpm_sde(steps: int, prediction_type: str = "eps") -> Case:
    arguments = {**SCALED, **SPACED, "solver_order": 2, "algorithm_type": "sde-dpmsolver++"}
    solver = SolverConfig("dpm2_sde")
    return Case("DPMSolverMultistepScheduler", arguments, solver, "vp_scaled_linear", prediction_type, steps)


CLIP = 0.5
LTX = {
    "use_dynamic_shifting": True, "base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95,
    "max_shift": 2.05, "shift_terminal": 0.1,
}  # fmt: skip
LTX_TIMES = TimesConfig(shift_rule="exponential", shift_tokens=(1024, 4096), log_shifts=(0.95, 2.05))


# The peer's other choice for the last step of DDIM, set_alpha_to_one=False, ends at the noise of its first step.
CASES = {
    "ddpm, lower variance": _ddpm(LINEAR, "vp_linear", "eps", "fixed_small", "lower"),
    "ddpm, upper variance": _ddpm(SCALED, "vp_scaled_linear", "x0", "fixed_large", "upper"),
    "ddpm, learned variance": _ddpm(LINEAR, "vp_linear", "eps", "learned_range", "learned"),
    "ddpm, cosine": _ddpm(COSINE, "vp_cosine", "v", "fixed_small", "lower"),
    "ddim": Case("DDIMScheduler", {**SCALED, **FIXED}, SolverConfig("ddim"), "vp_scaled_linear", spacing="leading"),
    "ddim, eta": Case(
        "DDIMScheduler", {**LINEAR, **FIXED}, SolverConfig("ddim", eta=0.6), "vp_linear", "v", 10, "leading"
    ),
    "ddim, zero SNR, v, trailing": Case(
        "DDIMScheduler", {**SCALED, **FIXED, **SPACED, **ZERO_SNR}, SolverConfig("ddim"),
        "vp_scaled_linear_zero_snr", "v",
    ),
    **{f"dpm{order}, {steps} steps": _dpm(order, steps) for order in (1, 2, 3) for steps in (10, 20)},
    "dpm2, v": _dpm(2, 10, "v"),
    **{f"dpm2 sde, {steps} steps": _dpm_sde(steps) for steps in (10, 20)},
    "dpm2 sde, v": _dpm_sde(10, "v"),
    **{
        f"ddpm, clipped, {form}": Case(
            "DDPMScheduler",
            {**LINEAR, **FIXED, "variance_type": "fixed_small", "clip_sample": True, "clip_sample_range": CLIP},
            SolverConfig("ddpm"), "vp_linear", form, 10, "leading", clip_x0=CLIP,
        )
        for form in ("eps", "v")
    },
    "euler, grid of Stable Diffusion": Case(
        "EulerDiscreteScheduler", {**SCALED, "timestep_spacing": "leading", "steps_offset": 1}, SolverConfig("ddim"),
        "vp_scaled_linear", spacing="leading_1",
    ),
    "flow euler, grid of SD3": Case(
        "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, SolverConfig("euler"), "linear_flow", "velocity", 10, "sd3",
        times=TimesConfig(shift_rule="constant", constant_shift=3.0),
    ),
    **{
        f"flow euler, grid of LTX, {tokens} tokens": Case(
            "FlowMatchEulerDiscreteScheduler", LTX, SolverConfig("euler"), "linear_flow", "velocity", 10, "even",
            tokens=tokens, times=LTX_TIMES, last_time=0.1,
        )
        for tokens in (512, 4992)
    },
    **{f"unipc order {order}, {form}": _unipc(order, form) for order in (2, 3) for form in ("eps", "v")},
    **{
        f"euler, {prediction_type}": Case(
            "EulerDiscreteScheduler", {**SCALED, **SPACED}, SolverConfig("ddim"), "vp_scaled_linear", prediction_type
        )
        for prediction_type in ("eps", "v")
    },
    "flow euler": Case(
        "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, SolverConfig("euler"), "linear_flow", "velocity", 10, "even"
    ),
    "flow euler, shift 3": Case(
        "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, SolverConfig("euler"), "linear_flow", "velocity", 10, "even",
        shift=3.0,
    ),
    **{
        f"flow euler, shift of {tokens} tokens": Case(
            "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, SolverConfig("euler"), "linear_flow",
            "velocity", 10, "even", tokens=tokens,
        )
        for tokens in (64, 1024, 4096)
    },
}  # fmt: skip


def fixed_inputs() -> dict[str, np.ndarray]:
    """Weights, starting noise (1, L, P) and draws (steps, 1, L, P), float32."""
    rng = np.random.default_rng(20)
    shapes = {
        "token": (VALUES, HIDDEN), "time": (2 * len(FREQUENCIES), HIDDEN), "out": (HIDDEN, 2 * VALUES),
        "start": (1, TOKENS, VALUES), "draws": (LONGEST, 1, TOKENS, VALUES),
    }  # fmt: skip
    fan_in = {"token": VALUES, "time": 2 * len(FREQUENCIES), "out": HIDDEN}
    return {k: (rng.normal(size=s) / np.sqrt(fan_in.get(k, 1))).astype(np.float32) for k, s in shapes.items()}


def network(weights, x, t, learned: bool, xp=np):
    """Predictions (B, L, P), or (B, L, 2 P) with variance values in (-1, 1), of tokens x at one time t."""
    angles = FREQUENCIES * t
    features = xp.concatenate([xp.cos(angles), xp.sin(angles)])
    y = xp.tanh(x @ weights["token"] + (features @ weights["time"])[None, None]) @ weights["out"]
    return xp.concatenate([y[..., :VALUES], xp.tanh(y[..., VALUES:])], axis=-1) if learned else y[..., :VALUES]
