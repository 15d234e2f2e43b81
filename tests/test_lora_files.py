"""LoRA files as peft and diffusers write them: read as they read them, for all models; what is refused."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from oracle import error, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from solrl_jax import lora, weights
from solrl_jax.config import Lora
from solrl_jax.models import flux, flux2, sana, sd35, zimage
from solrl_jax.models.flux import FluxConfig, FluxTransformer
from solrl_jax.models.flux2 import Flux2Config, Flux2Transformer
from solrl_jax.models.sana import SanaConfig, SanaTransformer
from solrl_jax.models.sd35 import Sd35Config, Sd35Transformer
from solrl_jax.models.zimage import ZImageTransformer
from solrl_jax.structs import leaves_by_path
from solrl_jax.weights import WeightsError, lora_files
from tests import nano_sana, nano_sd35, nano_zimage, test_flux, test_flux2, test_sana, test_sd35, test_zimage
from tests.test_lora import SMALL

CFG = Lora(rank=3, alpha=7.0)  # of the run that reads: it must not matter
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=["flux", "flux2", "sd35", "sana", "zimage"])
def family(request):
    return FAMILIES[request.param]()


def make_flux():
    def make():
        return randomise(FluxTransformer2DModel(**SMALL | {"guidance_embeds": True}))

    cfg = FluxConfig(**SMALL, guidance_embeds=True)
    given, table = test_flux.inputs(cfg, 3, 4, 5), test_flux.table_of(cfg, 3, 4, 5)
    network = FluxTransformer(cfg, jnp.float32)
    return SimpleNamespace(
        make=make,
        pipeline=FluxPipeline,
        base=weights.load(test_flux.Held(make()), test_flux.shapes_of(cfg), flux.KEYS),
        tables=(flux.KEYS, flux.COMFY, ()),
        ours=jax.jit(lambda params: network.apply({"params": params}, **given, rope=table)),
        policy=jax.jit(lambda variables: network.apply(variables, **given, rope=table)),
        theirs=lambda model: test_flux.theirs(model, given, 3, 4),
        lora_targets=flux.LORA_TARGETS,
        targets=["to_q", "to_v", "to_out.0", "proj_mlp"],
        some=r"transformer_blocks\.1\.attn\.to_[qv]",
        one="transformer_blocks.0.attn.to_q",
        tolerance=3e-5,  # as the base's: sin(1000 sigma f)
    )


def make_flux2():
    cfg = Flux2Config(**test_flux2.SMALL)
    given, table = test_flux2.inputs(cfg, 3, 4, 5), test_flux2.table_of(cfg, 3, 4, 5)
    network = Flux2Transformer(cfg, jnp.float32)
    return SimpleNamespace(
        make=test_flux2.make_transformer,
        pipeline=Flux2KleinPipeline,
        base=weights.load(test_flux.Held(test_flux2.make_transformer()), test_flux2.shapes_of(cfg), flux2.KEYS),
        tables=(flux2.KEYS, flux2.COMFY, ()),
        ours=jax.jit(lambda params: network.apply({"params": params}, **given, rope=table)),
        policy=jax.jit(lambda variables: network.apply(variables, **given, rope=table)),
        theirs=lambda model: test_flux2.theirs(model, given, 3, 4),
        lora_targets=flux2.LORA_TARGETS,
        targets=["to_q", "to_v", "to_out.0", "to_qkv_mlp_proj"],
        some=r".*transformer_blocks\.1\.attn\.to_(q|v|out\.0|qkv_mlp_proj)",
        one="transformer_blocks.0.attn.to_q",
        tolerance=3e-5,
    )


def velocity_of_zimage(variables, x, sigma, length, text):
    network, (height, width) = ZImageTransformer(test_zimage.SMALL, jnp.float32), x.shape[1:3]
    where = zimage.places(test_zimage.SMALL, height // 2, width // 2, text.shape[1])
    out = jnp.asarray(network.apply(variables, zimage.pack(x), sigma, length, where, text))
    return zimage.unpack(out, height, width)


def make_zimage():
    given = test_zimage.inputs(test_zimage.SMALL)
    return SimpleNamespace(
        make=nano_zimage.make_transformer,
        pipeline=ZImagePipeline,
        base=test_zimage.params_of(nano_zimage.make_transformer()),
        tables=(zimage.KEYS, zimage.COMFY, ()),
        ours=lambda params: test_zimage.ours(params, given),
        policy=jax.jit(lambda variables: velocity_of_zimage(variables, **given)),
        theirs=lambda model: test_zimage.theirs(model, given),
        lora_targets=zimage.LORA_TARGETS,
        targets=["to_q", "to_v", "to_out.0", "feed_forward.w1"],
        some=r"(layers|context_refiner)\.1\.attention\.to_[qv]",
        one="layers.0.attention.to_q",
        tolerance=3e-5,  # rounding, which differs by CPU: 1.6e-5 was seen
    )


def make_sd35():
    cfg = Sd35Config(**nano_sd35.TRANSFORMER_FIELDS, **nano_sd35.MEDIUM)
    given, network = test_sd35.inputs(cfg), Sd35Transformer(cfg, jnp.float32)

    def make():
        return test_sd35.make_transformer(**nano_sd35.MEDIUM)

    return SimpleNamespace(
        make=make,
        pipeline=StableDiffusion3Pipeline,
        base=weights.load(test_flux.Held(make()), test_sd35.shapes_of(cfg), sd35.keys(cfg)),
        tables=(sd35.keys(cfg), sd35.comfy(cfg), ()),
        ours=jax.jit(lambda params: network.apply({"params": params}, **given)),
        policy=jax.jit(lambda variables: network.apply(variables, **given)),
        theirs=lambda model: test_sd35.theirs(model, given),
        lora_targets=sd35.LORA_TARGETS,
        targets=["attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj"],
        some=r"transformer_blocks\.[03]\.attn\.to_[qv]",
        one="transformer_blocks.0.attn.to_q",
        tolerance=1e-5,
    )


def make_sana():
    cfg = SanaConfig(**nano_sana.TRANSFORMER)
    given, network = test_sana.inputs(cfg), SanaTransformer(cfg, jnp.float32)
    return SimpleNamespace(
        make=test_sana.make_transformer,
        pipeline=SanaPipeline,
        base=weights.load(test_flux.Held(test_sana.make_transformer()), test_sana.shapes_of(cfg), sana.KEYS),
        tables=(sana.KEYS, (), sana.NATIVE[0].keys),
        ours=jax.jit(lambda params: network.apply({"params": params}, **given)),
        policy=jax.jit(lambda variables: network.apply(variables, **given)),
        theirs=lambda model: test_sana.theirs(model, given),
        lora_targets=sana.LORA_TARGETS,
        targets=["attn1.to_q", "attn1.to_v", "attn2.to_out.0", "conv_inverted", "conv_point"],
        some=r"transformer_blocks\.1\.attn1\.to_[qv]",
        one="transformer_blocks.0.attn1.to_q",
        tolerance=1e-5,
    )


FAMILIES = {
    "flux": make_flux,
    "flux2": make_flux2,
    "sd35": make_sd35,
    "sana": make_sana,
    "zimage": make_zimage,
}


WITH_TEXT = (FluxPipeline, StableDiffusion3Pipeline)
"""Pipelines that adapt text encoders too."""


def load(family, place):
    keys, comfy, native = family.tables
    return lora_files.load(place, family.base, keys, CFG, comfy, native)


def drawn(model):
    """The adapters' factors, both, at random: a fresh B is zero."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def patterns(family, **changes):
    """A config with a rank and an alpha of its own for some modules."""
    inner, last = family.targets[0], family.targets[-1]
    own = {"rank_pattern": {f"^{family.one}": 6, last: 2}, "alpha_pattern": {inner: 10, last: 5}}
    return LoraConfig(r=4, lora_alpha=7, target_modules=family.targets, **own, **changes)


