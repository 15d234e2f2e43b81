"""The files of diffusers' networks and schedulers, and what each library makes of them (mutations.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from oracle import randomise

from solrl_jax import weights
from solrl_jax.models import dcae, flux, flux2, sana, sd35, vae, zimage
from solrl_jax.models.schedule import SanaSchedule, Schedule
from tests import (
    nano_flux2,
    nano_sana,
    nano_sd35,
    nano_zimage,
    test_flux,
    test_flux2,
    test_sana,
    test_sd35,
    test_zimage,
)
from tests.mutations import Case, by_config, compiled, rebuilt, write

# --- diffusers' networks --------------------------------------------------------------------------------------------


def flux_case(folder):
    model = test_flux.make_transformer(folder)
    raw = json.loads((folder / "config.json").read_text())
    given = test_flux.inputs(flux.FluxConfig(**test_flux.SMALL), 3, 4, 5)

    def ours():
        cfg = flux.FluxConfig.read(folder)
        files = weights.Files(folder, "diffusion_pytorch_model")
        params = weights.load(files, test_flux.shapes_of(cfg), flux.KEYS)
        module, rope = flux.FluxTransformer(cfg, jnp.float32), test_flux.table_of(cfg, 3, 4, 5)
        return compiled(module)(params, (), {**given, "rope": rope})

    def theirs(raw):
        return test_flux.theirs(rebuilt(FluxTransformer2DModel, raw, model.state_dict()), given, 3, 4)

    others = {"out_channels": [8, 16, 32], "axes_dims_rope": [[6, 6, 4], [2, 6, 6]]}
    return Case(write(folder, raw), theirs, by_config(flux.FluxConfig.read, folder, ours), others)


def flux2_case(folder):
    model = test_flux2.make_transformer()
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    given = test_flux2.inputs(flux2.Flux2Config(**test_flux2.SMALL), 3, 4, 5)

    def ours():
        cfg = flux2.Flux2Config.read(folder)
        files = weights.Files(folder, "diffusion_pytorch_model")
        params = weights.load(files, test_flux2.shapes_of(cfg), flux2.KEYS)
        return test_flux2.ours(params, given, 3, 4, cfg=cfg)

    def theirs(raw):
        return test_flux2.theirs(rebuilt(Flux2Transformer2DModel, raw, model.state_dict()), given, 3, 4)

    others = {"out_channels": [8, 16, 32], "axes_dims_rope": [[6, 4, 4, 2], [8, 8]], "rope_theta": [100]}
    others |= {"eps": [0.1], "patch_size": [2], "mlp_ratio": [2.0], "guidance_embeds": [True]}
    return Case(write(folder, raw), theirs, by_config(flux2.Flux2Config.read, folder, ours), others)


def sd35_case(folder):
    model = test_sd35.make_transformer(**nano_sd35.MEDIUM)
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    given = test_sd35.inputs(sd35.Sd35Config(**nano_sd35.TRANSFORMER_FIELDS))

    def ours():
        cfg = sd35.Sd35Config.read(folder)
        files = weights.Files(folder, "diffusion_pytorch_model")
        params = weights.load(files, test_sd35.shapes_of(cfg), sd35.keys(cfg))
        return compiled(sd35.Sd35Transformer(cfg, jnp.float32))(params, (), given)

    def theirs(raw):
        return test_sd35.theirs(rebuilt(SD3Transformer2DModel, raw, model.state_dict()), given)

    others = {"qk_norm": ["layer_norm"], "dual_attention_layers": [[0], [1, 2]]}
    return Case(write(folder, raw), theirs, by_config(sd35.Sd35Config.read, folder, ours), others)


def sana_case(folder):
    model = test_sana.make_transformer()
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    given = test_sana.inputs(sana.SanaConfig(**nano_sana.TRANSFORMER))

    def ours():
        cfg = sana.SanaConfig.read(folder)
        files = weights.Files(folder, "diffusion_pytorch_model")
        params = weights.load(files, test_sana.shapes_of(cfg), sana.KEYS)
        return compiled(sana.SanaTransformer(cfg, jnp.float32))(params, (), given)

    def theirs(raw):
        found = rebuilt(SanaTransformer2DModel, raw, model.state_dict())
        scaled = given | {"sigma": given["sigma"] * found.config.timestep_scale}  # as SanaPipeline does
        return test_sana.theirs(found, scaled)

    others = {"qk_norm": ["rms_norm_across_heads"], "interpolation_scale": [1.0], "timestep_scale": [0.5]}
    return Case(write(folder, raw), theirs, by_config(sana.SanaConfig.read, folder, ours), others)


def zimage_case(folder):
    model = nano_zimage.make_transformer()
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    given = test_zimage.inputs(test_zimage.SMALL)

    def ours():
        cfg = zimage.ZImageConfig.read(folder)
        files = weights.Files(folder, "diffusion_pytorch_model")
        params = weights.load(files, test_zimage.shapes_of(cfg), zimage.KEYS)
        return test_zimage.ours(params, given, cfg=cfg)

    def theirs(raw):
        return test_zimage.theirs(rebuilt(ZImageTransformer2DModel, raw, model.state_dict()), given)

    others = {"axes_dims": [[6, 6, 4], [4, 4, 8]], "all_patch_size": [[4], [2, 4]], "all_f_patch_size": [[2]]}
    others |= {"siglip_feat_dim": [16], "qk_norm": [False], "t_scale": [500.0], "rope_theta": [100.0]}
    return Case(write(folder, raw), theirs, by_config(zimage.ZImageConfig.read, folder, ours), others)


def decoder_case(folder, model, kind, shape, read, load, others):
    """The decoding half, of latents, as a pipeline does it."""
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def ours():
        module, params = load(folder, jnp.float32)
        return jitted_decode(module, params, latents)

    def theirs(raw):
        found = rebuilt(kind, raw, model.state_dict(), ("encoder.",))
        shift = getattr(found.config, "shift_factor", 0) or 0
        z = torch.tensor(latents).permute(0, 3, 1, 2) / found.config.scaling_factor + shift
        with torch.no_grad():
            return (found.decode(z).sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    return Case(write(folder, raw), theirs, by_config(read, folder, ours), others)


jitted_decode = jax.jit(vae.decode, static_argnums=0)


def vae_case(folder):
    others = {"act_fn": ["relu", "gelu"], "latents_mean": [[0.5] * 4], "latents_std": [[2.0] * 4]}
    others |= {"down_block_types": [["AttnDownEncoderBlock2D"] * 2], "up_block_types": [["AttnUpDecoderBlock2D"] * 2]}
    model = randomise(AutoencoderKL(**nano_sd35.VAE))
    return decoder_case(folder, model, AutoencoderKL, (1, 4, 4, 4), vae.VaeConfig.read, vae.load_vae, others)


def flux2_vae_case(folder):
    """The decoding half, of normalised patches, as a pipeline does it."""
    model = nano_flux2.make_vae()
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    latents = np.random.default_rng(0).normal(size=(1, 2, 2, 16)).astype(np.float32)

    def ours():
        return jitted_decode(*vae.load_flux2(folder, jnp.float32), latents)

    def theirs(raw):
        return test_flux2.decoded(rebuilt(AutoencoderKLFlux2, raw, model.state_dict(), ("encoder.",)), latents)

    others = {"act_fn": ["relu"], "patch_size": [[1, 1], [4, 4]], "batch_norm_eps": [0.1]}
    others |= {"decoder_block_out_channels": [[8, 16], [8, 8], [16]], "use_quant_conv": [False]}
    others |= {"down_block_types": [["AttnDownEncoderBlock2D"] * 2], "up_block_types": [["AttnUpDecoderBlock2D"] * 2]}
    return Case(write(folder, raw), theirs, by_config(vae.Flux2VaeConfig.read, folder, ours), others)


def dcae_case(folder):
    blocks, scales = ["ResBlock", "ResBlock", "EfficientViTBlock"], [[], [], [3]]
    others = {f"{half}_block_types": [blocks] for half in ("encoder", "decoder")}
    others |= {f"{half}_qkv_multiscales": [scales] for half in ("encoder", "decoder")}
    others |= {"upsample_block_type": ["pixel_shuffle"], "downsample_block_type": ["pixel_unshuffle"]}
    others |= {"decoder_norm_types": ["batch_norm"], "decoder_act_fns": ["relu"], "decoder_conv_act_fn": ["silu"]}
    return decoder_case(folder, random_dcae(), AutoencoderDC, (1, 4, 4, 4), dcae.DcaeConfig.read, dcae.load, others)


def random_dcae():
    return randomise(AutoencoderDC(**nano_sana.VAE))


# --- schedulers -----------------------------------------------------------------------------------------------------


def flow_case(folder, model):
    """The sigmas, and one step of a sampler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=model != "sd35")
    scheduler.save_pretrained(folder)
    file = folder / "scheduler_config.json"
    raw = json.loads(file.read_text())
    x, v = (np.random.default_rng(i).normal(size=(1, 4, 4)).astype(np.float32) for i in range(2))

    def ours():
        schedule = Schedule.read(folder)
        if model == "flux":
            sigmas = flux.sigmas(6, 1024, schedule)
        elif model == "flux2":
            sigmas = flux2.sigmas(6, 1024, schedule)
        else:
            sd35.check_schedule(folder, schedule)
            sigmas = sd35.sigmas(6, schedule.shift)
        return np.concatenate([sigmas, np.ravel(x + (sigmas[1] - sigmas[0]) * v)])

    def theirs(raw):
        found, names = FlowMatchEulerDiscreteScheduler.from_config(raw), ("base_image_seq_len", "max_image_seq_len")
        c = found.config
        mu = calculate_shift(1024, *(c[n] for n in names), c["base_shift"], c["max_shift"])
        mu = compute_empirical_mu(1024, 6) if model == "flux2" else mu
        if model != "sd35":
            found.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=mu)
        else:
            found.set_timesteps(6, mu=mu if c["use_dynamic_shifting"] else None)
        generator = torch.Generator().manual_seed(0)
        step = found.step(torch.tensor(v), found.timesteps[0], torch.tensor(x), generator=generator).prev_sample
        return np.concatenate([found.sigmas, np.ravel(step)])

    others = {"shift_terminal": [0.1], "time_shift_type": ["linear"]}
    return Case(write(folder, raw, file.name), theirs, ours, others)


def dpm_case(folder):
    """The sigmas: SANA's steps are by the solver that a config names, not by this scheduler."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=2
    )
    scheduler.save_pretrained(folder)
    file = folder / "scheduler_config.json"
    raw = json.loads(file.read_text())

    def theirs(raw):
        found = DPMSolverMultistepScheduler.from_config(raw)
        found.set_timesteps(6)
        return found.sigmas.numpy()

    def ours():
        return sana.sigmas(6, SanaSchedule.read(folder).flow_shift)

    others = {"beta_schedule": ["scaled_linear"], "trained_betas": [[0.1, 0.2]], "prediction_type": ["epsilon"]}
    others |= {"algorithm_type": ["sde-dpmsolver++"], "solver_type": ["heun"], "final_sigmas_type": ["sigma_min"]}
    others |= {"variance_type": ["learned_range"], "timestep_spacing": ["trailing"], "time_shift_type": ["linear"]}
    return Case(write(folder, raw, file.name), theirs, ours, others)