# --- each layout: write(family, folder) -> (what to load, diffusers' or peft's model with it) ------------------------


def some_layers(family, folder):
    """A pipeline's file without metadata, of two Linears in a block or two."""
    model = family.make()
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=family.some))
    layers = get_peft_model_state_dict(drawn(model))
    family.pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder, again(family, folder / "pytorch_lora_weights.safetensors", "transformer")


def again(family, file, prefix, metadata=None, **kwargs):
    """A fresh transformer of diffusers that has loaded the file."""
    model = family.make()
    model.load_lora_adapter(load_file(file), prefix=prefix, metadata=metadata, **kwargs)
    return model


def underscored(family, folder):
    """As kohya's trainers of networks with diffusers' modules write: "_" for every dot, and the default alpha of 1."""
    _, model = some_layers(family, folder)
    tensors = {}
    for key, x in load_file(folder / "pytorch_lora_weights.safetensors").items():
        name, end = key.removeprefix("transformer.").split(".lora_")
        name = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{name}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = x
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, folder / "x.safetensors")
    model.set_adapters(model.active_adapters(), [1 / 4])
    return folder / "x.safetensors", model


def adapter_of_a_transformer(family, folder, **changes):
    model = family.make()
    model.add_adapter(patterns(family, **changes))
    drawn(model).save_lora_adapter(folder)
    model = family.make()
    model.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    return folder / "pytorch_lora_weights.safetensors", model


def rslora_of_a_transformer(family, folder):
    return adapter_of_a_transformer(family, folder, use_rslora=True)


def pipeline_with_text(family, folder):
    """Both parts with their metadata, where the pipeline can adapt text encoders."""
    model = family.make()
    model.add_adapter(patterns(family))
    kwargs = {"transformer_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    if family.pipeline in WITH_TEXT:
        factors = {f"{TEXT}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
        kwargs |= {
            "text_encoder_lora_layers": factors,
            "text_encoder_lora_adapter_metadata": {"r": 4, "use_dora": True},
        }
    family.pipeline.save_lora_weights(folder, get_peft_model_state_dict(drawn(model)), **kwargs)
    file = folder / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as f:
        metadata = json.loads(f.metadata()["lora_adapter_metadata"])
    return file, again(family, file, "transformer", metadata)


def peft_folder(family, folder, **changes):
    drawn(get_peft_model(family.make(), patterns(family, **changes))).save_pretrained(folder)
    return folder, PeftModel.from_pretrained(family.make(), folder).base_model.model


def peft_rslora(family, folder):
    return peft_folder(family, folder, use_rslora=True)


def two_adapters(family, folder):
    """As DiffusionNFT and Sol-RL save: the policy in the folder, the one that rolls out in old/."""
    model = get_peft_model(family.make(), patterns(family))
    model.add_adapter("old", LoraConfig(r=2, lora_alpha=8, target_modules=family.targets))
    drawn(model).save_pretrained(folder / "lora")
    return folder / "lora" / "old", PeftModel.from_pretrained(family.make(), folder / "lora" / "old").base_model.model


def with_adapter_names(family, folder):
    """A state dict that was saved as it was: the adapter's name stands in every key."""
    place, model = peft_folder(family, folder)
    file = place / "adapter_model.safetensors"
    save_file({key.replace(".weight", ".default.weight"): x for key, x in load_file(file).items()}, file)
    return file, model


def pickled(family, folder):
    place, model = peft_folder(family, folder)
    torch.save(load_file(place / "adapter_model.safetensors"), place / "adapter_model.bin")
    (place / "adapter_model.safetensors").unlink()
    return place, model


LAYOUTS = [
    some_layers,
    underscored,
    adapter_of_a_transformer,
    rslora_of_a_transformer,
    pipeline_with_text,
    peft_folder,
    peft_rslora,
]
LAYOUTS += [two_adapters, with_adapter_names, pickled]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("write", LAYOUTS)
def test_read_as_peft_and_diffusers_read(family, tmp_path, write):
    """Velocities of the same base with the same file, in float32."""
    place, model = write(family, tmp_path)
    found, said = load(family, place)
    merged = lora.graft(family.base, lora.merged_kernels(family.base, found, CFG))
    theirs = family.theirs(model)
    assert error(family.ours(merged), theirs) < family.tolerance
    assert error(family.ours(family.base), theirs) > 0.05
    assert (len(said) == 2) == (write is pipeline_with_text and family.pipeline in WITH_TEXT)


@pytest.mark.usefixtures("one_thread")
def test_alphas_of_a_flux_file(tmp_path):
    """Tensors beside the factors, all or none; diffusers takes them for FLUX."""
    family, model = make_flux(), make_flux().make()
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=family.targets))
    factors = {f"transformer.{key}": x for key, x in get_peft_model_state_dict(drawn(model)).items()}
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in factors})
    alphas = {f"{name}.alpha": torch.tensor([2.0, 4.0, 6.0][i % 3]) for i, name in enumerate(modules)}
    save_file(factors | alphas, tmp_path / "x.safetensors")
    state, own = FluxPipeline.lora_state_dict(str(tmp_path / "x.safetensors"), return_alphas=True)
    assert len(own) == len(modules) == 2 * 3 + 3 * 3
    theirs = family.make()
    theirs.load_lora_adapter(state, network_alphas={key: float(x) for key, x in own.items()}, prefix="transformer")
    found = load(family, tmp_path / "x.safetensors").adapter
    merged = lora.graft(family.base, lora.merged_kernels(family.base, found, CFG))
    assert error(family.ours(merged), family.theirs(theirs)) < family.tolerance
    save_file(factors | {key: alphas[key] for key in list(alphas)[1:]}, tmp_path / "x.safetensors")
    with pytest.raises(
        WeightsError, match=rf"missing {modules[0]}.alpha, though others have one, and readers then differ"
    ):
        load(family, tmp_path / "x.safetensors")


# --- what a file says and what it does not --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small FLUX and a folder of PEFT for it: rank 4 and alpha 8 on to_q and to_v, 10 Linears."""
    family, folder = make_flux(), tmp_path_factory.mktemp("peft")
    model = get_peft_model(family.make(), LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]))
    drawn(model).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    return SimpleNamespace(family=family, tensors=load_file(file), config=json.loads(file.with_name(NAME).read_text()))


NAME = "adapter_config.json"


def written(folder, tensors, config=None, metadata=None, name="adapter_model.safetensors"):
    if config is not None:
        (folder / NAME).write_text(json.dumps(config))
    save_file(tensors, folder / name, metadata)
    return folder / name


def test_how_much_is_adapted_is_told(small, tmp_path):
    """A set for a model of fewer blocks fits: it is taken, and it is told that blocks are left."""
    found, said = load(small.family, written(tmp_path, small.tensors, small.config))
    assert said == ("LoRA of rank 4 on 10 of 56 Linears, in 5 of 5 blocks",)
    fewer = {key: x for key, x in small.tensors.items() if ".transformer_blocks.1." not in key}
    part, said = load(small.family, written(tmp_path, fewer, small.config))
    assert said == ("LoRA of rank 4 on 8 of 56 Linears, in 4 of 5 blocks; the others are not changed",)
    assert jax.tree.structure(part) == jax.tree.structure(found)
    for path, x in leaves_by_path(part).items():
        whole = leaves_by_path(found)[path]
        if path.startswith("transformer_blocks"):
            assert x.shape == whole.shape and not np.any(x[1]) and np.array_equal(x[0], whole[0])
        else:
            np.testing.assert_array_equal(x, whole)
    text = {f"{prefix}{TEXT}.lora_A.weight": torch.ones(4, 4) for prefix in ("text_encoder.", "text_encoder_2.")}
    text |= {f"lora_te{i}_{TEXT.replace('.', '_')}.alpha": torch.ones(()) for i in (1, 2)}
    more, said = load(small.family, written(tmp_path, small.tensors | text, small.config))
    assert said[1].startswith("4 keys of text encoders are left out (") and said[1].endswith("those do not change")
    jax.tree.map(np.testing.assert_array_equal, more, found)
    with pytest.raises(WeightsError, match=r"it has only keys of a text encoder \((lora_te|text_encoder)"):
        load(small.family, written(tmp_path, text, name="x.safetensors"))


def test_our_own_file_comes_back_to_the_bit(small, tmp_path):
    """A scale of 2, and stacks with ranks and layers of their own: what is read is written as it was."""
    fewer = {key: x for key, x in small.tensors.items() if ".transformer_blocks.1." not in key}
    found = load(small.family, written(tmp_path, fewer, small.config)).adapter
    keys, comfy, _ = small.family.tables
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    one, two = (Lora(rank=4, alpha=8.0), Lora(rank=1, alpha=1.0))
    lora_files.save(files[0], found, keys, one)
    lora_files.save(files[1], lora_files.load(files[0], small.family.base, keys, one).adapter, keys, one)
    before, after = map(load_file, files)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = lora_files.load(files[0], small.family.base, keys, two).adapter
    jax.tree.map(np.testing.assert_array_equal, again, lora.scaled(found, one))
    lora_files.save_fused(files[0], found, small.family.base, keys, comfy, one)
    again = lora_files.load(files[0], small.family.base, keys, one, comfy).adapter
    products = [lora.merged_kernels(small.family.base, x, one) for x in (found, again)]
    jax.tree.map(np.testing.assert_array_equal, *products)


def test_the_original_names_of_sana(tmp_path):
    """Sol-RL trains the native checkpoint: its adapters have qkv and kv_linear in one."""
    family = make_sana()

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.cross_attn = torch.nn.Module(), torch.nn.Module()
            self.attn.qkv, self.attn.proj = torch.nn.Linear(48, 144), torch.nn.Linear(48, 48)
            self.cross_attn.q_linear, self.cross_attn.kv_linear = torch.nn.Linear(48, 48), torch.nn.Linear(48, 96)
            self.cross_attn.proj = torch.nn.Linear(48, 48)

    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(Block() for _ in range(3))
    wrapped = drawn(get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(sana.LORA_TARGETS))))
    wrapped.save_pretrained(tmp_path)
    found, said = load(family, tmp_path)
    assert said == ("LoRA of rank 4 on 15 of 27 Linears, in 3 of 3 blocks",)
    ours = {path: x for path, x in leaves_by_path(lora.scaled(found, CFG)).items() if path.startswith("blocks/")}
    assert len(ours) == 2 * 5 == len(leaves_by_path(found))
    for name, layer in wrapped.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            _, number, rest = name.split(".", 2)
            a, b = (ours[f"blocks/{rest.replace('.', '/')}/{x}"][int(number)] for x in "ab")
            np.testing.assert_allclose((a @ b).T, layer.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-5)


CONFIGS = [
    ({"use_dora": True}, "has use_dora, which is more than a LoRA: give a plain one"),
    ({"lora_bias": True}, "has lora_bias, which is more than a LoRA"),
    ({"modules_to_save": ["proj_out"]}, "has modules_to_save, which"),
    ({"bias": "all"}, "has bias all, which"),
    ({"peft_type": "LOHA"}, "has peft_type LOHA, which"),
    ({"init_lora_weights": "pissa", "use_qalora": True}, "has use_qalora, init_lora_weights pissa, which"),
    ({"layer_replication": [[0, 1]]}, "has layer_replication, which"),
    ({"something_new": 3}, "has something_new, which"),
    ({"r": None}, "says r None, not a whole number above 0: export it again"),
    ({"r": 8}, r"says rank 8 of \S+to_[qv], whose factors have rank 4: export it again"),
    ({"rank_pattern": {"to_q": 2}}, r"says rank 2 of \S+to_q, whose factors have rank 4"),
    ({"rank_pattern": [3]}, r"says rank_pattern \[3\], not an object"),
    ({"alpha_pattern": {"to_(": 2}}, r"alpha_pattern has 'to_\(', not a pattern"),
    ({"alpha_pattern": {"to_q": "x"}}, "says alpha_pattern to_q 'x', not a number"),
    ({"lora_alpha": 10**400}, "says lora_alpha 1000.*, not a number"),
    ({"use_rslora": "no"}, "says use_rslora 'no', not true or false"),
]


@pytest.mark.parametrize(("change", "words"), CONFIGS)
def test_configs_that_are_refused(small, tmp_path, change, words):
    """In adapter_config.json and in a file's metadata alike."""
    file = written(tmp_path, small.tensors, small.config | change)
    with pytest.raises(WeightsError, match=rf"^{tmp_path / NAME}:? {words}"):
        load(small.family, tmp_path)
    stated = {f"transformer.{key}": value for key, value in (small.config | change).items()}
    tensors = {key.replace("base_model.model.", "transformer."): x for key, x in small.tensors.items()}
    file = written(tmp_path, tensors, None, {"lora_adapter_metadata": json.dumps(stated)}, "x.safetensors")
    with pytest.raises(WeightsError, match=rf"^{file}: its lora_adapter_metadata:? {words}"):
        load(small.family, file)


def test_files_that_are_refused(small, tmp_path):
    with pytest.raises(WeightsError, match=rf"^{tmp_path} holds no LoRA file: none of .*, adapter_model.bin is there$"):
        load(small.family, tmp_path)
    file = written(tmp_path, small.tensors)
    with pytest.raises(WeightsError, match=rf"^{file} is an adapter of PEFT, .* adapter_config.json: put it beside"):
        load(small.family, file)
    scaled = tmp_path / f"{file.name}:0.5"
    with pytest.raises(WeightsError, match=rf"^{scaled} does not exist: only --config.model.lora takes a scale; leave"):
        load(small.family, scaled)
    key = next(iter(small.tensors))
    twice = small.tensors | {key.replace(".weight", ".old.weight"): torch.ones(4, 48)}
    with pytest.raises(WeightsError, match="are one factor of two adapters: give a file with one of them"):
        load(small.family, written(tmp_path, twice, small.config))
    alphas = {key.split(".lora_")[0] + ".alpha": torch.ones(()) for key in small.tensors}
    with pytest.raises(WeightsError, match=rf"alpha beside the alpha that {tmp_path / NAME} states: keep one of them"):
        load(small.family, written(tmp_path, small.tensors | alphas, small.config))
    other = {key.replace("to_q", "to_z"): x for key, x in small.tensors.items()}
    with pytest.raises(WeightsError, match=r"unused base_model\.model\.\S+to_z\.lora_A\.weight"):
        load(small.family, written(tmp_path, other, small.config))
    deeper = small.tensors | {key.replace("transformer_blocks.0", "transformer_blocks.7"): torch.ones(4, 48)}
    with pytest.raises(WeightsError, match=r"unused base_model\.model\.\S*transformer_blocks\.7\."):
        load(small.family, written(tmp_path, deeper, small.config))
    (tmp_path / "adapter_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(WeightsError, match=r"adapter_model\.bin is not a checkpoint of torch.save"):
        load(small.family, tmp_path / "adapter_model.bin")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "alpha"])
def test_numbers_that_are_not_finite(small, tmp_path, value, where):
    """1e200 is finite as it is stored, but not in float32."""
    tensors = {key.replace("base_model.model.", "transformer."): x for key, x in small.tensors.items()}
    if where == "alpha":
        spoilt = {key.split(".lora_")[0] + ".alpha": torch.tensor(value, dtype=torch.float64) for key in tensors}
    else:
        spoilt = {key: torch.full_like(x, value, dtype=torch.float64) for key, x in tensors.items() if where in key}
    file = written(tmp_path, tensors | spoilt, name="x.safetensors")
    with pytest.raises(WeightsError, match=rf"^{file}: transformer\S+ is not finite at scale \S+: train or save"):
        load(small.family, file)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_quantised_factors_are_told(small, tmp_path, dtype, name):
    tensors = {key: x.to(dtype) for key, x in small.tensors.items()}
    file = written(tmp_path, tensors, small.config)
    with pytest.raises(WeightsError, match=rf"^{file}: base_model\S+ is stored as {name}, as 19 others: numbers of"):
        load(small.family, file)


def test_an_alpha_may_be_a_whole_number(small, tmp_path):
    """As tensors of other trainers, which hold a number as it was in their options; mixed with half precision."""
    tensors = {key.replace("base_model.model.", "transformer."): x for key, x in small.tensors.items()}
    kinds = torch.float16, torch.bfloat16, torch.float32
    tensors = {key: x.to(kinds[i % 3]) for i, (key, x) in enumerate(tensors.items())}
    found = []
    for dtype in (torch.float32, torch.int64):
        alphas = {key.split(".lora_")[0] + ".alpha": torch.tensor(2, dtype=dtype) for key in tensors}
        found.append(load(small.family, written(tmp_path, tensors | alphas, name="x.safetensors")).adapter)
    jax.tree.map(np.testing.assert_array_equal, *found)
